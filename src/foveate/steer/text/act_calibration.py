"""ACT: reduce the weight of attention sinks after the first, in chosen heads, while the prompt is read.

Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration (2024), arXiv 2406.15765. Paper and release differ: a sink is a key that receives more than
`alpha / N` in the paper, more than 0.1 in the release (`variant`). The release calibrates only the first sequence of a
batch, and a row that sees only sinks becomes NaN. Here every sequence is calibrated, and such a row stays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.steer.parts.head_table import Heads, checked_heads, described, head_table

Example = TypeVar("Example")

#: The release's constant threshold of a sink.
RELEASE = 0.1


@final
@dataclass(eq=False)
class ActCalibration(Method):
    """A method that scales down the sinks after the first, in the chosen heads, and scales up the other keys.

    Nothing is trained, and only the prompt is calibrated: decoding continues from its states. Layers with a chosen head
    do not use the fused kernel while the prompt is read, which takes O(N²) memory. Not every sink is harmful: without
    heads from `act_search` the method may lower accuracy. As in the paper, few queries judge the last few keys.

    Args:
        heads: the heads to calibrate, from `act_search`: a bool table `(layers, heads)`, pairs `(layer, head)`, or
            `{layer: heads}`. None is every head except those of the first two layers and the last.
        beta: the share of its weight that a sink keeps; 1 leaves the model unchanged.
        alpha: a key is a sink if it receives more than `alpha / N`, averaged over the queries that see it.
        variant: "paper", or "release" with the constant threshold 0.1 instead of `alpha / N`.
    """

    heads: Heads = None
    beta: float = 0.4
    alpha: float = 5.0
    variant: Literal["paper", "release"] = "paper"
    _chosen: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.beta, self.alpha, self.threshold)
        validate.one_of("variant", self.variant, ("paper", "release"))
        self.heads = checked_heads(self.heads)

    @property
    def threshold(self) -> float | Literal["alpha/N"]:
        return RELEASE if self.variant == "release" else "alpha/N"

    def bind(self, host: Host) -> None:
        self._chosen = _table(self.heads, host)

    def at(self, site: Site) -> bool:
        reads = site.phase == "prefill" and site.is_causal
        return reads and self.beta < 1 and bool(self._chosen[site.layer].any())

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        heads = self._chosen[site.layer].to(weights.device)
        return calibrate_sinks(weights, heads, self.beta, self.threshold, self.alpha, seen=_seen(site))


def calibrate_sinks(
    attn: Float[Tensor, "b h q k"],
    heads: Bool[Tensor, " h"] | Sequence[int] | None = None,
    beta: float = 0.4,
    thr: float | Literal["alpha/N"] = "alpha/N",
    alpha: float = 5.0,
    keep_first: bool = True,
    *,
    seen: Bool[Tensor, "#b #h q k"] | None = None,
) -> Float[Tensor, "b h q k"]:
    """Scale down the sinks of some heads, and distribute the freed weight over the other keys.

    Args:
        attn: weights whose rows sum to 1.
        heads: the heads, as a bool tensor or as indices; None is all.
        beta: the share of its weight that a sink keeps.
        thr: a key is a sink if its mean received weight exceeds this number, or "alpha/N" with N the visible keys.
        alpha: the factor in "alpha/N".
        keep_first: leave the first of each head's sinks, at any position, unchanged.
        seen: the visible pairs, `(B, 1 or H, Nq, Nk)`; None is a causal mask, aligned at the last key.
    """
    _check(beta, alpha, thr)
    if not isinstance(attn, Tensor) or attn.dim() != 4 or not attn.is_floating_point():
        raise ShapeError(f"attn must be weights (B, H, Nq, Nk); got {described(attn)}")
    if seen is None:
        seen = masks.causal(attn.shape[2], attn.shape[3], device=attn.device)[None, None]
    index = _indices(heads, attn.shape[1], attn.device)
    some = attn[:, index].to(torch.promote_types(attn.dtype, torch.float32))
    sinks = find_sinks(some, thr, alpha, seen=seen[:, index] if seen.shape[1] > 1 else seen)
    if keep_first:
        sinks = sinks & (sinks.cumsum(-1) > 1)
    return attn.index_copy(1, index, _calibrate(some, sinks, beta).to(attn.dtype))


def find_sinks(
    attn: Float[Tensor, "b h q k"], thr: float | Literal["alpha/N"], alpha: float, *, seen: Bool[Tensor, "#b #h q k"]
) -> Bool[Tensor, "b h k"]:
    """Mark the keys that receive more than the threshold, averaged over the queries that see them."""
    rows = seen.sum(-2)
    strength = (attn * seen).sum(-2) / rows.clamp_min(1)
    limit = alpha / (rows > 0).sum(-1, keepdim=True).clamp_min(1) if thr == "alpha/N" else thr
    return strength > limit


def act_search(
    model: object,
    calibration_set: Sequence[Example],
    score: Callable[[Any, Example], float],
    *,
    beta: float = 0.4,
    alpha: float = 5.0,
    variant: Literal["paper", "release"] = "paper",
    candidates: Heads = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Bool[Tensor, "l h"]:
    """Find the heads `(layers, heads)` whose calibration, one at a time, raises the mean score on a small set.

    Cost: one run of the set per candidate; the paper uses about a thousand examples. Heads found on one task also serve
    similar tasks.

    Args:
        model: a decoder.
        calibration_set: examples of any type.
        score: `score(model, example)`, such as 1.0 for a right answer and 0.0 for a wrong one.
        beta, alpha, variant: see `ActCalibration`.
        candidates: the heads to try, as in `ActCalibration`, with the same default.
        progress: called as `progress(done, total, note)` after each head.
    """
    if not calibration_set:
        raise OptionError("calibration_set must hold at least one example; got none")
    target = host(model)
    table = _table(candidates, target)

    def accuracy(heads: list[tuple[int, int]]) -> float:
        with torch.no_grad(), apply(target.model, ActCalibration(heads, beta, alpha, variant)):
            return sum(float(score(target.model, example)) for example in calibration_set) / len(calibration_set)

    found, base = torch.zeros_like(table), accuracy([])
    pairs = table.nonzero().tolist()
    for done, (layer, head) in enumerate(pairs, start=1):
        own = accuracy([(layer, head)])
        found[layer, head] = own > base
        if progress is not None:
            progress(done, len(pairs), f"layer {layer}, head {head}: {own:.3f}, without {base:.3f}")
    return found


def _calibrate(attn: Tensor, sinks: Bool[Tensor, "b h k"], beta: float) -> Tensor:
    """Scale sinks by `beta` and the other keys up by the freed weight; rows with only sinks stay unchanged."""
    on_sinks = attn * sinks[:, :, None]
    others = attn - on_sinks
    rest = others.sum(-1, keepdim=True)
    freed = (1 - beta) * on_sinks.sum(-1, keepdim=True)
    raised = others * (1 + freed / rest.clamp_min(torch.finfo(attn.dtype).tiny))
    return torch.where(rest > 0, beta * on_sinks + raised, attn)


def _seen(site: Site) -> Bool[Tensor, "b h q k"]:
    """Return the pairs that the mask of a site allows, without rows of padding."""
    b, _, n, _ = site.q.shape
    mask = site.mask
    if mask is None:
        seen = torch.ones(b, 1, n, site.k.shape[2], dtype=torch.bool, device=site.q.device)
    else:
        seen = masks.allowed(mask)
    return seen if site.real_queries is None else seen & site.real_queries[:, None, :, None]


def _table(heads: Heads, host: Host) -> Bool[Tensor, "l h"]:
    """Convert chosen heads from any form to a table; without a choice, all but those of the outer layers."""
    table = head_table(heads, host)
    if heads is None:
        table[:2], table[-1:] = False, False
    return table


def _indices(heads: Tensor | Sequence[int] | None, count: int, device: torch.device) -> Tensor:
    """Convert chosen heads of a layer to indices."""
    if heads is None:
        return torch.arange(count, device=device)
    index = torch.as_tensor(heads, device=device)
    if index.dtype == torch.bool:
        if tuple(index.shape) != (count,):
            raise ShapeError(f"heads must be bools (H,)=({count},) or indices; got {described(index)}")
        return index.nonzero().squeeze(-1)
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < count):
        raise OptionError(f"heads={index.tolist()} must be in 0..{count - 1}")
    return index.long().flatten()


def _check(beta: float, alpha: float, thr: float | str) -> None:
    validate.between("beta", beta, 0.0, 1.0)
    validate.at_least("alpha", alpha, 0.0)
    if thr != "alpha/N":
        validate.at_least("thr", thr, 0.0)
