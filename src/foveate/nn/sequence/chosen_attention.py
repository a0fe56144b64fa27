"""Attention only at chosen positions, as Zoology adds it to convolutions.

Zoology: Measuring and Improving Recall in Efficient Language Models (2023), arXiv 2312.04927.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.nn.base.layer import Layer
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.positions import Position


@final
class ChosenAttention(Layer):
    """Causal attention for chosen queries only; the other positions get zeros at no cost.

    Cost O(m N C) for m chosen queries of N. Behind a convolution it suffices for recall: neighbours predict most
    tokens, and only a few repeat something far back.

    Args:
        dim, heads: C and H.
        select: "learned": positions where `sigmoid(x w)` is over a half; in training every output is multiplied by that
            number, and `penalty` keeps chosen positions few. "given": those that a call's `chosen (B, N)`, bool, marks,
            for instance tokens that occurred before (`repeated`). Without `chosen`, all.
        position: as for `MultiHeadAttention`.

    The paper's learned selector keeps the k highest of a sequence, which leaks the future into a token. The threshold
    does not, and is ours.
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
        self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, chosen: Tensor | None = None,
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
        """Return the selector's score of each position, `(B, N, 1)` in 0..1."""
        assert self.selector is not None
        return torch.sigmoid(self.selector(x))

    def penalty(self, x: Tensor, budget: float) -> Tensor:
        """Return the excess of the mean score over `budget`, to add to a loss."""
        return (self.share(x).mean() - budget).clamp_min(0.0)

    def _at(self, x: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with the chosen queries, gathered at the front of each sequence."""
        n, most = x.shape[1], int(chosen.sum(1).max()) if chosen.numel() else 0
        places = torch.arange(n, device=x.device)
        front = torch.where(chosen, places, n + places).argsort(1)[:, :most]
        q, k, v = self.attention.projected(x, places)
        picked = q.gather(2, front[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        sees = places <= front[..., None]
        if mask is not None:
            sees = sees & masks.keys_of(mask, x.shape[0], n)[:, None]
        real = chosen.gather(1, front)[..., None]
        tokens = x.gather(1, front[..., None].expand(-1, -1, x.shape[2]))
        out = self.attention.merged(self.attention.op(picked, k, v, mask=sees[:, None]), tokens)
        return torch.zeros_like(x).scatter(1, front[..., None].expand_as(out), out.masked_fill(~real, 0.0))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, select="given")


def repeated(tokens: Tensor) -> Tensor:
    """Return a mask `(B, N)` of positions whose token occurred earlier in the sequence."""
    same = tokens[:, :, None] == tokens[:, None]
    return (same & torch.ones_like(same).tril(-1)).any(-1)
