"""The survey's attention: any alignment function under any distribution function.

An Attentive Survey of Attention Models (2019), arXiv 1904.02874.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, shown
from foveate.core.scoring import SOFTMAX, Scoring, Tile, dot_product
from foveate.ops.base.kv_cached import Cached
from foveate.ops.functional import normalizers
from foveate.ops.functional.alignment import Alignment, make_alignment
from foveate.ops.functional.normalizers import DISTRIBUTIONS, LocalWindow


@final
class SurveyAttention(Cached):
    """`p(a(q, k) · scale) v` with an alignment a, a distribution p and, optionally, a local window.

    It serves to compare scores and normalizers in one place; a mechanism with its own class here is better used from
    that class. O(Nq Nk D) time. Inner products (similarity, dot, scaled_dot, general, biased_general, kernel) run on
    fused kernels under the softmax; additive, concat and deep hold `hidden` numbers for each pair of a tile and are
    several times slower. Forms with weights have to be trained: they are no drop-in for a pretrained model.

    Args:
        alignment: "scaled_dot", "dot", "similarity" (cosine), "general", "biased_general", "activated_general",
            "kernel", "concat", "additive", "deep", "location" (no keys), "feature" (no query); or an `Alignment`.
        distribution: "softmax", "sparsemax", "entmax", "sigmoid", "argmax" or "sample" (both hard: one key; no gradient
            reaches the logits); or a function of logits, which gives 0 for -inf.
        heads, head_dim: Hq and D of the calls to come, if anything is learned.
        hidden: hidden width of concat, additive, deep and feature; None for D.
        depth: layers of "deep"; None for 2.
        activation: "tanh", "relu", "sigmoid", "gelu" or "elu+1" (kernel's default; tanh elsewhere).
        positions: the number of keys that "location" covers.
        alpha: the order of "entmax"; None for 1.5.
        window: keys to either side of the position that each query predicts (local-p); None for all keys.
        sigma: the width of the Gaussian over the window; None for half of the window.
        generator: the generator of "sample".

    The scale is 1 unless a call gives another, and `D ** -0.5` for "scaled_dot". The forms are the survey's table;
    positions counted from 0, and the keys that a causal query sees as the S of local-p, are ours.

    Raises:
        OptionError: an unknown name, or an option that the alignment or distribution lacks or needs.
    """

    def __init__(
        self, alignment: str | Alignment = "scaled_dot", distribution: str | Callable[[Tensor], Tensor] = "softmax", *,
        heads: int | None = None, head_dim: int | None = None, hidden: int | None = None, depth: int | None = None,
        activation: str | None = None, positions: int | None = None, alpha: float | None = None,
        window: float | None = None, sigma: float | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = {"hidden": hidden, "depth": depth, "activation": activation, "positions": positions}
        if isinstance(alignment, Alignment):
            if given := sorted(name for name, value in options.items() if value is not None):
                raise OptionError(f"{', '.join(given)} must come with an alignment's name; this one is already built")
            self.alignment = alignment
        else:
            self.alignment = make_alignment(alignment, heads=heads, head_dim=head_dim, **options)
        self.distribution, self.generator = distribution, generator
        self._distribute = _distribution(distribution, alpha, generator)
        self._declare(
            default_scale=self.alignment.default_scale, streaming="own" if distribution == "sample" else "exact"
        )
        if sigma is not None and window is None:
            raise OptionError(f"sigma={shown(sigma)} must come with a window")
        self.local = None
        if window is not None:
            if heads is None or head_dim is None:
                raise OptionError(f"window={shown(window)} must come with heads and head_dim")
            self.local = LocalWindow(heads, head_dim, window, sigma)

    def _prepared(self, call: AttentionCall) -> AttentionCall:
        self.alignment.check(call.q, call.n_keys)
        scoring = self._scoring(call.q, call.n_keys, call.causal)
        q, k = self.alignment.prepare(call.q, masks.without_hidden(call.k, call.mask))
        return replace(call, q=q, k=k, scoring=scoring)

    def _scoring(self, q: Tensor, n_keys: int, causal: bool) -> Scoring:
        """Return the call's scoring. It predicts and draws once, so that engines that compute twice see the same."""
        if self.distribution == "softmax" and self.local is None and self.alignment.is_inner_product:
            return SOFTMAX
        seen = torch.arange(n_keys - q.shape[2], n_keys, device=q.device) + 1 if causal else torch.tensor(n_keys)
        aim = None if self.local is None else _Aim(self.local, self.local.centre(q, seen.to(q.device)))
        uniform = None
        if self.distribution == "sample":
            assert self.generator is not None  # the constructor refuses "sample" without one
            uniform = torch.rand(q.shape[:3], generator=self.generator, device=self.generator.device).to(q.device)
        return _Call(self, aim, uniform)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(
            "deep", "entmax", heads=heads, head_dim=head_dim, hidden=head_dim + 2, depth=2, activation="tanh",
            window=max(1, length // 3),
        )  # fmt: skip

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls()


class _Aim(NamedTuple):
    """The window of a call, and its centre for each query."""

    window: LocalWindow
    centre: Float[Tensor, "b h q"]


@dataclass(frozen=True)
class _Call:
    """The scoring of one call."""

    op: SurveyAttention
    aim: _Aim | None
    uniform: Float[Tensor, "b h q"] | None

    @property
    def is_softmax(self) -> bool:
        return self.op.distribution == "softmax" and self.aim is None

    def parameters(self) -> Iterator[nn.Parameter | Tensor]:
        if not self.op.alignment.is_inner_product:
            yield from self.op.alignment.parameters()
        if self.aim is not None:
            yield self.aim.centre

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        if self.op.alignment.is_inner_product:
            logits = dot_product(q, k, scale)
        else:
            logits = scale * self.op.alignment.score(q, k, at)
        return logits if self.aim is None else self.aim.window.cut(logits, _rows(self.aim.centre, at), at.cols)

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        drawn = () if self.uniform is None else (_rows(self.uniform, at),)
        weights = self.op._distribute(logits, *drawn)
        return weights if self.aim is None else self.aim.window.dampen(weights, _rows(self.aim.centre, at), at.cols)

    def score_macs(self, width: int) -> int:
        return self.op.alignment.score_macs(width)


def _rows(x: Float[Tensor, "b h q"], at: Tile) -> Float[Tensor, "b h q"]:
    """Return the numbers of the tile's queries; `at.rows` counts in keys."""
    return x[:, :, at.rows - (at.n_keys - at.n_queries)]


def _distribution(
    name: str | Callable[[Tensor], Tensor], alpha: float | None, generator: torch.Generator | None
) -> Callable[..., Tensor]:
    if alpha is not None and name != "entmax":
        raise OptionError(f'alpha={shown(alpha)} must come with distribution="entmax"')
    if (generator is None) == (name == "sample"):
        raise OptionError('generator must come with distribution="sample", and only with it')
    if not isinstance(name, str):
        return name
    validate.one_of("distribution", name, (*DISTRIBUTIONS, "entmax", "sample"))
    if name == "sample":
        return normalizers.sample
    if name != "entmax":
        return DISTRIBUTIONS[name]
    normalizers.entmax(torch.zeros(1), 1.5 if alpha is None else alpha)  # refuse a bad alpha now, not in the first call
    return partial(normalizers.entmax, alpha=1.5 if alpha is None else alpha)
