"""The plan of a reference run: its methods, tasks and sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foveate.bench.known import FULL, PACKED
from foveate.core import validate
from foveate.core.catalog import cache_policies
from foveate.core.errors import OptionError, unknown
from foveate.tasks.text.ruler import KINDS

#: All of RULER's tasks except common words, which models of half a billion parameters fail even with a full cache.
TASKS = tuple(name for name in KINDS if name != "common_words")


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Args:
        methods: keys of cache policies.
        budgets: shares of the full cache.
        tasks: names of retrieval tasks, see `foveate.tasks.registry`.
        examples: prompts per task.
        characters: the length of a retrieval prompt.
        batch: how many retrieval prompts are answered together.
        losses: context lengths in tokens at which the next-token loss is measured.
        texts: texts per context length.
        horizon: tokens of each text whose loss is measured.
        times: lengths in tokens of the timed prompts.
        rounds: rounds of decoding times; all contenders run in each.
        steps: decoded tokens per contender and round.
        seed: the seed of the prompts.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5)
    tasks: tuple[str, ...] = TASKS
    examples: int = 12
    characters: int = 4096
    batch: int = 12
    losses: tuple[int, ...] = (4096, 8192)
    texts: int = 2
    horizon: int = 48
    times: tuple[int, ...] = (1024, 4096)
    rounds: int = 5
    steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for key in self.methods:
            if key not in policies():
                raise unknown("method", key, policies())
        for name in self.tasks:
            if name not in KINDS:
                raise unknown("task", name, KINDS)
        for option in ("examples", "characters", "batch", "texts", "horizon", "rounds", "steps"):
            validate.at_least(option, getattr(self, option), 1)
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise OptionError(f"budgets={self.budgets} must be shares of the full cache, above 0 and at most 1")

    @property
    def contenders(self) -> list[tuple[str, float]]:
        """The full cache, plain and packed, and every policy at every budget, as (key, budget)."""
        return [(FULL, 1.0), (PACKED, 1.0), *((key, budget) for budget in self.budgets for key in self.methods)]

    @property
    def typical(self) -> float:
        """The budget nearest to 0.25, at which the prefill is timed; it is dense under every policy."""
        return min(self.budgets, key=lambda budget: abs(budget - 0.25))


def policies() -> tuple[str, ...]:
    """Return the keys of the catalogue's cache policies."""
    return tuple(row.key for row in cache_policies())


def whole() -> Plan:
    """Return the plan of the published table."""
    return Plan(policies())


def quick() -> Plan:
    """Return a plan of a few minutes: one budget, fewer prompts, shorter texts.

    Its texts fit into 4,096 tokens of one character, the context of the lab model.
    """
    return replace(
        whole(), budgets=(0.25,), tasks=("niah_single", "niah_multikey", "niah_multivalue"), examples=8,
        characters=3072, batch=8, losses=(3072,), texts=1, times=(1024,), rounds=3, steps=8,
    )  # fmt: skip
