"""The family of sparse operators: select a few keys cheaply, then attend to exactly those."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.call import AttentionCall
from foveate.core.selection import Selection
from foveate.ops.base.kv_cached import Cached


class Selective(Cached):
    """Exact softmax attention over selected keys. Subclasses define only `select`.

    The base intersects the selection with causality and the caller's mask and runs the cheapest engine. No engine but
    "reference", which serves tests, computes dense logits.
    """

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection | None:
        """Return the keys that each of `q (B, Hq, Nq, D)` sees among `k (B, Hkv, Nk, D)`, aligned at the last key.

        None is for calls in which choosing does not pay: every query sees every key. With `causal` the selection may
        include the future, but it may not depend on it, except within a group of `Capabilities.selection_group`
        queries. Keys that the caller's mask hides from every query arrive as zeros.
        """

    @final
    @torch.no_grad()
    def selection(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection | None:
        """Call `select` without a gradient, since the choice of keys is not differentiated."""
        return self.select(q.detach(), k.detach(), causal, scale)

    @final
    def _prepared(self, call: AttentionCall) -> AttentionCall:
        k = masks.without_hidden(call.k, call.mask)
        chosen = self.selection(call.q, k, call.causal, call.scale)
        return replace(call, selected=None if chosen is None else chosen.for_heads(call.q.shape[1]))
