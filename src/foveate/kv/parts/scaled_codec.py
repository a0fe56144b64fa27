"""Eight-bit numbers with one scale for each token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.host.slots.codec import Codec, Parts

#: E4M3 and E5M2 are the eight-bit floating-point formats of 2209.05433; "int8" are whole numbers from -127 to 127.
Format = Literal["e4m3", "e5m2", "int8"]

_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


@dataclass(frozen=True)
class Scaled(Codec):
    """Encodes a vector as eight-bit numbers: its largest channel takes the format's largest number."""

    format: Format = "e4m3"

    @property
    def largest(self) -> float:
        kind = _TYPES[self.format]
        return float(torch.iinfo(kind).max if self.format == "int8" else torch.finfo(kind).max)

    def encode(self, x: Float[Tensor, "b h n d"], tables: Parts) -> Parts:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (x.abs().amax(-1, keepdim=True) / self.largest).to(torch.float32)
        numbers = (x / scale.to(x.dtype).masked_fill(scale == 0, 1.0)).clamp(-self.largest, self.largest)
        numbers = numbers.round() if self.format == "int8" else numbers
        # as bytes: few operations know the eight-bit floating-point types
        return {"codes": numbers.to(_TYPES[self.format]).view(torch.uint8), "scale": scale}

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Float[Tensor, "b h n d"]:
        return parts["codes"].view(_TYPES[self.format]).to(dtype) * parts["scale"].to(dtype)
