"""Circuits from discrete codes: the heads whose outputs get codes on a task's prompts that they never get elsewhere.

Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models (2024), arXiv 2405.12522. A
sparse autoencoder is trained on the outputs of all heads for a few prompts of a task (positive) and a few with the same
words but nothing to solve (negative). Each output then has one code, its strongest feature. A head's score is the
number of codes that it has on positive prompts only. No ablation and no gradient of the model is needed.

    found = discrete_sae_circuits(model, positive_ids, negative_ids)
    found.scores, found.heads(10)                                        # (layers, heads), and the best ten

This follows the release where it differs from the paper: outputs after the output projection, averaged over tokens,
and autoencoder weights with rows of unit length. The scale of the outputs, which the penalty depends on, is an
argument of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, shown
from foveate.lens.circuits.interventions import Head
from foveate.lens.parts.head_writes import Averaged, head_writes


@final
class DiscreteSAE(nn.Module):
    """A sparse autoencoder for the outputs of all heads, which gives each output one code.

    The features of an output x are c = ReLU(W (x - b) + e), its reconstruction V c + b. The loss is the mean squared
    error plus `l1` times the mean sum of features. The rows of W and of V have unit length: of V these are the rows of
    an output's numbers, as in the release.

    Args:
        width: the width of an output.
        features: the number of features, and of codes.
        l1: the weight of the sparsity penalty; the release takes 0.02, and 0.05 for one of its tasks.
        epochs: steps of Adam, each on all training prompts.
        rate: Adam's learning rate.
        prompts: number of prompts that are drawn for training; None for all.
        scale: "none" takes outputs as they are; "global" divides them by their root mean square over everything, so
            that `l1` means the same for any model.
        seed: draws the prompts and the first weights.
    """

    unit: Tensor

    def __init__(
        self, width: int, features: int = 200, l1: float = 0.02, *, epochs: int = 500, rate: float = 1e-3,
        prompts: int | None = 10, scale: Literal["none", "global"] = "none", seed: int = 0,
    ) -> None:  # fmt: skip
        for name, value in (("width", width), ("features", features), ("epochs", epochs)):
            validate.count(name, value, 1)
        if prompts is not None:
            validate.count("prompts", prompts, 1)
        validate.at_least("l1", l1, 0.0)
        validate.at_least("rate", rate, 0.0)
        validate.one_of("scale", scale, ("none", "global"))
        super().__init__()
        self.l1, self.epochs, self.rate, self.prompts, self.scale = l1, epochs, rate, prompts, scale
        self.draw = torch.Generator().manual_seed(seed)
        self.encoder = nn.Parameter(F.normalize(torch.randn(features, width, generator=self.draw), dim=1))
        self.decoder = nn.Parameter(F.normalize(torch.randn(width, features, generator=self.draw), dim=1))
        self.offset = nn.Parameter((2 * torch.rand(features, generator=self.draw) - 1) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("unit", torch.ones(()))

    def forward(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... f"], Float[Tensor, "... d"]]:
        """Return the features of outputs and their reconstruction."""
        features = F.relu(F.linear(x / self.unit - self.bias, self.encoder, self.offset))
        return features, (F.linear(features, self.decoder) + self.bias) * self.unit

    def loss(self, x: Float[Tensor, "... d"]) -> Float[Tensor, ""]:
        """Return the loss on outputs, in units of their scale."""
        features, reconstruction = self(x)
        return ((reconstruction - x) / self.unit).square().mean() + self.l1 * features.abs().sum(-1).mean()

    def fit(self, writes: Float[Tensor, "n l h d"]) -> Self:
        """Train on some of the prompts' outputs, drawn at random.

        Args:
            writes: the outputs of all heads for positive and negative prompts.
        """
        if writes.ndim != 4 or writes.shape[3] != self.bias.shape[0] or not len(writes):
            raise ShapeError(f"writes must be (n, layers, heads, {self.bias.shape[0]}); got {shown(writes)}")
        if self.scale == "global":
            self.unit.copy_(writes.square().mean().sqrt().clamp_min(torch.finfo(writes.dtype).tiny))
        some = writes[torch.randperm(len(writes), generator=self.draw)[: self.prompts]].detach().float()
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
        with torch.enable_grad():
            for _ in range(self.epochs):
                optimizer.zero_grad()
                self.loss(some).backward()
                for weight in (self.encoder, self.decoder):
                    assert weight.grad is not None
                    weight.grad -= (weight.grad * weight).sum(1, keepdim=True) * weight  # along the sphere only
                optimizer.step()
                with torch.no_grad():
                    for weight in (self.encoder, self.decoder):
                        weight.copy_(F.normalize(weight, dim=1))
        return self

    @torch.no_grad()
    def encode(self, writes: Float[Tensor, "... d"]) -> Int[Tensor, "..."]:
        """Return each output's code: the number of its strongest feature, 0 if it has none."""
        return self(writes.float())[0].argmax(-1)


@final
@dataclass(frozen=True, eq=False)
class SAECircuit:
    """A circuit found from codes.

    Args:
        positive, negative: the codes of the prompts.
        scores: of each head, see `circuit_scores`.
        edges: of each pair of heads, see `edge_scores`.
        layers: the numbers of the model's layers that the rows stand for.
    """

    positive: Int[Tensor, "n l h"]
    negative: Int[Tensor, "m l h"]
    scores: Float[Tensor, "l h"]
    edges: Float[Tensor, "lh lh"]
    layers: tuple[int, ...]

    def heads(self, count: int) -> list[Head]:
        """Return the heads with the highest scores, best first."""
        validate.count("count", count, 1)
        best = self.scores.flatten().argsort(descending=True, stable=True)[:count].tolist()
        return [(self.layers[place // self.scores.shape[1]], place % self.scores.shape[1]) for place in best]


def discrete_sae_circuits(
    model: object, positive: Tensor | Mapping[str, Any], negative: Tensor | Mapping[str, Any], *,
    tokens: Averaged = "all", normalize: bool = False, **options: Any,
) -> SAECircuit:  # fmt: skip
    """Find the heads and the pairs of heads that work on positive prompts only.

    Cost: two passes of the model, and the training of a small autoencoder.

    Args:
        model: a decoder.
        positive: prompts that the model completes by the circuit, ids or a mapping with an attention mask; 5 to 10 do.
        negative: prompts of the same words whose structure is broken.
        tokens: the tokens of a prompt to average over; see `head_writes`.
        normalize: see `circuit_scores`.
        options: of `DiscreteSAE`.
    """
    parts = [head_writes(model, inputs, tokens) for inputs in (positive, negative)]
    layers = tuple(sorted(parts[0]))
    if len({parts[0][layer].shape[1:] for layer in layers}) > 1:
        raise UnsupportedModel(f"{type(model).__name__} has layers with different numbers of heads")
    writes = [torch.stack([part[layer] for layer in layers], 1) for part in parts]
    sae = DiscreteSAE(writes[0].shape[3], **options).fit(torch.cat(writes))
    codes = [sae.encode(part) for part in writes]
    scores, edges = (scored(*codes, normalize=normalize) for scored in (circuit_scores, edge_scores))
    return SAECircuit(codes[0], codes[1], scores, edges, layers)


def circuit_scores(
    positive: Int[Tensor, "n l h"], negative: Int[Tensor, "m l h"], *, normalize: bool = False, softmax: bool = False
) -> Float[Tensor, "l h"]:
    """Return for each head the number of its codes that occur on positive prompts only.

    Args:
        positive, negative: codes.
        normalize: divide by the number of the head's codes.
        softmax: take a softmax over all heads; it changes no order.
    """
    _check_codes(positive, negative)
    scores = _unique(positive.flatten(1), negative.flatten(1), "union" if normalize else None)
    return (scores.softmax(0) if softmax else scores).view(positive.shape[1:])


def edge_scores(
    positive: Int[Tensor, "n l h"], negative: Int[Tensor, "m l h"], *, normalize: bool = False, forward: bool = False
) -> Float[Tensor, "lh lh"]:
    """Return for each pair of heads the number of pairs of their codes that occur together on positive prompts only.

    Args:
        positive, negative: codes.
        normalize: divide by the number of pairs on positive prompts plus that on negative ones, as the release does.
        forward: keep pairs of an earlier and a later layer only; otherwise all, in both orders.
    """
    _check_codes(positive, negative)
    own, other = positive.flatten(1).long(), negative.flatten(1).long()
    base = int(max(own.max(), other.max())) + 1
    by: Literal["sum"] | None = "sum" if normalize else None
    scores = torch.stack(
        [_unique(own[:, [a]] * base + own, other[:, [a]] * base + other, by) for a in range(own.shape[1])]
    )
    layer = torch.arange(len(scores), device=scores.device) // positive.shape[2]
    allowed = layer[:, None] < layer if forward else ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores * allowed


def edge_heads(edges: Float[Tensor, "lh lh"], ends: int | None = None) -> Int[Tensor, " lh"]:
    """Return how often each head is an end of the highest-scored pairs, which scores heads by their edges.

    Args:
        edges: see `edge_scores`.
        ends: the number of ends that are counted; None is half the square of the number of heads.
    """
    order = edges.flatten().argsort(descending=True, stable=True)
    both = torch.stack([order // len(edges), order % len(edges)], 1).flatten()
    return torch.bincount(both[: len(edges) ** 2 // 2 if ends is None else ends], minlength=len(edges))


def _unique(
    own: Int[Tensor, "n k"], other: Int[Tensor, "m k"], by: Literal["union", "sum"] | None
) -> Float[Tensor, " k"]:
    """Return for each column the number of codes in the first table only, or their share."""
    only = _firsts(own) & ~(own[:, None] == other).any(1)
    if by is None:
        return only.sum(0).float()
    total = _firsts(torch.cat([own, other])).sum(0) if by == "union" else _firsts(own).sum(0) + _firsts(other).sum(0)
    return only.sum(0) / total


def _firsts(codes: Int[Tensor, "n k"]) -> Bool[Tensor, "n k"]:
    """Mark the first occurrence of each code in its column."""
    earlier = torch.ones(len(codes), len(codes), dtype=torch.bool, device=codes.device).tril(-1)
    return ~((codes[:, None] == codes) & earlier[..., None]).any(1)


def _check_codes(positive: Tensor, negative: Tensor) -> None:
    if positive.ndim != 3 or negative.ndim != 3 or positive.shape[1:] != negative.shape[1:]:
        raise ShapeError(f"codes must be (n, layers, heads); got {shown(positive)} and {shown(negative)}")
    if not len(positive) or not len(negative):
        raise OptionError("positive and negative must both hold prompts")
