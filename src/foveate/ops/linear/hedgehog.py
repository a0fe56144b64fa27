"""Hedgehog: linear attention whose learned features imitate the softmax.

The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry (2024), arXiv 2402.04347.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.ops.base.linear import Linear

Form = Literal["softmax", "two_softmax", "exp", "exp_shifted"]
Bias = Literal["none", "scalar", "vector"]


@final
class Hedgehog(Linear):
    """Weights `phi_q(q_i) . phi_k(k_j)`, normalized over the keys, with one learned map per head for q and one for k.

    `phi(x)` makes 2F positive features of `y = gain (W x + b)`, with W `(F, D)`: a spiky, nearly monotone approximation
    of `exp(q . k)`, at O(N F (D + Dv)) cost and with a state of 2F x (Dv + 1) numbers per head. It replaces a softmax:
    train the maps with `foveate.train.distill`, then the model. Untrained (W = 1, b = 0) its weights already have a
    lower entropy than those of `elu + 1`. The wrong choice if nothing can be trained.

    Args:
        heads, head_dim: Hq and D of the calls to come.
        form: the features. "exp": `[exp y, exp -y]`, the paper's, which overflows where `|y|` nears 88 in float32;
            "softmax": one softmax over both halves together, `[y, -y]`, which bounds the norm and re-weights keys;
            "two_softmax": a softmax in each half; "exp_shifted": each half minus its own maximum before the
            exponential. The last three divide a key's features by a factor of the key, which changes the weights.
        gain: factor on `W x + b`; the port in flash-linear-attention uses 2, with form "softmax", shared=True.
        bias: "vector", one "scalar" per map, or "none".
        shared: one map for all heads in place of one per head.
        feature_dim: F; None for D, as in the paper. W starts as an identity of F rows and D columns. Fewer features
            make the state smaller, and before training the channels from F on have no effect.

    `scale` is the factor on the dot products; its square root multiplies q and k before the maps. It is 1 unless a call
    gives another; `head_dim ** -0.5` multiplies each of the two by `head_dim ** -0.25`.

    Raises:
        OptionError: an unknown form or bias, or a negative `scale`.
        ShapeError: a call with other heads or another width.
    """

    capabilities = replace(Linear.capabilities, default_scale=1.0)
    tokenwise: ClassVar[bool] = True

    def __init__(
        self, heads: int, head_dim: int, form: Form = "softmax", *, gain: float = 1.0, bias: Bias = "vector",
        shared: bool = False, feature_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query_map, self.key_map = (
            FeatureMap(heads, head_dim, form, gain=gain, bias=bias, shared=shared, feature_dim=feature_dim)
            for _ in range(2)
        )

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return self.query_map(_rooted(q, scale))

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return self.key_map(_rooted(k, scale))

    def feature_macs(self, width: int) -> int:
        return width * self.query_map.weight.shape[1]

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(heads, head_dim)


@final
class FeatureMap(nn.Module):
    """Hedgehog's features, `x (B, H, N, D) -> (B, H, N, 2F)`; W starts as the identity. Options as for `Hedgehog`."""

    def __init__(
        self, heads: int, head_dim: int, form: Form, *, gain: float, bias: Bias, shared: bool,
        feature_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        feature_dim = head_dim if feature_dim is None else feature_dim
        validate.count("feature_dim", feature_dim, 1)
        validate.count("heads", heads, 1)
        validate.count("head_dim", head_dim, 1)
        validate.at_least("gain", gain, 0)
        validate.one_of("form", form, ("softmax", "two_softmax", "exp", "exp_shifted"))
        validate.one_of("bias", bias, ("none", "scalar", "vector"))
        self.heads, self.head_dim, self.form, self.gain = heads, head_dim, form, gain
        maps = 1 if shared else heads
        self.weight = nn.Parameter(torch.eye(feature_dim, head_dim).repeat(maps, 1, 1))
        width = {"none": 0, "scalar": 1, "vector": feature_dim}[bias]
        self.bias = nn.Parameter(torch.zeros(maps, 1, width)) if width else None

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n f"]:
        if x.shape[1] != self.heads or x.shape[3] != self.head_dim:
            built, got = f"Hq={self.heads}, D={self.head_dim}", f"Hq={x.shape[1]}, D={x.shape[3]}"
            raise ShapeError(f"Hedgehog was built for {built}; got {got}")
        y = x @ self.weight.to(x.dtype).mT
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        if self.gain != 1:
            y = self.gain * y
        if self.form == "softmax":
            return torch.cat([y, -y], -1).softmax(-1)
        if self.form == "two_softmax":
            return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
        if self.form == "exp_shifted":
            return torch.cat([torch.exp(y - y.amax(-1, keepdim=True)), torch.exp(y.amin(-1, keepdim=True) - y)], -1)
        return torch.cat([torch.exp(y), torch.exp(-y)], -1)


def _rooted(x: Tensor, scale: float) -> Tensor:
    """Multiply queries or keys by the square root of the scale."""
    if scale < 0:
        raise OptionError(f"scale={scale} must be at least 0, since its square root multiplies q and k")
    return x if scale == 1 else x * math.sqrt(scale)
