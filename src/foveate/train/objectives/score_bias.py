"""Models whose attention scores take a bias, so that an objective can perturb them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.errors import UnsupportedModel
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.parts.stack import Layers, Stack


class Scored(Protocol):
    """The outputs of a model that shows its attention scores.

    Attributes:
        logits: as the loss reads them.
        scores: attention's scores before the softmax, without the bias, `(B, ..., T)` with keys on the last axis.
    """

    @property
    def logits(self) -> Tensor: ...

    @property
    def scores(self) -> Tensor: ...


@runtime_checkable
class TakesScoreBias(Protocol):
    """A model that adds a bias to its attention scores, such as `foveate.models.BiLSTMAttentionClassifier`."""

    def score_mask(self, **inputs: Any) -> Bool[Tensor, "b *n t"]:
        """Return True for the scores that count; False for those of padding. Its shape is that of the scores."""

    def __call__(self, *, score_bias: Float[Tensor, "b *n t"], **inputs: Any) -> Scored: ...


def takes_score_bias(model: nn.Module) -> TakesScoreBias:
    """Return a model as one that takes a bias on its scores.

    Args:
        model: has `score_mask` and takes `score_bias`, or is an encoder of transformers.

    Raises:
        UnsupportedModel: it is neither.
    """
    if isinstance(model, TakesScoreBias):
        return model
    if isinstance(model, PreTrainedModel):
        return HostedScores(model)
    raise UnsupportedModel(
        f"model must have score_mask and take score_bias, or be an encoder of transformers; got {type(model).__name__}"
    )


@dataclass(frozen=True)
class HostedRead:
    """The outputs of an encoder of transformers, and the scores of all its heads.

    Args:
        outputs: the model's own outputs.
        scores: scores of L layers and H heads.
    """

    outputs: Any
    scores: Float[Tensor, "b l h n n"]

    @property
    def logits(self) -> Tensor:
        return self.outputs.logits


@final
class HostedScores:
    """The attention scores of a text encoder of transformers: those of all layers and heads, `(B, L, H, N, N)`.

    The model runs through `foveate.apply` and is unchanged afterwards. Every score takes a number of its own, so that
    memory grows with N².

    Args:
        model: an encoder with a head whose outputs have `logits`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = host(model)
        if found.decoder is not None:
            raise UnsupportedModel(f"{type(model).__name__} generates text; scores are perturbed in encoders only")
        self.model, stack = model, Stack.of(found)
        self.layers, self.heads = stack.layers, stack.heads

    def score_mask(self, **inputs: Any) -> Bool[Tensor, "b l h n n"]:
        """Return True for pairs of tokens that are no padding."""
        real = _real_tokens(self.model, inputs)
        pairs = real[:, :, None] & real[:, None]
        return pairs[:, None, None].expand(-1, self.layers, self.heads, -1, -1)

    def __call__(self, *, score_bias: Float[Tensor, "b l h n n"], **inputs: Any) -> HostedRead:
        method = _AddBias(score_bias)
        with apply(self.model, method):
            outputs = self.model(**inputs)
        return HostedRead(outputs, torch.stack([method.found[layer] for layer in sorted(method.found)], 1))


def _real_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Bool[Tensor, "b n"]:
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool()
    ids = inputs.get(model.main_input_name)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UnsupportedModel(f"{type(model).__name__} must read tokens (B, N); perturbed scores need their number")
    return torch.ones_like(ids, dtype=torch.bool)


@final
class _AddBias(Method):
    """Add a bias to the scores of every layer, and record the scores."""

    def __init__(self, bias: Float[Tensor, "b l h n n"]) -> None:
        self.bias, self.stack, self.found = bias, Layers("auto"), dict[int, Tensor]()

    def bind(self, host: Host) -> None:
        self.stack.bind(host, self)

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        layer = self.stack.at(site)
        self.found[layer] = logits
        return logits + self.bias[:, layer].to(logits)
