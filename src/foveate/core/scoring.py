"""Scorings make logits and turn them into weights: the part of attention that a dense mechanism may replace.

Engines compute in tiles: they ask a `Scoring` for the logits of a tile and for the weights of rows. A forbidden pair
reaches `normalize` as `-inf`, and `normalize` has to give it weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """The position of a tile of logits. Query positions align with the last key: the last query is at `n_keys - 1`."""

    rows: Tensor  # (nq,) positions of the queries, counted in keys
    cols: Tensor  # (nk,) positions of the keys
    n_keys: int  # all keys of the call, not of the tile
    n_queries: int
    causal: bool
    queries: Tensor | None = None  # (B, H, nq, D) the rows' queries, for `normalize`
    first: tuple[int, int] | None = None  # `rows[0]` and `cols[0]`, if both are contiguous


class Scoring(Protocol):
    """A rule for the logits of a tile and for the weights of whole rows of logits."""

    @property
    def is_softmax(self) -> bool:
        """Return True if `normalize` is the softmax over keys: engines may then merge partial rows or fuse."""

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        """Return the unmasked logits of `q (B, H, nq, D)` and `k (B, H, nk, D)`, whose heads match."""

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        """Return the weights of rows of masked logits: 0 where a logit is -inf, and a row of zeros if all are."""

    def score_macs(self, width: int) -> int:
        """Return the multiply-adds in the logit of one pair, for queries of `width` channels; plans use it."""


def dot_product(q: Float[Tensor, "... q d"], k: Float[Tensor, "... k d"], scale: float) -> Float[Tensor, "... q k"]:
    return (q * scale) @ k.transpose(-1, -2)


def safe_softmax(logits: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """Return the softmax over the last axis; a row of only `-inf` gives zeros, also in the gradient."""
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


class SoftmaxScoring:
    """The scoring of standard attention: scaled dot products and a softmax over the keys."""

    is_softmax = True

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Float[Tensor, "b h q k"]:
        return dot_product(q, k, scale)

    def normalize(self, logits: Tensor, at: Tile) -> Float[Tensor, "b h q k"]:
        return safe_softmax(logits)

    def score_macs(self, width: int) -> int:
        return width


SOFTMAX = SoftmaxScoring()
