"""The page of an attention view: its data in a size that a browser opens at once, and its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from markupsafe import Markup
from torch import Tensor
from torch.nn import functional as F

from foveate.lens.views.head_map import STRONGEST, TILES, map_data, pooled
from foveate.lens.views.stack import Products, Stack
from foveate.pages.packing import packed
from foveate.pages.skeleton import asset, environment, policy
from foveate.pages.text import visible

#: The most bytes of all maps, of their strongest keys, and of queries and keys, before base64.
MAPS, KEYS, NEURONS = 3_200_000, 1_000_000, 2_400_000
_SIDE = 256  # the longer side of an image
_SCRIPTS = ("values.js", "grid.js", "search.js", "map.js", "arcs.js", "neurons.js", "patches.js", "view.js")


@dataclass(frozen=True)
class Start:
    """The heads that a page shows first."""

    part: str
    layer: int
    heads: Sequence[int]


def render(stacks: Mapping[str, Stack], name: str, start: Start | None = None) -> str:
    """Return the page of some stacks of layers.

    It makes no requests. All texts are escaped, and a content security policy forbids network access and other scripts.

    Args:
        stacks: a model's parts by name.
        name: the model's name.
        start: the heads that it shows first; None is the first head.
    """
    templates = environment("foveate.lens.views")
    scripts = [asset(templates, each) for each in _SCRIPTS]
    heads, tokens = sum(len(stack.maps) for stack in stacks.values()), max(len(s.keys) for s in stacks.values())
    return templates.get_template("view.html.j2").render(
        policy=policy(scripts),
        style=Markup("".join(asset(templates, each) for each in ("page.css", "heads.css", "view.css"))),
        scripts=[Markup(script) for script in scripts],
        name=name, heads=heads, tokens=tokens, parts=list(stacks),
        has_segments=any(stack.boundary is not None for stack in stacks.values()),
        has_neurons=any(stack.products for stack in stacks.values()),
        has_patches=any(stack.grid is not None for stack in stacks.values()),
        data=payload(stacks, start),
    )  # fmt: skip


def payload(stacks: Mapping[str, Stack], start: Start | None = None) -> dict[str, Any]:
    """Return all that the page's scripts need, as JSON data.

    Maps have a tile for each pair of tokens as long as all fit into `MAPS` bytes, then larger tiles. Queries and keys
    are left out if they do not fit into `NEURONS` bytes.
    """
    heads = sum(len(stack.maps) for stack in stacks.values())
    room = MAPS // heads
    parts = [_part(name, stack, room, KEYS // heads) for name, stack in stacks.items()]
    size = sum(2 * (p.q.numel() + p.k.numel()) for stack in stacks.values() for p in stack.products.values())
    for part, stack in zip(parts, stacks.values(), strict=True):
        known = stack.products if size <= NEURONS else {}
        part["products"] = {str(layer): _neurons(each) for layer, each in known.items()}
        part["left_out"] = bool(stack.products) and not known
    if start is None:
        layer, head = min(next(iter(stacks.values())).maps)
        start = Start(next(iter(stacks)), layer, (head,))
    return {
        "parts": parts,
        "start": {"part": list(stacks).index(start.part), "layer": start.layer, "heads": list(start.heads)},
    }  # fmt: skip


def _part(name: str, stack: Stack, room: int, key_room: int) -> dict[str, Any]:
    """Return one stack's tokens and maps.

    Args:
        name: its name.
        stack: its maps.
        room: the bytes that a map may take.
        key_room: the bytes that a map's strongest keys may take.
    """
    n, m = len(stack.queries), len(stack.keys)
    width = 2 if 2 * n * m <= room else 1
    tiles = max(n, m) if n * m <= room else max(8, min(TILES, isqrt(room)))
    alone = tiles >= max(n, m)
    strongest = 0 if alone else min(STRONGEST, key_room // (6 * n))
    maps = [pooled(*at, weights.cpu(), tiles, strongest) for at, weights in sorted(stack.maps.items())]
    return {
        "name": name, "layers": stack.depth, "heads": stack.width,
        "queries": [visible(text, lines=True) for text in stack.queries],
        "keys": [visible(text, lines=True) for text in stack.keys],
        "places": None if stack.places is None else list(stack.places),
        "boundary": stack.boundary, "prompt": stack.prompt, "grid": stack.grid,
        "image": None if stack.image is None else _image(stack.image),
        "maps": [map_data(each, width) for each in maps],
    }  # fmt: skip


def _neurons(products: Products) -> dict[str, Any]:
    """Return queries and keys as numbers of two bytes, each head with its own range around 0."""
    found: dict[str, Any] = {"width": products.q.shape[2], "scale": products.scale, "groups": len(products.k)}
    for name, values in (("q", products.q), ("k", products.k)):
        values = values.float().cpu()
        most = values.abs().flatten(1).amax(1).clamp_min(1e-12)
        found[name] = packed((values / most[:, None, None] + 1) / 2, 2)
        found[f"{name}_most"] = [float(f"{value:.7g}") for value in most.tolist()]
    return found


def _image(image: Tensor) -> dict[str, Any]:
    """Return an image as bytes: red, green and blue of each pixel."""
    shrunk = image.float()[None]
    longest = max(image.shape[1:])
    if longest > _SIDE:
        shrunk = F.interpolate(shrunk, scale_factor=_SIDE / longest, mode="bilinear", antialias=True)
    pixels = shrunk[0].clamp(0.0, 1.0).permute(1, 2, 0)
    return {"height": pixels.shape[0], "width": pixels.shape[1], "data": packed(pixels, 1)}
