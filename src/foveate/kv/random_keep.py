"""Random eviction: the floor that every policy has to beat. No paper: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.host.site import Site
from foveate.kv.base.scored import ScorePolicy, own_positions


@final
@dataclass(eq=False)
class RandomKeep(ScorePolicy):
    """A token's score is drawn at random, for each layer and head; a token keeps its score, whatever batch it is in.

    Args:
        seed: of the draw.
        share, sink, recent, heads, safeguard, every, layers: see `ScorePolicy`.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.count("seed", self.seed)

    def score(self, site: Site) -> Float[Tensor, "b hkv s"]:
        own, _ = own_positions(site)
        heads = torch.arange(own.shape[1], device=own.device)[:, None]
        # a hash of position, head, layer and seed: no generator, so that the order of calls does not matter
        mixed = (
            own.long() * 2654435761 + heads * 40503 + site.layer * 2246822519 + self.seed * 3266489917
        ) & 0xFFFFFFFF
        mixed = ((mixed >> 15) ^ mixed) * 2246822519 & 0xFFFFFFFF
        mixed = ((mixed >> 13) ^ mixed) * 3266489917 & 0xFFFFFFFF
        return ((mixed >> 16) ^ mixed).float() / 2**32
