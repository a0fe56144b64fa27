"""The family of sparse operators: select a few keys cheaply, then attend to exactly those."""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.call import Problem
from foveate.core.engines import reference
from foveate.core.selection import Selection
from foveate.ops.base.kv_cached import Cached


class Selective(Cached):
    """Exact softmax attention over selected keys. A system writes `select`, and nothing else.

    The base intersects the selection with causality and the caller's mask and runs it on whichever engine is cheapest;
    it never computes dense logits on the way (the engine "reference" does, for tests).
    """

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        """Which keys each query sees. `q (B, Hq, Nq, D)`, `k (B, Hkv, Nk, D)`; the last query is at the last key.

        With `causal` the selection need not leave out the future, but it may not be steered by it, except within a
        group of `grain` queries. Keys that the caller's mask hides from every query arrive as zeros.
        """

    @final
    @torch.no_grad()
    def selection(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Selection:
        """`select` without a gradient: the choice of keys is not differentiated."""
        return self.select(q.detach(), k.detach(), causal, scale)

    def _problem(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Problem:
        selection = self.selection(q, masks.without_hidden(k, mask), causal, scale)
        return Problem(q, k, v, scale, mask, causal, selection=selection)

    @final
    def _weights(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, **inputs: Tensor
    ) -> Tensor:
        return reference.weights(self._problem(q, k, k, mask, causal, scale))
