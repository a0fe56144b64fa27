"""How logits become weights: the part of attention that a dense mechanism may replace.

Engines compute in tiles, so a `Scoring` is asked for the logits of a tile and for the weights of rows. `-inf` is the
one way in which a forbidden pair reaches `normalize`, which has to give it weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Where a tile of logits lies. Query positions are aligned with the last key: the last query is at `n_keys - 1`."""

    rows: Tensor  # (nq,) positions of the queries, counted in keys
    cols: Tensor  # (nk,) positions of the keys
    n_keys: int  # all keys of the call, not of the tile
    n_queries: int
    causal: bool
    queries: Tensor | None = None  # (B, H, nq, D) the rows' queries as engines have them, for `normalize`
    first: tuple[int, int] | None = None  # `rows[0]` and `cols[0]`, where both are runs of neighbours


class Scoring(Protocol):
    """Logits of a tile, and weights from whole rows of logits."""

    #: True where `normalize` is the softmax over keys: engines may then merge partial rows or fuse.
    is_softmax: bool

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        """`q (B, H, nq, D)` against `k (B, H, nk, D)`, heads already matched; unmasked."""

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        """Weights of rows of masked logits; 0 where a logit is -inf, and a row of zeros where all are."""

    def score_macs(self, width: int) -> int:
        """Multiply-adds in the logit of one pair, where queries have `width` channels: for plans."""


def dot_product(q: Tensor, k: Tensor, scale: float) -> Float[Tensor, "b h q k"]:
    return (q * scale) @ k.transpose(-1, -2)


def safe_softmax(logits: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Softmax over the last axis whose rows of `-inf` alone are zeros, also in the gradient."""
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


class SoftmaxScoring:
    """Scaled dot products and a softmax over the keys: the attention that everything else is compared with."""

    is_softmax = True

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        return dot_product(q, k, scale)

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        return safe_softmax(logits)

    def score_macs(self, width: int) -> int:
        return width


SOFTMAX = SoftmaxScoring()
