"""The run of one model: its contenders, their recorded results, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.bench.comparison.interleaved import Progress
from foveate.bench.comparison.method_run import one_line
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.parts.journal import Journal
from foveate.bench.policies.plan import Plan
from foveate.host.hf.model import Host
from foveate.tasks.parts.corpus import text


@dataclass
class ModelRun:
    """The state that all measurements of one model share.

    Args:
        model, tokenizer: the model and its tokenizer.
        plan: the measurements to make.
        journal: holds known results, and receives new ones.
        contenders: the full cache, and every policy at every budget.
        progress: receives the progress.
        environment: the digest of the model and of all else that is common to all records.
        errors: the reason why a contender has no results, by its name.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: Plan
    journal: Journal
    contenders: list[Contender]
    progress: Progress
    environment: str
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return Host(self.model)

    @property
    def context(self) -> int | None:
        """The model's context length; None without a limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def working(self) -> list[Contender]:
        """Return the contenders that have not failed."""
        return [each for each in self.contenders if contender_name(each) not in self.errors]

    def key(self, contender: Contender, *parts: Any) -> str:
        """Return the journal's key of a contender's record."""
        return digest.of(self.environment, contender.identity, *parts)

    def known(self, contender: Contender, *parts: Any) -> dict[str, Any] | None:
        """Return a contender's record, or None."""
        return self.journal.get(self.key(contender, *parts))

    def attempt(self, contender: Contender, work: Callable[[], Any]) -> Any:
        """Return the result of `work`; None if it fails, which is stored in `errors`."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  a failed policy becomes a row with its reason
            self.errors[contender_name(contender)] = one_line(error)
            return None

    def encode(self, prompt: str) -> list[int]:
        """Encode text, with the beginning-of-sequence token if the model has one."""
        return list(self.tokenizer(prompt, verbose=False).input_ids)

    def equalise(self, prompts: Sequence[list[int]]) -> Tensor:
        """Stack prompts; filler text goes before shorter ones, after the beginning-of-sequence token."""
        longest, begin = max(map(len, prompts)), self.tokenizer.bos_token_id
        filler = list(self.tokenizer(text("heldout")[: 8 * longest], add_special_tokens=False, verbose=False).input_ids)
        rows = []
        for ids in prompts:
            skip, more = int(bool(ids) and ids[0] == begin), longest - len(ids)
            rows.append([*ids[:skip], *filler[:more], *ids[skip:]])
        return torch.tensor(rows, device=self.model.device)

    def text(self, tokens: int, count: int = 1) -> Tensor:
        """Return `(count, tokens)` adjacent stretches of real text."""
        ids = self.encode(text("heldout"))
        begin = [ids.pop(0)] if ids[0] == self.tokenizer.bos_token_id else []
        own = tokens - len(begin)
        rows = [begin + ids[own * i : own * (i + 1)] for i in range(count)]
        return torch.tensor(rows, device=self.model.device)


def contender_name(contender: Contender) -> str:
    """Return a contender's name in the errors of a run."""
    return f"{contender.key} {contender.budget:g}"
