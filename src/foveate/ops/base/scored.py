"""The family of dense operators: every query scores every key, with the mechanism's own score and normalizer."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.engines import reference
from foveate.core.scoring import SOFTMAX, Scoring, Tile, dot_product, safe_softmax
from foveate.core.selection import Selection
from foveate.ops.base.kv_cached import Cached
from foveate.ops.operator import Operator


class Scored(Cached):
    """Dense attention. Subclasses override one or more of four hooks:

    `prepare` folds the mechanism into q and k (a temperature), `values` into v (a gate): fused kernels still apply.
    `score` returns the logits of a tile; `normalize` turns rows of masked logits into weights.

    The base handles masking, causality, chunks of O(N) memory forward and backward, streaming and weights.

    Four more are optional: `select` (a window by position), `context` (named tensors for `score` and `normalize`, such
    as a call's `inputs`), `is_plain` (the options that reduce to softmax, for the fused kernels) and `score_macs`
    (the cost of a score).
    """

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k for the dot products; `positions (Nq,)` belong to the queries, the last one is `Nk - 1`.

        It must treat tokens one by one: a prepared key may not depend on other keys or on queries. Keys and values that
        the caller's mask hides from every query arrive as zeros.
        """
        return q, k

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        """Return the unmasked logits of a tile; heads of q and k already match. `-inf` forbids a pair."""
        return dot_product(q, k, scale)

    def normalize(self, logits: Tensor, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        """Return the weights of rows of logits; `-inf` marks forbidden pairs, whose weight has to be 0."""
        return safe_softmax(logits)

    def select(self, n_queries: int, n_keys: int, device: torch.device) -> Selection | None:
        """Return the keys that a query sees by its position alone, or None for all. The others are skipped."""
        return None

    def context(self, q: Tensor, k: Tensor, mask: Tensor | None, **inputs: Tensor) -> dict[str, Tensor]:
        """Return named tensors for `score` and `normalize`: the call's inputs, or tensors made from them and the mask.

        They are whole tensors, made once for a call; a tile cuts them by `at.rows` and `at.cols`. They get no gradient.
        """
        return inputs

    def score_macs(self, width: int) -> int:
        """Return the multiply-adds in the score of one pair; `width` counts the channels of prepared queries."""
        return width

    @property
    def is_plain(self) -> bool:
        """True if the scores are scaled dot products of prepared q and k, and the weights their softmax."""
        return type(self).score is Scored.score and type(self).normalize is Scored.normalize

    @final
    def scoring(self, **context: Tensor) -> Scoring:
        """Return `score` and `normalize` for engines, or the shared softmax scoring if they equal it."""
        return SOFTMAX if self.is_plain else _Hooks(self, context)

    def _prepared(self, call: AttentionCall) -> AttentionCall:
        scored = self._scored(call)
        if type(self).values is Operator.values:
            return scored
        return replace(scored, v=self.values(masks.without_hidden(call.v, call.mask)))

    @final
    def _weights(self, call: AttentionCall) -> Tensor:
        return reference.weights(self._scored(call))

    def _scored(self, call: AttentionCall) -> AttentionCall:
        """Return the call with prepared q and k, and with the mechanism's scoring and selection."""
        q, k, mask = call.q, call.k, call.mask
        scoring = self.scoring(**self.context(q, k, mask, **call.inputs))
        selection = self.select(call.n_queries, call.n_keys, q.device)
        if type(self).prepare is not Scored.prepare:
            positions = torch.arange(call.n_keys - call.n_queries, call.n_keys, device=q.device)
            q, k = self.prepare(q, masks.without_hidden(k, mask), positions)
        return replace(call, q=q, k=k, selected=selection, scoring=scoring)


class _Hooks:
    """A `Scored` operator's hooks, as a `Scoring` for engines."""

    def __init__(self, op: Scored, context: dict[str, Tensor]) -> None:
        self.op, self.context = op, context
        self.is_softmax = type(op).normalize is Scored.normalize
        self.parameters, self.score_macs = op.parameters, op.score_macs

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Tensor:
        return self.op.score(q, k, scale, at, **self.context)

    def normalize(self, logits: Tensor, at: Tile) -> Tensor:
        return self.op.normalize(logits, at, **self.context)
