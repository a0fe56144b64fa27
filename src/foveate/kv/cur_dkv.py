"""CurDKV: tokens whose keys and values stand out among their neighbours stay.

Value-Guided KV Compression for LLMs via Approximated CUR Decomposition (2025), arXiv 2509.15038.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions


@final
@dataclass(eq=False)
class CurDKV(ScorePolicy):
    """A token's score is the product of the squared lengths of its key and its value, each as a share of its window's.

    Squared lengths stand for the leverage scores of a CUR decomposition of keys and values. Cost: O(S D) for each head,
    no query and no attention weights. The wrong choice where a question is at hand that says what matters.

    Args:
        kind: what scores: "product", "key", "value", or "mean" of both.
        window: tokens in a window, counted from the sequence's start; None compares all tokens.
        projection: width of a random projection of keys and values before their lengths are taken (20 in the paper's
            form with random leverage); None for no projection.
        seed: of the projection.
        share, sink, recent, heads, safeguard, threshold, limit, every, layers: see `ScorePolicy`.
    """

    kind: Literal["product", "key", "value", "mean"] = "product"
    window: int | None = 16
    projection: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("kind", self.kind, ("product", "key", "value", "mean"))
        for name in ("window", "projection"):
            if getattr(self, name) is not None:
                validate.count(name, getattr(self, name), 1)
        validate.count("seed", self.seed)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        own, _ = own_positions(site)
        heads = own.repeat_interleave(site.k.shape[1] // own.shape[1], 1)
        k, v = self._shares(site.k.float(), heads), self._shares(site.v.float(), heads)
        score = {"product": lambda: k * v, "key": lambda: k, "value": lambda: v, "mean": lambda: (k + v) / 2}[
            self.kind
        ]()
        return score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)

    def _shares(self, x: Float[Tensor, "b h s d"], own: Tensor) -> Float[Tensor, "b h s"]:
        """Return the squared length of each token, as a share of the squared lengths of its window."""
        if self.projection is not None:
            draw = torch.Generator().manual_seed(self.seed)
            x = x @ (torch.randn(x.shape[-1], self.projection, generator=draw) / math.sqrt(self.projection)).to(x)
        square = x.square().sum(-1).masked_fill(own < 0, 0.0)
        if self.window is None:
            return square
        windows = own.clamp_min(0).long() // self.window
        total = square.new_zeros(*square.shape[:2], int(own.shape[2] and windows.max()) + 1)
        total.scatter_add_(2, windows, square)
        return square / total.gather(2, windows).clamp_min(torch.finfo(square.dtype).tiny)
