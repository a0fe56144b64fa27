"""Statistics of a text's queries from before their rotary embedding, and keys as future queries see them on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.host import Host
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.kv.renumbered import Rotation, rotations


def add_queries(notes: dict[str, Any], site: Site, rotation: Rotation | None, first: int) -> None:
    """Add the queries of a call to the statistics in `notes`, which have one size for any length of text.

    Queries are rotated back to position 0. Each sequence counts its own tokens, from number `first` on. Tokens that
    will be removed again do not count.

    Args:
        notes: gets `count (B, 1, 1, 1)`, `mean (B, Hq, 1, D)` and `spread (B, Hq, D, D)`, the sum of the products of
            deviations from the mean.
        site: the call.
        rotation: the rotation of the layer's queries and keys; None if they do not rotate.
        first: tokens at the start of a sequence that are left out.
    """
    n = site.q.shape[2] - site.tentative
    at = torch.arange(site.seen - n, site.seen, device=site.q.device).expand(site.q.shape[0], 1, n)
    found = tokens(site)
    own = at if found is None else found.own(at)
    q = site.q[:, :, :n].to(torch.promote_types(site.q.dtype, torch.float32))
    q = q if rotation is None else rotation(q, -own.clamp_min(0))
    left_out = (own < first)[..., None]
    count = (~left_out).sum(2, keepdim=True)
    mean = q.masked_fill(left_out, 0.0).sum(2, keepdim=True) / count.clamp_min(1)
    deviation = (q - mean).masked_fill(left_out, 0.0)
    spread = deviation.mT @ deviation
    if "mean" in notes:
        before, shift = notes["count"], mean - notes["mean"]
        part = count / (before + count).clamp_min(1)
        mean = notes["mean"] + part * shift
        spread = notes["spread"] + spread + part * before * (shift.mT @ shift)
        count = before + count
    notes.update(count=count, mean=mean, spread=spread)


@dataclass(frozen=True, eq=False)
class Future:
    """The average rotation of the queries at the next positions: each pair of channels turns by an angle and shrinks.

    A sum of rotations of a pair is a complex number; its angle and its length are those of the average.

    Args:
        rotation: the rotation of the layer's queries and keys.
        turn: the rotation by the average's angles.
        length: the factor by which each rotating channel shrinks.
    """

    rotation: Rotation
    turn: Rotation
    length: Float[Tensor, " m"]

    @classmethod
    def of(cls, rotation: Rotation, positions: int | Tensor) -> Future:
        """Average the rotations over the next positions: over a number of them, or over given ones, 0 for the next."""
        device = rotation.angles.device
        at = positions.to(device) if isinstance(positions, Tensor) else torch.arange(positions, device=device)
        angle = at[:, None] * rotation.angles.double()
        mean = torch.polar(torch.ones_like(angle), angle).mean(0)
        length = mean.abs().float()
        length = length.repeat_interleave(2) if rotation.neighbours else torch.cat([length, length])
        return cls(rotation, Rotation(mean.angle().float(), rotation.neighbours), length)

    def keys(self, k: Float[Tensor, "b h s d"], count: Int[Tensor, " b"]) -> Float[Tensor, "b h s d"]:
        """Return keys whose product with a query from before the embedding is the average future one.

        Args:
            k: keys after the embedding.
            count: tokens of each sequence so far; the next position is that number.
        """
        back = self.rotation(k.float(), -count[:, None, None])
        back = self.turn(back, back.new_full((1, 1, 1), -1))
        n = self.length.shape[0]
        return torch.cat([back[..., :n] * self.length.to(k.device), back[..., n:]], -1)

    def shrunk(self, q: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Return queries as long as their average future ones; angles stay."""
        n = self.length.shape[0]
        return torch.cat([q[..., :n] * self.length.to(q.device), q[..., n:]], -1)


def futures(host: Host, positions: int | Tensor) -> dict[int, Future | None]:
    """Return the average rotation over the next positions for each layer of a model; None for keys that do not rotate.

    Raises:
        UnsupportedModel: the model's keys do not rotate by fixed angles.
    """
    found = rotations(host)
    average = {rotation: Future.of(rotation, positions) for rotation in set(found.values()) if rotation}
    return {layer: average[rotation] if rotation else None for layer, rotation in found.items()}
