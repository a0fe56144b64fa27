"""The numbers of a look in a form that fits into a page: values as bytes in base64, each head with its own range."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.bench.looking import Looked, Measured
from foveate.lens.views.head_map import map_data
from foveate.pages.packing import bytes_of, packed, plain_table
from foveate.pages.text import visible

#: The most bytes of all heads' values and maps, before base64 makes them a third longer.
BUDGET = 7_100_000
_LEAST = 1_000_000  # bytes that values may always take, beside large maps
_POWERS = {"queries": 1, "keys": 4}  # keys' values differ by orders of magnitude, and a power evens them out


def payload(found: Looked) -> dict[str, Any]:
    """Return all that the page's script needs, as JSON data.

    Values of tokens take two bytes each, or one if they would not fit into `BUDGET`; if that is too much as well,
    `group` consecutive tokens share their mean.
    """
    maps = [map_data(each) for each in found.maps]
    room = max(_LEAST, BUDGET - sum(map(bytes_of, maps)))
    count = sum(measure.values.numel() for measure in found.measures)
    width = 2 if 2 * count <= room else 1
    group = 1 if width == 2 else max(1, math.ceil(count / room))
    return {
        "tokens": [visible(token, lines=True) for token in found.tokens],
        "prompt": found.prompt, "layers": found.layers, "heads": found.heads, "width": width, "group": group,
        "measures": [
            _measure(measure, width, group) | spread
            for measure, spread in zip(found.measures, _spreads(found), strict=True)
        ],
        "maps": maps,
        "roles": _roles(found),
    }  # fmt: skip


def _measure(measure: Measured, width: int, group: int) -> dict[str, Any]:
    values = _grouped(measure.values, group)
    power = _POWERS[measure.over]
    low, high = (
        torch.where(values.isfinite(), values, fill).flatten(2).aminmax(dim=-1)[index]
        for index, fill in ((0, torch.inf), (1, -torch.inf))
    )
    share = ((values - low[..., None]) / (high - low).clamp_min(1e-30)[..., None]).nan_to_num(0.0).clamp(0.0, 1.0)
    return {
        "name": measure.name, "over": measure.over, "power": power, "table": plain_table(measure.table),
        "low": plain_table(low), "high": plain_table(high), "data": packed(share.pow(1 / power), width),
    }  # fmt: skip


def _spreads(found: Looked) -> list[dict[str, Any]]:
    """Return the spread of each measure over texts, if they are many."""
    if found.over is None:
        return [{}] * len(found.measures)
    return [{"spread": plain_table(table)} for table in found.over.survey.spread]


def _grouped(values: Float[Tensor, "l h n"], group: int) -> Float[Tensor, "l h m"]:
    """Return the mean of each `group` of consecutive tokens."""
    if group == 1:
        return values
    room = -values.shape[-1] % group
    return F.pad(values, (0, room), value=math.nan).unflatten(-1, (-1, group)).nanmean(-1)


def _roles(found: Looked) -> dict[str, list[str]]:
    """Return the names and scores of each head's roles, by `layer.head`."""
    named: dict[str, list[str]] = {}
    for role in found.roles or ():
        named.setdefault(f"{role.layer}.{role.head}", []).append(f"{visible(role.name)} {role.score:.2f}")
    return named
