"""ThinK: the channels of keys that the last queries need least are not stored.

ThinK: Thinner Key Cache by Query-Driven Pruning (2024), arXiv 2407.21018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.host.slots.codec import Codec, Coding, Parts, Uncoded
from foveate.kv.base.encoding import EncodingPolicy
from foveate.kv.parts.window_queries import last_rows


@final
@dataclass(eq=False)
class ThinK(EncodingPolicy):
    """Older keys are stored with the share `kept` of their channels, and a query reads the same channels.

    A channel's score is the mean square of the last `window` queries times that of all keys: the share of the logits
    that would be lost without it. The choice is made once for each key/value head, when its first tokens are encoded:
    after the prompt, or after its first piece. Values, and the newest `residual` keys, are stored whole.

    Cost: bytes fall to `0.5 + kept / 2` of a full cache's, and no further. The wrong choice for keys whose channels are
    equally large, and for a later question that needs other channels.

    Args:
        kept: share of the channels (the paper prunes 40 %, that is, 0.6).
        window: queries that score.
        base: a policy that encodes the remaining channels and the values, such as `KIVI(bits=4)`; its residual, group,
            dense and layers then count. None stores them as they are.
        residual, group, dense, layers: see `EncodingPolicy`. The paper stores its newest 32 keys whole.

    Query heads of a key/value head are averaged, as in kvpress, which sets the channels to zero and frees no memory.
    The release stores all keys after the prompt whole; here they lose the same channels when they leave the residual.
    """

    residual: int = 32
    kept: float = 0.6
    window: int = 32
    base: EncodingPolicy | None = None

    def __post_init__(self) -> None:
        validate.between("kept", self.kept, 0.0, 1.0)
        validate.count("window", self.window, 1)
        if self.base is not None:
            if not isinstance(self.base, EncodingPolicy) or isinstance(self.base, ThinK):
                raise OptionError(
                    f"base must be a policy that quantises, such as KIVI(), or None; got {type(self.base).__name__}"
                )
            for name in ("residual", "group", "dense", "layers"):
                setattr(self, name, getattr(self.base, name))
        super().__post_init__()

    def bind(self, host: Host) -> None:
        super().bind(host)
        if self.base is not None:
            self.base.bind(host)

    def coding(self, order: int, site: Site | None) -> Coding | None:
        made = Coding(Uncoded(), Uncoded(), self.group, self.residual)
        found = made if self.base is None else self.base.coding(order, site)
        if self.kept == 1.0:
            return None if self.base is None else found
        found = made if found is None else found
        tables = {} if site is None else {"channels": self._channels(site)}
        return Coding(Narrowed(self.kept, found.keys), found.values, found.group, found.residual, tables)

    def _channels(self, site: Site) -> Int[Tensor, "b h c"]:
        """Return the numbers of the channels that each head stores, in order; they hold until it has encoded tokens."""
        notes, slots = site.notes(self), site.slots
        assert slots is not None and slots.store is not None
        if "settled" in notes:
            return notes["channels"]
        codes, heads = slots.store.codes, list(range(slots.store.n_heads))
        count = channels(self.kept, slots.store.groups[0].slots.k.shape[3])
        if codes is not None and bool((codes.positions(site.q) >= 0).any(-1).all()):  # the host waits for the device
            empty = torch.zeros(site.q.shape[0], len(heads), count, dtype=torch.int16, device=site.q.device)
            notes.clear()
            notes.update(settled=True, channels=codes.tables(heads, {"channels": empty})["channels"])
            return notes["channels"]
        scores = self._queries(site, notes) * _mean_square_key(site)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
        notes["channels"] = best.to(torch.int16)
        return notes["channels"]

    def _queries(self, site: Site, notes: dict[str, Tensor]) -> Float[Tensor, "b h d"]:
        """Return the mean square of each channel of the last `window` queries, over the calls so far."""
        rows, real = last_rows(site, self.window)
        index = rows[:, None, :, None].expand(-1, site.q.shape[1], -1, site.q.shape[3])
        squares = site.q.gather(2, index).float().square().unflatten(1, (site.positions.shape[1], -1)).mean(2)
        if "squares" in notes:
            squares, real = torch.cat([notes["squares"], squares], 2), torch.cat([notes["real"], real], 1)
        order = real.to(torch.uint8).argsort(dim=-1, stable=True)[:, -self.window :]  # padding first, then queries
        real = real.gather(1, order)
        squares = squares.gather(2, order[:, None, :, None].expand(-1, squares.shape[1], -1, squares.shape[3]))
        notes["squares"], notes["real"] = squares, real
        return (squares * real[:, None, :, None]).sum(2) / real.sum(-1).clamp_min(1)[:, None, None]

    @classmethod
    def choices(cls, host: Host, residual: int, group: int) -> Iterator[Self]:
        """See `EncodingPolicy.choices`. It stops at two fifths: with a twentieth, Gemma 3 270M repeats itself."""
        for kept in range(20, 7, -1):
            yield cls(kept=kept / 20, residual=residual, group=group)


@dataclass(frozen=True)
class Narrowed(Codec):
    """Encodes some channels of each head's vectors by another codec, and drops the others.

    Args:
        kept: share of the channels.
        inner: encodes the others.
    """

    kept: float
    inner: Codec = field(default_factory=Uncoded)
    tables: ClassVar[tuple[str, ...]] = ("channels",)

    @property
    def tokens(self) -> int:
        return self.inner.tokens

    def encode(self, x: Float[Tensor, "b h n d"], tables: Parts) -> Parts:
        chosen = tables.get("channels")
        if chosen is None:  # to count bytes
            count = channels(self.kept, x.shape[3])
            chosen = torch.arange(count, dtype=torch.int16, device=x.device).expand(*x.shape[:2], count)
        return {**self.inner.encode(_gathered(x, chosen), {}), "channels": chosen}

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Float[Tensor, "b h n c"]:
        return self.inner.decode(parts, parts["channels"].shape[2], dtype)

    def into(self, q: Float[Tensor, "b h n d"], parts: Parts) -> Float[Tensor, "b h n c"]:
        return self.inner.into(_gathered(q, parts["channels"]), parts)

    def restore(self, x: Float[Tensor, "b h n c"], parts: Parts, width: int) -> Float[Tensor, "b h n d"]:
        """Map vectors back; channels that are not stored are zero."""
        chosen = parts["channels"]
        x = self.inner.restore(x, parts, chosen.shape[2])
        index = chosen.long()[:, :, None].expand(*x.shape[:3], -1)
        return x.new_zeros(*x.shape[:3], width).scatter(3, index, x)


def channels(kept: float, width: int) -> int:
    """Return how many channels are stored, at least one."""
    return max(1, round(kept * width))


def _gathered(x: Tensor, chosen: Int[Tensor, "b h c"]) -> Tensor:
    return x.gather(3, chosen.long()[:, :, None].expand(*x.shape[:3], -1))


def _mean_square_key(site: Site) -> Float[Tensor, "b h d"]:
    """Return the mean square of each channel of the keys, without padding and tentative tokens."""
    found, positions = tokens(site), site.positions
    own = positions if found is None else found.own(positions)
    real = ((own >= 0) & (positions < site.seen))[..., None]
    squares = site.k.float().square().masked_fill(~real, 0.0)
    return squares.sum(2) / real.sum(2).clamp_min(1)
