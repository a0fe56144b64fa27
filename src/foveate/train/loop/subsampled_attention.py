"""Training with subsampled attention, and ensembles of the sub-networks that it trains.

The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles (2023), arXiv 2306.01705.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, shown
from foveate.host.entry import apply
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.nn.parts.heads import HeadScheme
from foveate.ops.dense.softmax import Softmax
from foveate.ops.functional.subsampled import Mode, check_options, subsampled_attention
from foveate.ops.operator import Operator
from foveate.train.base.objective import logits_of


@dataclass(frozen=True)
class Sampling:
    """The options of a draw; see `subsampled_attention`."""

    keep: float
    mode: Mode
    sigma: float
    generator: torch.Generator

    def __post_init__(self) -> None:
        check_options(self.keep, self.mode, self.sigma)
        if not isinstance(self.generator, torch.Generator):
            raise OptionError(f"generator={shown(self.generator)} must be a torch.Generator")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return subsampled_attention(
            q, k, v, self.keep, self.mode, generator=self.generator, sigma=self.sigma, **options
        )  # fmt: skip


@final
class SubsampledAttention:
    """A `with` block in which the self-attention of a model reads a random part of the keys while it trains.

        with SubsampledAttention(model, keep=0.25, generator=torch.Generator().manual_seed(0)):
            fit(model, task, schedule)      # most of the training
        fit(model, task, a_tenth)           # the rest, with full attention

    Every layer draws anew at every call. Time and memory of attention fall to `keep`; the draws regularise, which helps
    where a model overfits. A model in evaluation mode attends to all keys; `self_ensemble` averages over draws. Nothing
    is added to the model, and it is as before after the block. The wrong choice for training without a last part of
    full attention, and where one key decides.

    Args:
        model: a transformers model, or a network with softmax layers of this library.
        keep, mode, sigma: see `foveate.ops.functional.subsampled_attention`. The paper keeps 1/4 to 1/8.
        generator: draws.
        always: True draws in evaluation mode too.

    Raises:
        OptionError: an option out of range, or a network without a softmax layer.
    """

    def __init__(
        self, model: nn.Module, keep: float = 0.25, mode: Mode = "unbiased", *, sigma: float = 0.5,
        generator: torch.Generator, always: bool = False,
    ) -> None:  # fmt: skip
        validate.flag("always", always)
        self.model, self.always = model, always
        self.sampling = Sampling(keep, mode, sigma, generator)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        if isinstance(self.model, PreTrainedModel):
            self._exit.enter_context(apply(self.model, _Hosted(self.sampling, self.always)))
            return self
        layers = [m for m in self.model.modules() if isinstance(m, HeadScheme) and isinstance(m.op, Softmax)]
        if not layers:
            raise OptionError(f"model={type(self.model).__name__} must have a layer of softmax attention; it has none")
        for layer in layers:
            self._exit.callback(layer.register_module, "op", layer.op)
            layer.register_module("op", _Drawn(layer.op, self.sampling, self.always))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()


def self_ensemble(
    model: nn.Module, x: Tensor | Mapping[str, Any], samples: int = 8, keep: float = 0.5, *, mode: Mode = "unbiased",
    sigma: float = 0.5, generator: torch.Generator, average: Literal["probs", "logits"] = "probs",
) -> Float[Tensor, "... classes"]:  # fmt: skip
    """Return class probabilities, averaged over draws of the keys that a model reads.

    Args:
        model: as for `SubsampledAttention`; its mode stays.
        x: the model's input, or its inputs by name.
        samples: number of draws.
        keep, mode, sigma, generator: see `SubsampledAttention`.
        average: "probs" averages probabilities, "logits" the logits. The paper does not say which.
    """
    validate.count("samples", samples, 1)
    validate.one_of("average", average, ("probs", "logits"))
    found = []
    block = SubsampledAttention(model, keep, mode, sigma=sigma, generator=generator, always=True)
    with torch.no_grad(), block:
        for _ in range(samples):
            logits = logits_of(model(**x) if isinstance(x, Mapping) else model(x))
            found.append(logits.softmax(-1) if average == "probs" else logits)
    mean = torch.stack(found).mean(0)
    return mean if average == "probs" else mean.softmax(-1)


@final
class _Drawn(nn.Module):
    """A stand-in for a layer's softmax attention."""

    def __init__(self, inner: Operator, sampling: Sampling, always: bool) -> None:
        super().__init__()
        self.capabilities, self.name = inner.capabilities, inner.name
        self.inner, self.sampling, self.always = inner, sampling, always
        self.train(inner.training)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if (self.training or self.always) and q.shape[2] == k.shape[2]:
            return self.sampling.attend(q, k, v, **options)
        out = self.inner(q, k, v, **options)
        assert isinstance(out, Tensor)
        return out


@final
@dataclass(eq=False)
class _Hosted(Method):
    """Subsampled attention in a transformers model."""

    sampling: Sampling
    always: bool

    def at(self, site: Site) -> bool:
        draws = site.module.training or self.always
        return draws and not site.crosses and site.q.shape[2] == site.k.shape[2] > 1

    def attend(self, site: Site) -> Tensor:
        if site.softcap is not None:
            raise UnsupportedModel(f"{type(site.module).__name__} has a soft cap, which subsampled attention lacks")
        return self.sampling.attend(site.q, site.k, site.v, mask=site.mask, scale=site.scale, dropout=site.dropout)
