"""The family of dense operators: every query meets every key, with a score and a normaliser of the mechanism's own."""

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
    """Dense attention. A system overrides one or more of four hooks:

    `prepare` folds the mechanism into q and k (a temperature), `values` into v (a gate): fused kernels still serve.
    `score` gives the logits of a tile; `normalize` turns rows of masked logits into weights.

    The base brings masking, causality, chunks of O(N) memory forward and backward, streaming and weights.

    Four more are for systems that need them: `select` (a window by place), `context` (named tensors for `score` and
    `normalize`, such as a call's `inputs`), `is_plain` (options under which the fused kernels do) and `score_macs`
    (the cost of a score).
    """

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as they enter the dot products; `positions (Nq,)` are the queries', the last one at `Nk - 1`.

        Must treat tokens one by one: what becomes of a key may not depend on the other keys or on the queries. Keys and
        values that the caller's mask hides from every query arrive as zeros.
        """
        return q, k

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        """Logits of a tile, unmasked; heads of q and k already match. `-inf` is allowed: not to be seen."""
        return dot_product(q, k, scale)

    def normalize(self, logits: Tensor, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        """Weights of rows of logits, in which `-inf` marks what may not be seen and has to get weight 0."""
        return safe_softmax(logits)

    def select(self, n_queries: int, n_keys: int, device: torch.device) -> Selection | None:
        """Which keys a query sees by its place alone, where that is not all of them: the rest is skipped."""
        return None

    def context(self, q: Tensor, k: Tensor, mask: Tensor | None, **inputs: Tensor) -> dict[str, Tensor]:
        """What `score` and `normalize` get by name: the call's inputs, or what is made of them and of the mask.

        Whole tensors, made once for a call; a tile cuts them by `at.rows` and `at.cols`. No gradient reaches them.
        """
        return inputs

    def score_macs(self, width: int) -> int:
        """Multiply-adds in the score of one pair; `width` is that of the queries that `prepare` gives."""
        return width

    @property
    def is_plain(self) -> bool:
        """Whether this is, as built, the softmax over scaled dot products of what `prepare` gives."""
        return type(self).score is Scored.score and type(self).normalize is Scored.normalize

    @final
    def scoring(self, **context: Tensor) -> Scoring:
        """`score` and `normalize` as engines see them: the shared softmax where that is what they are."""
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
        """The call with q and k as they are scored, and with the mechanism's scoring and selection."""
        q, k, mask = call.q, call.k, call.mask
        scoring = self.scoring(**self.context(q, k, mask, **call.inputs))
        selection = self.select(call.n_queries, call.n_keys, q.device)
        if type(self).prepare is not Scored.prepare:
            positions = torch.arange(call.n_keys - call.n_queries, call.n_keys, device=q.device)
            q, k = self.prepare(q, masks.without_hidden(k, mask), positions)
        return replace(call, q=q, k=k, selected=selection, scoring=scoring)


class _Hooks:
    """A `Scored` operator's hooks in the form that engines ask for."""

    def __init__(self, op: Scored, context: dict[str, Tensor]) -> None:
        self.op, self.context = op, context
        self.is_softmax = type(op).normalize is Scored.normalize
        self.parameters, self.score_macs = op.parameters, op.score_macs

    def logits(self, q: Tensor, k: Tensor, scale: float, at: Tile) -> Tensor:
        return self.op.score(q, k, scale, at, **self.context)

    def normalize(self, logits: Tensor, at: Tile) -> Tensor:
        return self.op.normalize(logits, at, **self.context)
