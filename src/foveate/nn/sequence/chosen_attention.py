"""Attention at chosen positions alone, as Zoology adds it to convolutions.

Zoology: Measuring and Improving Recall in Efficient Language Models (2023), arXiv 2312.04927.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from foveate.core import masks as mask_algebra, validate
from foveate.nn.base.layer import Layer
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.positions import Position


@final
class ChosenAttention(Layer):
    """Causal attention whose output goes to some positions only; the others get zeros, and their queries no work.

    Cost O(m N C) for m chosen queries of N. With a convolution before it this is what recall needs: most tokens are
    predicted from their neighbours, and those that repeat something far back are few.

    Args:
        dim, heads: C and H.
        select: "learned": positions where `sigmoid(x w)` is over a half; in training every position counts, times that
            number, and `penalty` keeps them few. "given": those that a call's `chosen (B, N)`, bool, marks; tokens that
            stood in the sequence before, for instance (`repeated`). Without `chosen`, all.
        position: as of `MultiHeadAttention`.

    The paper's learned selector keeps the k highest of a sequence, which tells a token about its future; a threshold
    does not, and it is ours.
    """

    capabilities = replace(
        Layer.capabilities, patterns=frozenset({"causal self"}), masks=frozenset({"keys"}), inputs=frozenset({"chosen"})
    )

    def __init__(
        self, dim: int, heads: int, *, select: Literal["learned", "given"] = "learned", position: Position | None = None
    ) -> None:
        super().__init__(dim, heads)
        validate.one_of("select", select, ("learned", "given"))
        self.attention = MultiHeadAttention(dim, heads, position=position)
        self.selector = nn.Linear(dim, 1) if select == "learned" else None
        if self.selector is None:
            return
        self._declare(inputs=frozenset())

    def _mix(
        self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, chosen: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:  # fmt: skip
        if self.selector is not None:
            soft = self.share(x)
            if self.training:
                return soft * self.attention(x, mask=mask, causal=True)
            chosen = soft[..., 0] > 0.5
        if chosen is None:
            return self.attention(x, mask=mask, causal=True)
        return self._at(x, chosen.bool(), mask)

    def share(self, x: Tensor) -> Tensor:
        """How much each position wants attention, `(B, N, 1)` in 0..1."""
        assert self.selector is not None
        return torch.sigmoid(self.selector(x))

    def penalty(self, x: Tensor, budget: float) -> Tensor:
        """By how much the mean share of positions is over `budget`, to be added to a loss."""
        return (self.share(x).mean() - budget).clamp_min(0.0)

    def _at(self, x: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """Attention for the chosen queries, brought together at the front of each sequence."""
        n, most = x.shape[1], int(chosen.sum(1).max()) if chosen.numel() else 0
        places = torch.arange(n, device=x.device)
        front = torch.where(chosen, places, n + places).argsort(1)[:, :most]
        q, k, v = self.attention.projected(x, places)
        picked = q.gather(2, front[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        sees = places <= front[..., None]
        if mask is not None:
            sees = sees & mask_algebra.keys_of(mask, x.shape[0], n)[:, None]
        real = chosen.gather(1, front)[..., None]
        tokens = x.gather(1, front[..., None].expand(-1, -1, x.shape[2]))
        out = self.attention.merged(self.attention.op(picked, k, v, mask=sees[:, None]), tokens)
        return torch.zeros_like(x).scatter(1, front[..., None].expand_as(out), out.masked_fill(~real, 0.0))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, select="given")


def repeated(tokens: Tensor) -> Tensor:
    """Positions `(B, N)` whose token stood in the sequence before."""
    same = tokens[:, :, None] == tokens[:, None]
    return (same & torch.ones_like(same).tril(-1)).any(-1)
