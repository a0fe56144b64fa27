"""Quantisation after a rotation: whatever a vector is, its rotated coordinates have one known distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.host.slots.codec import Codec, Parts
from foveate.kv.parts.bit_packing import pack, unpack
from foveate.kv.parts.lloyd_max import centroids

#: "hadamard" flips random signs and applies the Hadamard matrix; "random" draws from all rotations and reflections.
RotationKind = Literal["hadamard", "random"]

_LEAST, _MOST = 1e-30, 65504.0


@dataclass(frozen=True)
class Rotated(Codec):
    """Encodes the direction of a vector by the nearest centroid of each rotated coordinate, and its norm in float16.

    Queries are rotated to the codes, and weighted sums of vectors back, so that no vector is rotated when it is read.

    Args:
        bits: width of a code.
        rotation: see `RotationKind`.
        renormalise: whether the decoded vector gets the norm of the encoded one. The centroids of its coordinates alone
            are a little short.
        seed: seed of the rotation.
    """

    bits: int
    rotation: RotationKind = "hadamard"
    renormalise: bool = True
    seed: int = 0

    def encode(self, x: Float[Tensor, "b h n d"], tables: Parts) -> Parts:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = x.norm(dim=-1, keepdim=True)
        unit = (x / norm.clamp_min(_LEAST)) @ self._matrix(x)
        values = self._values(x)
        codes = torch.bucketize(unit, (values[1:] + values[:-1]) / 2)
        if self.renormalise:
            norm = norm / _read(values, codes).norm(dim=-1, keepdim=True)
        packed = pack(codes.to(torch.uint8), self.bits)
        return {"codes": packed, "norm": norm.clamp_max(_MOST).to(torch.float16)}

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Float[Tensor, "b h n d"]:
        codes, norm = unpack(parts["codes"], self.bits, width), parts["norm"].to(dtype)
        values = centroids(self.bits, width).to(norm)
        return _read(values, codes) * norm

    def into(self, q: Float[Tensor, "b h n d"], parts: Parts) -> Float[Tensor, "b h n d"]:
        return q @ self._matrix(q)

    def restore(self, x: Float[Tensor, "b h n d"], parts: Parts, width: int) -> Float[Tensor, "b h n d"]:
        return x @ self._matrix(x).T

    def _values(self, x: Tensor) -> Float[Tensor, " c"]:
        return centroids(self.bits, x.shape[-1]).to(x)

    def _matrix(self, x: Tensor) -> Float[Tensor, "d d"]:
        return rotation(x.shape[-1], self.rotation, self.seed, x.dtype, x.device)


@lru_cache(maxsize=64)
def rotation(
    width: int, kind: RotationKind, seed: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "d d"]:
    """Return an orthogonal matrix that is drawn from a seed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        if kind == "random":
            gauss = torch.randn(width, width, generator=draw, dtype=torch.float64)
            q, r = torch.linalg.qr(gauss)
            made = q * r.diagonal().sign()  # without the signs, not all rotations are equally likely
        else:
            signs = torch.randint(0, 2, (width,), generator=draw).double() * 2 - 1
            made = signs[:, None] * hadamard(width) / width**0.5
        return made.to(device, dtype)


def hadamard(width: int) -> Float[Tensor, "d d"]:
    """Return Sylvester's matrix of ones and minus ones, whose rows are orthogonal; `width` is a power of two."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < width:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _read(values: Float[Tensor, " c"], codes: Tensor) -> Tensor:
    return values.index_select(0, codes.flatten().int()).view(codes.shape)
