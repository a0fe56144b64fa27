"""Uniform quantisation: codes at equal steps between the least and the largest value of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.host.slots.codec import Codec, Parts
from foveate.kv.parts.bit_packing import pack, unpack

#: The types in which scales and zeros are stored.
Scales = Literal["float16", "float32"]


@dataclass(frozen=True)
class Uniform(Codec):
    """Encodes a value as `round((x - zero) / scale)`: the step between its group's least and largest value.

    `zero` is the least value, and `zero + (2^bits - 1) scale` the largest. Codes refer to scales and zeros as they are
    stored: rounding a zero moves the range of a group, and does not shift its values.

    Args:
        bits: width of a code: 1, 2, 3, 4 or 8.
        group: tokens of a group, for each channel, or channels of a group, for each token; the last group of a width
            that is no multiple is smaller.
        per: "channel" groups tokens, "token" groups channels.
        scales: the type of scales and zeros.
    """

    bits: int
    group: int
    per: Literal["channel", "token"]
    scales: Scales = "float16"

    @property
    def tokens(self) -> int:
        return self.group if self.per == "channel" else 1

    def encode(self, x: Float[Tensor, "b h n d"], tables: Parts) -> Parts:
        groups = self._grouped(x.to(torch.promote_types(x.dtype, torch.float32)))
        zero, top = groups.amin(-1), groups.amax(-1)
        kind = torch.finfo(getattr(torch, self.scales))
        zero = zero.clamp(kind.min, kind.max).to(kind_of(self.scales))
        scale = ((top - zero) / (2**self.bits - 1)).clamp(0.0, kind.max).to(zero.dtype)
        step = scale.to(groups.dtype)[..., None]
        codes = ((groups - zero.to(groups.dtype)[..., None]) / step.masked_fill(step == 0, 1.0)).round()
        codes = self._ungrouped(codes.clamp(0, 2**self.bits - 1), x.shape[3])
        return {"codes": pack(codes.to(torch.uint8), self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Float[Tensor, "b h n d"]:
        codes = self._grouped(unpack(parts["codes"], self.bits, width).to(dtype))
        scale, zero = (parts[name].to(dtype)[..., None] for name in ("scale", "zero"))
        return self._ungrouped(torch.addcmul(zero, codes, scale), width)

    def _grouped(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h m c g"]:
        """Return groups along the last axis."""
        if self.per == "channel":
            return x.unflatten(2, (-1, self.group)).transpose(3, 4)
        group = min(self.group, x.shape[3])
        short = -x.shape[3] % group
        if short:  # copies of a value change neither the least nor the largest
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:3], short)], 3)
        return x.unflatten(3, (-1, group))

    def _ungrouped(self, x: Float[Tensor, "b h m c g"], width: int) -> Float[Tensor, "b h n d"]:
        if self.per == "channel":
            return x.transpose(3, 4).flatten(2, 3)
        return x.flatten(3)[..., :width]


def kind_of(scales: Scales) -> torch.dtype:
    return torch.float16 if scales == "float16" else torch.float32
