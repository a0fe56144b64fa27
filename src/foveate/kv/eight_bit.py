"""Eight-bit caches, as inference engines store them: fp8 or int8 numbers with a scale for each token and head.

FP8 Formats for Deep Learning (2022), arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, final

from foveate.core import validate
from foveate.host import Host
from foveate.host.site import Site
from foveate.host.slots.codec import Coding
from foveate.kv.base.encoding import EncodingPolicy
from foveate.kv.parts.scaled_codec import Format, Scaled


@final
@dataclass(eq=False)
class EightBit(EncodingPolicy):
    """Keys and values are eight-bit numbers, scaled by the largest channel of each token and head.

    The baseline of every method that goes below eight bits: about a byte for each number, and 4 bytes for each scale.
    Cost: half of a bfloat16 cache's bytes, and a conversion of what attention reads. The wrong choice where half the
    bytes are still too many.

    Args:
        format: "e4m3" or "e5m2", the paper's floating-point formats; or "int8", whole numbers from -127 to 127.
        residual, group, dense, layers: see `EncodingPolicy`. Engines encode every token at once (`residual=0`).
    """

    residual: int = 0
    format: Format = "e4m3"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("format", self.format, ("e4m3", "e5m2", "int8"))

    def coding(self, order: int, site: Site | None) -> Coding | None:
        return Coding(Scaled(self.format), Scaled(self.format), self.group, self.residual)

    @classmethod
    def choices(cls, host: Host, residual: int, group: int) -> Iterator[Self]:
        yield cls(residual=residual, group=group, layers=())
        yield cls(residual=residual, group=group)
