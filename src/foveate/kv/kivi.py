"""KIVI: keys are quantised per channel and values per token, and the newest tokens not at all.

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024), arXiv 2402.02750.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, final

from foveate.core import validate
from foveate.host import Host
from foveate.host.site import Site
from foveate.host.slots.codec import Coding
from foveate.kv.base.encoding import Bits, EncodingPolicy, bits_at, check_bits, check_depth
from foveate.kv.parts.uniform_codec import Scales, Uniform


@final
@dataclass(eq=False)
class KIVI(EncodingPolicy):
    """A code is a value's step between the least and the largest value of its group.

    Some channels of keys are large in every token, so that a group of keys is one channel of `group` tokens. Values
    have no such channels: a group is one token's `channels`. Both store `round((x - zero) / scale)` with `bits` bits,
    and a zero and a scale of each group in float16: at 2 bits and groups of 32, 3 bits for each number.

    Cost: attention decodes what it reads. The wrong choice for short prompts, which the residual holds in full
    precision, and where 2 bits lose too much: models with few key/value heads want 4.

    Args:
        bits: width of a code, 1, 2, 3, 4 or 8 (the paper's are 2 and 4), in all layers or a tuple with one for each;
            None encodes nothing.
        value_bits: the same for values; None takes `bits`.
        channels: channels of a group of values.
        scales: the type of zeros and scales, "float16" or "float32".
        residual, group, dense, layers: see `EncodingPolicy`. The paper's group is 32 and its residual 128.

    The paper holds up to `residual` keys in full precision, and encodes them all when there are so many; values leave
    their residual one by one. Here keys and values of a token are encoded together, `group` tokens at a time, and at
    least `residual` tokens stay. Codes refer to zeros and scales as they are stored.
    """

    bits: Bits = 2
    value_bits: Bits = None
    channels: int = 32
    scales: Scales = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits, (1, 2, 3, 4, 8))
        check_bits("value_bits", self.value_bits, (1, 2, 3, 4, 8))
        validate.count("channels", self.channels, 1)
        validate.one_of("scales", self.scales, ("float16", "float32"))

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_depth("bits", self.bits, host)
        check_depth("value_bits", self.value_bits, host)

    def coding(self, order: int, site: Site | None) -> Coding | None:
        bits = bits_at(self.bits, order)
        if bits is None:
            return None
        keys = Uniform(bits, self.group, "channel", self.scales)
        values = Uniform(bits_at(self.value_bits, order) or bits, self.channels, "token", self.scales)
        return Coding(keys, values, self.group, self.residual)

    @classmethod
    def choices(cls, host: Host, residual: int, group: int) -> Iterator[Self]:
        for bits in (None, 8, 4, 2):
            yield cls(bits=bits, residual=residual, group=group)
