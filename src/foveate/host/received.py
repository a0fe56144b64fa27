"""The attention that each token of a call receives, in linear memory."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.engines.fused import FEW
from foveate.host.fused_statistics import Statistics
from foveate.host.site import Site
from foveate.host.weight_tiles import tiles


def received_mass(site: Site) -> Float[Tensor, "b hq s"]:
    """Return the mass that each slot receives in a call: its column sum of attention weights, without padding's rows.

    Beside the fused kernel this costs two more attentions, and the matrix is never made. Windows, soft caps, evicted
    layers and calls of few queries take the weights, a few rows at a time. To be called after attention.
    """
    call = Statistics.of(site) if site.q.shape[2] > FEW else None
    if call is not None:
        return call.received
    dtype = torch.promote_types(site.q.dtype, torch.float32)
    mass = site.q.new_zeros(*site.q.shape[:2], site.k.shape[2], dtype=dtype)
    for tile in tiles(site):
        mass[..., tile.keys] += tile.weights.sum(-2)
    return mass
