"""One model at work: its contenders, what is known of them already, and what fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.bench.comparison.lanes import briefly
from foveate.bench.comparison.turns import Progress
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.parts.journal import Journal
from foveate.bench.policies.plan import Plan
from foveate.host.hf.model import Host
from foveate.tasks.parts.corpus import text


@dataclass
class Desk:
    """What all parts of a run share for one model.

    Args:
        model, tokenizer: of it.
        plan: what to measure.
        journal: what is known, and where what is measured goes.
        contenders: the full cache, and every policy at every budget.
        watch: told about every step.
        world: the digest of the model and of all else that every record hangs on.
        errors: why a contender has no figures, by its name.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: Plan
    journal: Journal
    contenders: list[Contender]
    watch: Progress
    world: str
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return Host(self.model)

    @property
    def context(self) -> int | None:
        """Positions that the model was made for; None where it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def able(self) -> list[Contender]:
        """The contenders that have not failed."""
        return [each for each in self.contenders if name(each) not in self.errors]

    def key(self, contender: Contender, *what: Any) -> str:
        return digest.of(self.world, contender.identity, *what)

    def known(self, contender: Contender, *what: Any) -> dict[str, Any] | None:
        return self.journal.get(self.key(contender, *what))

    def attempt(self, contender: Contender, work: Callable[[], Any]) -> Any:
        """What `work` gives; None where the contender cannot, which is noted."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  one policy that fails is a row with its reason, not the end
            self.errors[name(contender)] = briefly(error)
            return None

    def encode(self, words: str) -> list[int]:
        """Text as ids, with the mark that begins a sequence where the model has one."""
        return list(self.tokenizer(words, verbose=False).input_ids)

    def level(self, prompts: Sequence[list[int]]) -> Tensor:
        """Prompts as one tensor: more text goes before the shorter ones, behind the mark that begins a sequence."""
        longest, begin = max(map(len, prompts)), self.tokenizer.bos_token_id
        filler = list(self.tokenizer(text("heldout")[: 8 * longest], add_special_tokens=False, verbose=False).input_ids)
        rows = []
        for ids in prompts:
            skip, more = int(bool(ids) and ids[0] == begin), longest - len(ids)
            rows.append([*ids[:skip], *filler[:more], *ids[skip:]])
        return torch.tensor(rows, device=self.model.device)

    def text(self, tokens: int, count: int = 1) -> Tensor:
        """`(count, tokens)` of real text, side by side."""
        ids = self.encode(text("heldout"))
        begin = [ids.pop(0)] if ids[0] == self.tokenizer.bos_token_id else []
        own = tokens - len(begin)
        rows = [begin + ids[own * i : own * (i + 1)] for i in range(count)]
        return torch.tensor(rows, device=self.model.device)


def name(contender: Contender) -> str:
    """A contender's name in the journal's and the summary's words."""
    return f"{contender.key} {contender.budget:g}"
