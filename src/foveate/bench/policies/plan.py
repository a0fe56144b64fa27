"""The plan of a reference run: its methods, tasks and sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foveate.bench.known import FULL, PACKED
from foveate.core import validate
from foveate.core.catalog import cache_policies
from foveate.core.errors import OptionError, unknown
from foveate.tasks.base.task import Task
from foveate.tasks.registry import named
from foveate.tasks.text.ruler import KINDS

#: One of RULER's needles, several keys, and the needle in longer texts.
TASKS = ("niah_single", "niah_multikey", "niah_single@8192", "niah_single@16384")
#: Policies of the quick plan: three that keep part of the cache, and three that read part of it.
QUICK = ("sink_recent", "duo_attention", "razor_attention", "token_select", "tidal_decode", "recycled_attention")
#: Prompts of a task with a length of its own.
LONG = 3


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Args:
        methods: keys of cache policies.
        budgets: shares of the full cache.
        tasks: names of retrieval tasks, see `foveate.tasks.registry`; `NAME@CHARACTERS` asks for prompts of another
            length.
        examples: prompts per task; of a task with a length of its own, at most `LONG`.
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
    budgets: tuple[float, ...] = (0.25,)
    tasks: tuple[str, ...] = TASKS
    examples: int = 6
    characters: int = 4096
    batch: int = 6
    losses: tuple[int, ...] = (4096,)
    texts: int = 1
    horizon: int = 48
    times: tuple[int, ...] = (1024,)
    rounds: int = 3
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for key in self.methods:
            if key not in policies():
                raise unknown("method", key, policies())
        for task in self.tasks:
            name, _, length = task.partition("@")
            if name not in KINDS:
                raise unknown("task", name, KINDS)
            if length and not (length.isdigit() and int(length)):
                raise OptionError(f"task={task!r} must be a name, or NAME@CHARACTERS")
        for option in ("examples", "characters", "batch", "texts", "horizon", "rounds", "steps"):
            validate.at_least(option, getattr(self, option), 1)
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise OptionError(f"budgets={self.budgets} must be shares of the full cache, above 0 and at most 1")

    def task(self, name: str) -> Task:
        """Return one of the tasks."""
        kind, _, length = name.partition("@")
        return named(kind, int(length or self.characters), self.count(name), self.seed)

    def count(self, name: str) -> int:
        """Return the number of a task's prompts."""
        return min(self.examples, LONG) if "@" in name else self.examples

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
    """Return a plan of some minutes: six policies, one budget, shorter texts.

    Its texts fit into 4,096 tokens of one character, the context of the lab model.
    """
    return replace(
        whole(), methods=QUICK, budgets=(0.25,), tasks=("niah_single", "niah_multikey", "niah_multivalue"), examples=8,
        characters=3072, batch=8, losses=(3072,), texts=1, times=(1024,), rounds=3, steps=8,
    )  # fmt: skip
