"""The attention modules of a decoder whose projections can be rewritten: separate linear maps to q, k, v and out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import ShapeError, UnsupportedModel, shown
from foveate.host import Host, Method, Site
from foveate.host.hf.layout import layout
from foveate.host.probing import read

#: Names of the output projection in transformers' models.
OUT = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class Sizes:
    """Heads and width of a decoder's layers, which all have the same: query heads, key/value heads, channels."""

    heads: int
    kv_heads: int
    width: int

    @property
    def groups(self) -> int:
        """Query heads of each key/value head."""
        return self.heads // self.kv_heads


def modules(host: Host) -> tuple[dict[int, nn.Module], Sizes]:
    """Return the attention modules of a decoder by their layer's number in the cache, and their sizes.

    Raises:
        UnsupportedModel: the layers differ in their heads, share keys, or are not four linear maps around attention.
    """
    name, found = type(host.model).__name__, layout(host)
    probe = _Modules()
    read(host, torch.ones(1, 2, dtype=torch.long), probe)
    counts = {(layer.heads, layer.kv_heads) for layer in found.layers}
    if found.expands or len(counts) > 1 or len(set(probe.found.values())) < len(found):
        raise UnsupportedModel(f"{name}: heads can only be merged if every layer has as many, and keys of its own")
    (heads, kv_heads), widths = counts.pop(), set(probe.widths)
    if len(widths) > 1:
        raise UnsupportedModel(f"{name}: heads can only be merged if keys and values are equally wide everywhere")
    sizes = Sizes(heads, kv_heads, widths.pop())
    for layer, module in probe.found.items():
        _check(name, layer, module, sizes)
    return probe.found, sizes


def out_name(module: nn.Module) -> str:
    """Return the name of a module's output projection."""
    return next(name for name in OUT if isinstance(getattr(module, name, None), nn.Linear))


def has_norms(module: nn.Module) -> bool:
    """Return whether a module normalises its queries and keys after their projections."""
    return any(isinstance(getattr(module, name, None), nn.Module) for name in ("q_norm", "k_norm", "k_layernorm"))


def _check(name: str, layer: int, module: nn.Module, sizes: Sizes) -> None:
    maps = [getattr(module, part, None) for part in ("q_proj", "k_proj", "v_proj")]
    out = next((part for part in OUT if isinstance(getattr(module, part, None), nn.Linear)), None)
    if out is None or not all(isinstance(x, nn.Linear) and x.weight.is_floating_point() for x in maps):
        raise UnsupportedModel(
            f"{name}: layer {layer} has no linear q_proj, k_proj, v_proj and o_proj, which a conversion rewrites"
        )
    q, k, v = (x.weight.shape[0] for x in maps if isinstance(x, nn.Linear))
    wide, narrow = sizes.heads * sizes.width, sizes.kv_heads * sizes.width
    if (q, k, v, getattr(module, out).weight.shape[1]) != (wide, narrow, narrow, wide):
        raise UnsupportedModel(f"{name}: the projections of layer {layer} hold more than its heads")
    if isinstance(getattr(module, "v_norm", None), nn.Module) or getattr(module, "is_kv_shared_layer", False):
        raise UnsupportedModel(f"{name}: layer {layer} changes values after their projection, or shares keys")


class _Modules(Method):
    """A method that records each layer's module, and the widths of its keys and values."""

    is_probe = True

    def __init__(self) -> None:
        self.found: dict[int, nn.Module] = {}
        self.widths: list[int] = []

    def read(self, site: Site, out: Tensor) -> None:
        if site.is_causal:
            self.found[site.layer] = site.module
            self.widths += [site.new_k.shape[-1], site.new_v.shape[-1], site.q.shape[-1]]


@torch.no_grad()
def second_moments(
    host: Host, data: Iterable[Tensor], groups: int, order: dict[int, Tensor]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return sums of outer products of each group's keys, and of its values, by layer: `(groups, t·d, t·d)`.

    Keys are as the cache holds them, after the rotary embedding. Nothing of the caches is stored.

    Args:
        host: the model.
        data: token ids `(B, N)` without padding.
        groups: number of groups into which a layer's heads are split.
        order: the order of each layer's key/value heads, of which neighbours form a group.
    """
    probe = _Moments(groups, order)
    for ids in data:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise ShapeError(f"data must yield token ids (B, N); got {shown(ids)}")
        read(host, ids, probe)
    return probe.keys, probe.values


class _Moments(Method):
    """A method that adds up the outer products of the keys and values of each group of heads."""

    def __init__(self, groups: int, order: dict[int, Tensor]) -> None:
        self.groups, self.order = groups, order
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal and site.layer in self.order

    def read(self, site: Site, out: Tensor) -> None:
        order = self.order[site.layer].to(site.q.device)
        for sums, x in ((self.keys, site.new_k), (self.values, site.new_v)):
            new = _outer(x[:, order], self.groups).cpu()
            sums[site.layer] = new if site.layer not in sums else sums[site.layer] + new


def _outer(x: Float[Tensor, "b h n d"], groups: int) -> Float[Tensor, "g td td"]:
    """Return each group's outer products, in float64: half of the digits are lost in a product of float32."""
    beside = x.unflatten(1, (groups, -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2).double()
    return beside.transpose(1, 2) @ beside
