"""The effect of interventions on a number that a model's logits give: one run for each.

    metric = LogitDifference(answers)                                   # answer less distractor, at the last token
    sent = head_outputs(model, corrupt)
    effects = method_effects(model, clean, {h: Patch({h: sent[h[0]][:, h[1]]}) for h in heads}, metric)

Any method will do: patches and ablations of heads and of edges, or a cache policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import ShapeError, shown
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.lens.circuits.residual_stream import Inputs, as_mapping

Key = TypeVar("Key")

#: `metric(logits (B, N, V))` returns one number, a tensor without axes.
Metric = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class LogitDifference:
    """The mean over texts of the answer's logit less the distractor's.

    Args:
        answers: token ids of answer and distractor of each text.
        position: the token whose logits count, one for all texts or for each; negative ones count from the end.
    """

    answers: Int[Tensor, "b 2"]
    position: Int[Tensor, " b"] | int = -1

    def __post_init__(self) -> None:
        answers = self.answers
        if not isinstance(answers, Tensor) or answers.dtype != torch.long or answers.shape[1:] != (2,):
            raise ShapeError(f"answers must be token ids (B, 2): answer and distractor; got {shown(answers)}")

    def __call__(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, ""]:
        batch = torch.arange(len(logits), device=logits.device)
        if len(self.answers) != len(logits):
            raise ShapeError(f"answers must be token ids ({len(logits)}, 2), a pair for each text; got "
                             f"{shown(self.answers)}")  # fmt: skip
        at = torch.as_tensor(self.position, device=logits.device).expand(len(logits))
        both = logits[batch, at].double().gather(1, self.answers.to(logits.device))
        return (both[:, 0] - both[:, 1]).mean()


def measured(run: Host, inputs: Inputs, metric: Metric, *methods: Method) -> float:
    """Return a metric of a model's logits, read once under methods and without a cache."""
    with torch.no_grad(), apply(run.model, *methods) if methods else nullcontext():
        return float(metric(run.model(**{**as_mapping(run, inputs), "use_cache": False}).logits))


def method_effects(model: object, inputs: Inputs, methods: Mapping[Key, Method], metric: Metric) -> dict[Key, float]:
    """Return the change of a metric under each of some methods, one at a time, by its key.

    Args:
        model: a model with logits.
        inputs: token ids, or a tokenizer's mapping.
        methods: for instance `Patch` or `EdgePatch`.
        metric: a number of the logits, such as `LogitDifference`.
    """
    run = host(model)
    start = measured(run, inputs, metric)
    return {key: measured(run, inputs, metric, method) - start for key, method in methods.items()}
