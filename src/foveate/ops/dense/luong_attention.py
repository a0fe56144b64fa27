"""Luong's global and local attention over a source sentence.

Effective Approaches to Attention-based Neural Machine Translation (2015), arXiv 1508.04025.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.scoring import Tile, dot_product, safe_softmax
from foveate.ops.base.scored import Scored
from foveate.ops.functional import local_window
from foveate.ops.functional.additive_score import pair_score


@final
class LuongAttention(Scored):
    """A decoder's states (q) attend to a source sentence's states (k and v), to all or to a window of `2 window + 1`.

    Cost O(Nq Nk D); "dot" and "general" in "global" mode run on fused kernels, "concat" holds `Nq Nk hidden` numbers. A
    window masks the keys outside it and saves no time here, since sentences are short. "local_m" suits sentences whose
    order the translation roughly keeps, "local_p" those whose reordering is regular; the wrong choice inside a causal
    decoder. k is a finished sentence, so it defines no causal call, even if `Nq = Nk`.

    Args:
        head_dim: D of the calls to come.
        score: "dot" `h . s`, "general" `h W s`, "concat" `v . tanh(W [h; s])`, or "location" `(W h)_s`, which reads no
            key. The call's scale multiplies all of them and is 1 by default.
        mode: "global"; "local_m": the window is centred at the query's own position; "local_p": at `S sigmoid(v .
            tanh(W h))` for S real keys, and weights are multiplied by a Gaussian with that centre and deviation
            `window / 2`, so that they sum to less than 1.
        window: keys to either side, the paper's D.
        heads: Hq of the calls to come; the paper has one head.
        hidden: hidden width under the tanh; None for D.
        max_keys: positions that a "location" score covers; it ignores keys beyond them.
        gaussian: False removes the Gaussian of "local_p".

    Positions count real keys from 0 on (the paper's from 1), so calls have to mask padding, on either side. In mode
    "local_m" a call may bring the queries' own positions as `t`, int `(Nq,)`; by default they are 0, 1, 2 …

    Weights start uniformly in ±0.1, as in the paper. The paper recommends "dot" with "global" and "general" with
    "local_p"; "location" is for "global" only.
    """

    capabilities = replace(
        Scored.capabilities,
        patterns=frozenset({"self", "cross"}),
        masks=frozenset({"keys"}),
        streaming=None,
        default_scale=1.0,
    )

    def __init__(
        self,
        head_dim: int,
        score: Literal["dot", "general", "concat", "location"] = "dot",
        mode: Literal["global", "local_m", "local_p"] = "global",
        *,
        window: int = 10,
        heads: int = 1,
        hidden: int | None = None,
        max_keys: int | None = None,
        gaussian: bool = True,
    ) -> None:
        super().__init__()
        hidden = head_dim if hidden is None else hidden
        for name, value in {"head_dim": head_dim, "window": window, "heads": heads, "hidden": hidden}.items():
            validate.count(name, value, 1)
        validate.one_of("score", score, ("dot", "general", "concat", "location"))
        validate.one_of("mode", mode, ("global", "local_m", "local_p"))
        validate.one_of("gaussian", gaussian, (True, False))
        if (max_keys is None) == (score == "location"):
            raise OptionError(f'max_keys={shown(max_keys)} must come with score="location", and only with it')
        if score == "location" and mode != "global":
            raise OptionError(f'score="location" must come with mode="global"; got mode={mode!r}')
        self.kind, self.mode, self.window, self.gaussian = score, mode, window, gaussian
        self.heads, self.head_dim = heads, head_dim
        if score == "general":
            self.w_score = _weight(heads, head_dim, head_dim)
        elif score == "concat":
            self.w_query, self.w_key = _weight(heads, head_dim, hidden), _weight(heads, head_dim, hidden)
            self.v_score = _weight(heads, hidden)
        elif max_keys is not None:
            validate.count("max_keys", max_keys, 1)
            self.w_score = _weight(heads, head_dim, max_keys)
        if mode == "local_p":
            self.w_place, self.v_place = _weight(heads, head_dim, hidden), _weight(heads, hidden)
        if mode == "local_m":
            self._declare(inputs=frozenset({"t"}))

    @property
    def is_plain(self) -> bool:
        return self.mode == "global" and self.kind in ("dot", "general")

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if (q.shape[1], q.shape[3]) != (self.heads, self.head_dim):
            raise ShapeError(
                f"built for {self.heads} heads of width {self.head_dim}; got H={q.shape[1]}, D={q.shape[3]}"
            )
        return (q @ self.w_score.to(q), k) if self.is_plain and self.kind == "general" else (q, k)

    def score(self, q: Tensor, k: Tensor, scale: float, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        place = context["place"][:, None, None, at.cols]
        if self.kind == "location":
            last = self.w_score.shape[2] - 1
            logits = scale * (q @ self.w_score.to(q)).gather(-1, place.clamp(0, last).expand(*q.shape[:3], -1))
            return logits.masked_fill(place > last, masks.NEG_INF)
        if self.kind == "concat":
            logits = scale * pair_score(q @ self.w_query.to(q), k @ self.w_key.to(q), self.v_score.to(q))
        else:
            logits = dot_product(q @ self.w_score.to(q) if self.kind == "general" else q, k, scale)
        if self.mode == "global":
            return logits
        return local_window.cut(logits, place, self.centre(q, at, **context), self.window)

    def score_macs(self, width: int) -> int:
        return self.v_score.shape[-1] if self.kind == "concat" else width

    def normalize(self, logits: Tensor, at: Tile, **context: Tensor) -> Float[Tensor, "b h q k"]:
        weights = safe_softmax(logits)
        if self.mode != "local_p" or not self.gaussian:
            return weights
        assert at.queries is not None
        place = context["place"][:, None, None, at.cols]
        bell = local_window.log_bell(place, self.centre(at.queries, at, **context), self.window / 2)
        return weights * bell.exp().to(weights)

    def centre(self, q: Tensor, at: Tile, place: Tensor, length: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the centre of each query's window, `(nq, 1)` or `(B, H, nq, 1)`."""
        if self.mode == "local_m":
            row = at.rows - (at.n_keys - at.n_queries)
            return (row if t is None else t[row])[:, None]
        return local_window.predicted(q, self.w_place, self.v_place, length[..., None, None])

    def context(self, q: Tensor, k: Tensor, mask: Tensor | None, **inputs: Tensor) -> dict[str, Tensor]:
        t = inputs.get("t")
        if t is not None and (t.is_floating_point() or t.shape != q.shape[2:3]):
            raise ShapeError(f"t must be int (Nq,)=({q.shape[2]},); got {t.dtype} {tuple(t.shape)}")
        place, length = local_window.places(mask, q.shape[0], k.shape[2], k.device)
        return {"place": place, "length": length, **inputs}

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(head_dim, "general", "local_p", window=max(1, length // 4), heads=heads)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self:
        return cls(head_dim, heads=heads)


def alignment_error_rate(
    weights: Float[Tensor, "... t s"], sure: Bool[Tensor, "... t s"], possible: Bool[Tensor, "... t s"] | None = None
) -> float:
    """Return the alignment error rate of attention, `1 - (|A & S| + |A & P|) / (|A| + |S|)`, 0 at best.

    A links each target word to the source word of its largest weight; a word without any weight has no link. S and P
    are a person's sure and possible links.

    Args:
        weights: `(..., T, S)`, of any number of sentences of equal size; padded rows are zero.
        sure: links that A has to contain.
        possible: links that A may contain; sure links are always possible.
    """
    if sure.shape != weights.shape or (possible is not None and possible.shape != weights.shape):
        raise ShapeError(f"links must be of the weights' shape {tuple(weights.shape)}; got {tuple(sure.shape)}")
    best = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, weights.argmax(-1, keepdim=True), True)
    drawn = best & (weights.amax(-1, keepdim=True) > 0)
    may = sure if possible is None else sure | possible
    total = drawn.sum() + sure.sum()
    return 1.0 - ((drawn & sure).sum() + (drawn & may).sum()).item() / max(int(total), 1)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-0.1, 0.1))
