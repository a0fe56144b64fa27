"""Renumbered positions: the distance of a key is the number of kept tokens after it, also past the trained context.

Efficient Streaming Language Models with Attention Sinks (2023), arXiv 2309.17453, section 3.2: positions are those
within the cache, not those in the text. A pretrained model's keys already contain their rotary embedding. One more
rotation changes it to that of another position, so that no keys from before the embedding have to be stored.
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
from foveate.core.call import AttentionCall
from foveate.core.errors import UnsupportedModel
from foveate.host import Host, Method, apply, decoder_inputs
from foveate.host.attention import softmax_over
from foveate.host.fused_statistics import statistics
from foveate.host.hf.layout import layout
from foveate.host.padding import tokens
from foveate.host.probing import cached
from foveate.host.site import Site
from foveate.host.slots.slots import EMPTY

#: Positions between the two calls that show how a model's keys rotate.
_APART = 7


@final
@dataclass(eq=False)
class Renumbered(Method):
    """Count positions over the tokens that a policy kept: `apply(model, SinkRecent(...), Renumbered())`.

    A policy that evicts leaves gaps between positions; this method closes them. So no distance is longer than the
    cache, and a text may be longer than the model's trained length, provided that it is read in pieces and the kept
    tokens and a piece together fit within that length. It copies the layer's keys in each call. It works for models
    whose keys rotate with their position by fixed angles (rotary embeddings, also of a part of the channels, linear,
    YaRN or Llama 3 scaling), or do not depend on it. Other models are refused, such as those whose angles depend on the
    length of the text. Useless without a policy that evicts.
    """

    needs_cache: ClassVar[bool] = True
    _rotations: dict[int, Rotation | None] = field(default_factory=dict, init=False, repr=False)

    def bind(self, host: Host) -> None:
        if layout(host).expands:
            raise UnsupportedModel(
                f"{type(host.model).__name__} computes its keys from its cache at each call, so that their positions "
                f"cannot be renumbered"
            )
        self._rotations = rotations(host)

    def at(self, site: Site) -> bool:
        return site.slots is not None and not (site.is_whole and site.hidden_keys is None)

    def attend(self, site: Site) -> Tensor | None:
        rotation = self._rotations.get(site.layer)
        if rotation is None:
            return None
        found, seen = tokens(site), site.seen
        own = site.positions if found is None else found.own(site.positions)
        if site.hidden_keys is not None:  # for drafts: keys that only later queries see
            own = own.masked_fill(site.hidden_keys, EMPTY)
        shift = shifts(own, seen if found is None else found.count[:, None, None])
        moved = copy.copy(site)
        moved.__dict__["k"] = rotation(site.k, shift)
        if site.softcap is not None:
            return softmax_over(moved)
        call = AttentionCall(site.q, moved.k, site.v, site.scale, site.mask, dropout=site.dropout)
        return engines.run(call, "fused")

    def attend_over_gap(self, site: Site, front: int, gap: int) -> Float[Tensor, "b hq 1 dv"]:
        """Return the attention of one query over the first `front` slots, moved by `gap`, and all others as they are.

        Only the first keys are rotated and copied. Both parts are merged by their log-sum-exps. Every slot has to hold
        a token that the query sees.
        """
        rotation, heads = self._rotations.get(site.layer), site.k.shape[1]
        q = site.q.unflatten(1, (heads, -1)).squeeze(3)  # a group's query heads, as queries of one head
        k = site.k[:, :, :front]
        if rotation is not None:
            k = rotation(k, torch.full(k.shape[:3], gap, device=k.device))
        parts = [(k, site.v[:, :, :front]), (site.k[:, :, front:], site.v[:, :, front:])]
        (lse, out), (other, rest) = (statistics(q, *part, scale=site.scale) for part in parts)
        weight = torch.sigmoid(other - lse)[..., None]
        return torch.lerp(out, rest, weight).flatten(1, 2).unsqueeze(2)


def shifts(positions: Int[Tensor, "b h s"], seen: int | Tensor) -> Int[Tensor, "b h s"]:
    """Return by how many positions each kept token moves towards the end, so that no gap follows it.

    Args:
        positions: positions of the slots in their own sequence; below 0 for a slot without a token, which stays.
        seen: tokens of the sequence so far, or of each sequence, `(B, 1, 1)`.
    """
    order = positions.argsort(-1, descending=True)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    behind = torch.empty_like(order).scatter_(-1, order, rank)
    return (seen - 1 - behind - positions).masked_fill(positions < 0, 0).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of keys with their position: pairs of channels rotate by an angle for each position.

    Args:
        angles: the angle of each pair, `(n,)`.
        neighbours: whether a pair consists of channels `2 i` and `2 i + 1`, or else `i` and `i + n`. Channels after the
            first `2 n` do not rotate.
    """

    angles: Float[Tensor, " n"]
    neighbours: bool

    def __call__(self, k: Float[Tensor, "b h s d"], by: Int[Tensor, "b h s"]) -> Float[Tensor, "b h s d"]:
        """Rotate keys to the position `by` later."""
        n = self.angles.shape[0]
        angle = by[..., None].float() * self.angles.to(k.device)
        cos, sin = angle.cos(), angle.sin()
        pairs, rest = k[..., : 2 * n].float(), k[..., 2 * n :]
        if self.neighbours:
            a, b = pairs.unflatten(-1, (n, 2)).unbind(-1)
            both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = pairs[..., :n], pairs[..., n:]
            both = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([both.to(k.dtype), rest], -1)


def rotations(host: Host) -> dict[int, Rotation | None]:
    """Find how the keys of each layer of a decoder rotate; None for keys that do not depend on their position.

    One token is read at two positions. It sees no other token, so that its keys differ by their position only.

    Raises:
        UnsupportedModel: the keys depend on their position in another way.
    """
    return cached(host, "rotations", lambda: _probe(host))


def _probe(host: Host) -> dict[int, Rotation | None]:
    scaling = getattr(host.config, "rope_parameters", None) or getattr(host.config, "rope_scaling", None) or {}
    kinds = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
    if any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds):
        raise UnsupportedModel(
            f"{type(host.model).__name__}: its keys rotate by angles that depend on the text's length"
        )
    before, after = (_keys(host, position) for position in (0, _APART))
    known = list(_candidates(host.decoder))
    found: dict[int, Rotation | None] = {}
    for layer, key in before.items():
        if torch.allclose(key, after[layer], atol=1e-5):
            found[layer] = None
            continue
        by = torch.full(key.shape[:3], _APART, device=key.device)
        size = float(key.abs().max())
        off = max(1e-3, 2 * torch.finfo(host.model.dtype).eps) * size
        able = [rotation for rotation in known if 2 * rotation.angles.shape[0] <= key.shape[-1]]
        best = min(able, key=lambda rotation: float((rotation(key, by) - after[layer]).abs().max()), default=None)
        if best is None or not torch.allclose(best(key, by), after[layer], atol=off):
            raise UnsupportedModel(
                f"{type(host.model).__name__}: the keys of layer {layer} do not rotate with their position as rotary "
                f"embeddings do, which is needed here; SnapKV, H2O and SinkRecent do without it"
            )
        found[layer] = best
    return found


def _candidates(decoder: nn.Module | None) -> Iterator[Rotation]:
    """Yield rotations by the angles that a decoder stores."""
    assert decoder is not None
    for name, angles in decoder.named_buffers():
        if name.endswith("inv_freq") and angles.dim() == 1:
            for neighbours in (False, True):
                yield Rotation(angles.detach().float(), neighbours)


def _keys(host: Host, position: int) -> dict[int, Tensor]:
    """Return the keys of one token at a position, by layer."""
    assert host.decoder is not None
    probe = _KeyProbe()
    inputs = decoder_inputs(host, torch.ones(1, 1, dtype=torch.long))
    place = torch.full_like(inputs["input_ids"], position)
    with torch.no_grad(), apply(host.model, probe, on="decoder"):
        try:
            host.decoder(**inputs, position_ids=place, use_cache=False)
        except TypeError as error:
            raise UnsupportedModel(f"{type(host.model).__name__} takes no positions: {error}") from None
    return probe.found


class _KeyProbe(Method):
    """A method that records the keys of each layer."""

    is_probe = True

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def read(self, site: Site, out: Tensor) -> None:
        if site.is_causal:
            self.found[site.layer] = site.new_k.float()
