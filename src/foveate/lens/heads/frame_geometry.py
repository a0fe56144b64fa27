"""Geometry of a reference frame: the places of a text's states around its anchor, and what the anchor does to a row.

What are you sinking? A geometric approach on attention sink (2025), arXiv 2508.02546. The frame itself is in
`foveate.lens.reference_frame`. PARTLY RECONSTRUCTED: the paper's names of the statistics are known, its formulas are
not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host.entry import apply
from foveate.host.site import Site
from foveate.lens.parts.maps import whole_map
from foveate.lens.parts.stack import ByLayer


@final
@dataclass(frozen=True, eq=False)
class FrameGeometry:
    """The geometry of one text around its anchor.

    Args:
        distance: each token's distance to the anchor's state, before each layer and after the last (there behind the
            final norm of most decoders).
        cosine: the cosine of each token's state with the anchor's.
        rank: the effective rank of the states: the exponential of the entropy of their principal variances.
        key_variance: the variance over tokens of the norms of each head's keys; heads of a group share one.
        divergence: the mean divergence in nats of a row without the anchor from the row with it; see `sink_divergence`.
    """

    distance: Float[Tensor, "l1 t"]
    cosine: Float[Tensor, "l1 t"]
    rank: Float[Tensor, " l1"]
    key_variance: Float[Tensor, "l hkv"]
    divergence: Float[Tensor, "l h"]


@torch.no_grad()
def frame_geometry(model: object, ids: Int[Tensor, "1 t"], sink: int = 0) -> FrameGeometry:
    """Read one text once, beside the model's own kernel, and measure the geometry around an anchor.

    Args:
        model: a decoder or an encoder with one stack of layers.
        ids: token ids without padding, at least 3.
        sink: the position of the anchor; a hub of `reference_frame`, for instance.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < 3:
        raise ShapeError(f"ids must be (1, T), one text of at least 3 tokens; got {shown(ids)}")
    validate.count("sink", sink)
    if sink >= ids.shape[1]:
        raise OptionError(f"sink={sink} must be a position in 0..{ids.shape[1] - 1}")
    record = _Anchored(sink)
    with apply(model, record) as run:
        cached = {"use_cache": False} if run.host.decoder is not None else {}
        out = run.host.model(ids, output_hidden_states=True, **cached)
    states = [state[0].double() for state in out.hidden_states]
    anchors = [state[sink] for state in states]
    layers = [record.found[layer] for layer in sorted(record.found)]
    return FrameGeometry(
        torch.stack([(state - anchor).norm(dim=-1) for state, anchor in zip(states, anchors, strict=True)]),
        torch.stack([F.cosine_similarity(state, anchor[None]) for state, anchor in zip(states, anchors, strict=True)]),
        torch.stack([effective_rank(state) for state in states]),
        *(torch.stack(parts) for parts in zip(*layers, strict=True)),
    )


def effective_rank(states: Float[Tensor, "t c"]) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of the principal variances' shares: 1 on a line, at most min(T - 1, C).

    States that are all equal have rank 0.
    """
    variances = torch.linalg.svdvals((states - states.mean(0)).double()).square()
    total = variances.sum()
    shares = variances / total.clamp_min(torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)


def sink_divergence(attention: Float[Tensor, "*g t t"], sink: int = 0) -> Float[Tensor, "*g"]:
    """Return the mean divergence KL(without ‖ with) in nats of rows without an anchor from the rows with it.

    A row without the anchor is divided by what is left, so that its divergence is `-log(1 - weight on the anchor)`. The
    other direction is infinite. The anchor's own row and empty rows do not count. Rows that do not see the
    anchor count as 0, and a row with all its weight on it makes the mean infinite.

    Args:
        attention: weights of one text.
        sink: the position of the anchor.
    """
    t = attention.shape[-1]
    keys = torch.arange(t, device=attention.device) != sink
    rest, on_sink = attention[..., keys].sum(-1), attention[..., sink]
    counted = keys & (rest + on_sink > 0)
    divergence = -(rest / (rest + on_sink).clamp_min(torch.finfo(rest.dtype).tiny)).log()
    total = torch.where(counted, divergence, 0.0).sum(-1)
    return total / counted.sum(-1).clamp_min(1)


@final
class _Anchored(ByLayer[tuple[Tensor, Tensor]]):
    """Record the variance of key norms and the divergence of rows from an anchor, by layer."""

    def __init__(self, sink: int) -> None:
        super().__init__("auto")
        self.sink = sink

    def record(self, site: Site) -> tuple[Float[Tensor, " hkv"], Float[Tensor, " h"]]:
        norms = site.k[0].double().norm(dim=-1)
        return norms.var(-1), sink_divergence(whole_map(site)[0].double(), self.sink)
