"""Pack codes of a few bits into bytes, along the last axis."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

#: Widths that can be packed.
WIDTHS = (1, 2, 3, 4, 8)


def pack(codes: UInt8[Tensor, "*b d"], bits: int) -> UInt8[Tensor, "*b n"]:
    """Pack codes below `2 ** bits` into bytes: `n = ceil(d bits / 8)` for 1, 2, 4 and 8 bits.

    Codes of 3 bits go eight at a time into three bytes. The last byte, or the last three, are filled up with zeros.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    per = 8 if bits == 3 else 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per)).to(torch.int32)
    shifts = torch.arange(0, bits * per, bits, device=codes.device, dtype=torch.int32)
    words = (codes << shifts).sum(-1, dtype=torch.int32)
    if bits != 3:
        return words.to(torch.uint8)
    return ((words[..., None] >> _BYTES.to(codes.device)) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: UInt8[Tensor, "*b n"], bits: int, width: int) -> UInt8[Tensor, "*b d"]:
    """Return the first `width` codes that `pack` packed."""
    if bits == 8:
        return packed
    if bits == 3:
        words = (packed.unflatten(-1, (-1, 3)).to(torch.int32) << _BYTES.to(packed.device)).sum(-1, dtype=torch.int32)
        shifts = torch.arange(0, 24, 3, device=packed.device, dtype=torch.int32)
        codes = ((words[..., None] >> shifts) & 7).to(torch.uint8)
    else:
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :width]


_BYTES = torch.tensor([0, 8, 16], dtype=torch.int32)
