"""Layers: `(B, N, C) -> (B, N, C)`, any operator inside, head schemes, positions, and blocks to stack.

Systems of this room are found through the catalogue: `foveate.nn.MixtureOfHeadAttention` is its row's object.
"""

from __future__ import annotations

from typing import Any

from foveate.core.catalog import systems
from foveate.nn.blocks import Block, GatedMLP
from foveate.nn.layer import Layer
from foveate.nn.multi_head import MultiHeadAttention
from foveate.nn.positions import Alibi, Position, RelativeBias, Rotary
from foveate.nn.short_conv import ShortConv

__all__ = [
    "Alibi", "Block", "GatedMLP", "Layer", "MultiHeadAttention", "Position", "RelativeBias", "Rotary", "ShortConv",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for row in systems(room="nn"):
        if row.object.rpartition(":")[2] == name:
            return row.load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
