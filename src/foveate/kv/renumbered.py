"""Renumbered positions: keys stand as far from the query as there are kept tokens between, also past the context.

Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453, section 3.2: positions are those
within the cache, not those in the text. Keys of pretrained models come with their rotary embedding in them. A rotation
by an angle more makes it that of another position, so that nothing has to be stored before the embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import engines
from foveate.core.call import Problem
from foveate.core.errors import UnsupportedModel
from foveate.host import Host, Method, apply, decoder_inputs
from foveate.host.attention import softmax_over
from foveate.host.hf import layout
from foveate.host.padding import tokens
from foveate.host.site import Site
from foveate.host.slots.slots import EMPTY
from foveate.kv.parts.probing import kept

#: Positions between the two calls that tell how a model's keys turn.
_APART = 7


@final
@dataclass(eq=False)
class Renumbered(Method):
    """Positions count the tokens that a policy kept: `apply(model, SinkRecent(...), Renumbered())`.

    A policy that evicts leaves gaps. With this method each kept key stands right behind the one before it. So no
    distance is longer than the cache, and a text may run on past the length that the model was trained for, where it is
    read in pieces and the kept tokens and a piece together stay within it. Costs a copy of the layer's keys in each
    call. For models whose keys turn with their position by fixed angles (rotary embeddings, also of a part of the
    channels, linear, YaRN or Llama 3 scaling), or do not change with it at all; others are refused, among them those
    whose angles depend on the length of the text. Of no use without a policy that evicts.
    """

    needs_cache: ClassVar[bool] = True
    _turns: dict[int, Turn | None] = field(default_factory=dict, init=False, repr=False)

    def bind(self, host: Host) -> None:
        if layout(host).expands:
            raise UnsupportedModel(
                f"{type(host.model).__name__} makes its keys anew from its cache at each call, so that their positions "
                f"cannot be renumbered"
            )
        self._turns = turns(host)

    def at(self, site: Site) -> bool:
        return site.slots is not None and not (site.is_whole and site.hidden_keys is None)

    def attend(self, site: Site) -> Tensor | None:
        turn = self._turns.get(site.layer)
        if turn is None:
            return None
        found, seen = tokens(site), site.seen
        own = site.positions if found is None else found.own(site.positions)
        if site.hidden_keys is not None:  # of drafts: keys that another call will see
            own = own.masked_fill(site.hidden_keys, EMPTY)
        shift = shifts(own, seen if found is None else found.count[:, None, None])
        moved = copy.copy(site)
        moved.__dict__["k"] = turn(site.k, shift)
        if site.softcap is not None:
            return softmax_over(moved)
        problem = Problem(site.q, moved.k, site.v, site.scale, site.mask, dropout=site.dropout)
        return engines.run(problem, "fused")


def shifts(positions: Int[Tensor, "b h s"], seen: int | Tensor) -> Int[Tensor, "b h s"]:
    """Count the positions that each kept token moves towards the end, so that no gap is behind it.

    Args:
        positions: of the slots in their own sequence; below 0 for one that is no token, which stays.
        seen: tokens of the sequence so far, or of each, `(B, 1, 1)`.
    """
    order = positions.argsort(-1, descending=True)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    behind = torch.empty_like(order).scatter_(-1, order, rank)
    return (seen - 1 - behind - positions).masked_fill(positions < 0, 0).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Turn:
    """Keys turn with their position: pairs of channels, by an angle for each position.

    Args:
        angles: of each pair, `(n,)`.
        neighbours: whether a pair are channels `2 i` and `2 i + 1`; else `i` and `i + n`. Channels after the first
            `2 n` stay.
    """

    angles: Float[Tensor, " n"]
    neighbours: bool

    def __call__(self, k: Float[Tensor, "b h s d"], by: Int[Tensor, "b h s"]) -> Float[Tensor, "b h s d"]:
        """Keys as they were `by` positions later."""
        n = self.angles.shape[0]
        angle = by[..., None].float() * self.angles.to(k.device)
        cos, sin = angle.cos(), angle.sin()
        turned, rest = k[..., : 2 * n].float(), k[..., 2 * n :]
        if self.neighbours:
            a, b = turned.unflatten(-1, (n, 2)).unbind(-1)
            both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned[..., :n], turned[..., n:]
            both = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([both.to(k.dtype), rest], -1)


def turns(host: Host) -> dict[int, Turn | None]:
    """Find how the keys of each layer of a decoder turn; None where they do not change with their position.

    One token is read at two positions. It sees nothing else, so that its keys differ by their position alone.

    Raises:
        UnsupportedModel: where they change in another way.
    """
    return kept(host, "turns", lambda: _probe(host))


def _probe(host: Host) -> dict[int, Turn | None]:
    scaling = getattr(host.config, "rope_parameters", None) or getattr(host.config, "rope_scaling", None) or {}
    kinds = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    if any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds):
        raise UnsupportedModel(f"{type(host.model).__name__}: its keys turn by angles that depend on the text's length")
    before, after = (_keys(host, position) for position in (0, _APART))
    known = list(_candidates(host.decoder))
    found: dict[int, Turn | None] = {}
    for layer, key in before.items():
        if torch.allclose(key, after[layer], atol=1e-5):
            found[layer] = None
            continue
        by = torch.full(key.shape[:3], _APART, device=key.device)
        size = float(key.abs().max())
        off = max(1e-3, 2 * torch.finfo(host.model.dtype).eps) * size
        able = [turn for turn in known if 2 * turn.angles.shape[0] <= key.shape[-1]]
        best = min(able, key=lambda turn: float((turn(key, by) - after[layer]).abs().max()), default=None)
        if best is None or not torch.allclose(best(key, by), after[layer], atol=off):
            raise UnsupportedModel(
                f"{type(host.model).__name__}: the keys of layer {layer} do not turn with their position as rotary "
                f"embeddings do, so that positions cannot be renumbered"
            )
        found[layer] = best
    return found


def _candidates(decoder: nn.Module | None) -> Iterator[Turn]:
    """Turns by the angles that a decoder keeps."""
    assert decoder is not None
    for name, angles in decoder.named_buffers():
        if name.endswith("inv_freq") and angles.dim() == 1:
            for neighbours in (False, True):
                yield Turn(angles.detach().float(), neighbours)


def _keys(host: Host, position: int) -> dict[int, Tensor]:
    """The keys of one token at a position, by layer."""
    assert host.decoder is not None
    looks = _Looks()
    inputs = decoder_inputs(host, torch.ones(1, 1, dtype=torch.long))
    place = torch.full_like(inputs["input_ids"], position)
    with torch.no_grad(), apply(host.model, looks, on="decoder"):
        try:
            host.decoder(**inputs, position_ids=place, use_cache=False)
        except TypeError as error:
            raise UnsupportedModel(f"{type(host.model).__name__} takes no positions: {error}") from None
    return looks.found


class _Looks(Method):
    """Notes the keys of each layer."""

    is_probe = True

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def read(self, site: Site, out: Tensor) -> None:
        if site.is_causal:
            self.found[site.layer] = site.new_k.float()
