"""TurboQuant: a random rotation, and then one fixed quantiser for every coordinate.

TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate (2025), arXiv 2504.19874.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self, final

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.site import Site
from foveate.host.slots.codec import Codec, Coding
from foveate.kv.base.encoding import Bits, EncodingPolicy, bits_at, check_bits, check_depth
from foveate.kv.parts.rotated_codec import Rotated, RotationKind
from foveate.kv.parts.uniform_codec import Uniform

_WIDTHS = (1, 2, 3, 4, 8)
#: More than any head's channels: a token of a head is one group.
_ALL = 1 << 20


@final
@dataclass(eq=False)
class TurboQuant(EncodingPolicy):
    """A key is its norm, and the nearest centroid of each coordinate of its rotated direction.

    After a random rotation a coordinate of any unit vector of `d` dimensions has one density, about a normal one of
    variance `1 / d`. So the `2^bits` centroids are computed once, by Lloyd and Max, without data (data-oblivious). The
    mean squared error of a unit vector is about 0.36, 0.117, 0.034 and 0.009 at 1 to 4 bits, whatever the vectors; with
    `renormalise` it is 0.40 and 0.121 at 1 and 2 bits.

    Cost: `bits` bits for each channel and 2 bytes for each key; for values as many bits, and 4 bytes for a scale and a
    zero; one more product with a `d x d` matrix for each query. The wrong choice where a few channels are much larger
    than others in every token: rotation spreads their error over all channels, where KIVI's groups keep it in one. On
    Qwen2.5-Coder 0.5B, 4 bits in all layers cost 1.06 nats of next-token loss, and 0.04 with two dense layers at each
    end.

    Args:
        bits: width of a key's code, 1, 2, 3, 4 or 8, in all layers or a tuple with one for each; None encodes nothing.
        value_bits: the same for values; None takes `bits`.
        values: "uniform" quantises a value at equal steps between its least and largest channel, as vLLM does;
            "centroids" as keys are, as the paper does.
        renormalise: whether a decoded vector gets the norm of the encoded one (vLLM's "nc").
        rotation: "hadamard" with random signs, for widths that are powers of two, or "random".
        seed: seed of the rotation.
        dense: see `EncodingPolicy`; vLLM leaves out two layers at each end, where errors cost most.
        residual, group, layers: see `EncodingPolicy`. The paper and vLLM encode every token at once (`residual=0`).

    The paper's second stage, a one-bit sketch of the error that makes dot products unbiased (QJL), is left out, as in
    vLLM, where it lowered the quality.
    """

    residual: int = 0
    dense: int = 2
    bits: Bits = 4
    value_bits: Bits = None
    values: Literal["uniform", "centroids"] = "uniform"
    renormalise: bool = True
    rotation: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("bits", self.bits, _WIDTHS)
        check_bits("value_bits", self.value_bits, _WIDTHS)
        validate.one_of("values", self.values, ("uniform", "centroids"))
        validate.flag("renormalise", self.renormalise)
        validate.one_of("rotation", self.rotation, ("hadamard", "random"))
        validate.count("seed", self.seed)

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_depth("bits", self.bits, host)
        check_depth("value_bits", self.value_bits, host)
        for layer in layout(host).layers:
            for width in (layer.width, layer.value_width)[: 1 + (self.values == "centroids")]:
                if self.rotation == "hadamard" and width & (width - 1):
                    raise OptionError(
                        f"rotation='hadamard' needs a power of two, and layer {layer.layer} has {width} channels; use "
                        f"rotation='random'"
                    )

    def coding(self, order: int, site: Site | None) -> Coding | None:
        bits = bits_at(self.bits, order)
        if bits is None:
            return None
        value_bits = bits_at(self.value_bits, order) or bits
        values: Codec = Uniform(value_bits, _ALL, "token")
        if self.values == "centroids":
            values = self._rotated(value_bits)
        return Coding(self._rotated(bits), values, self.group, self.residual)

    def _rotated(self, bits: int) -> Rotated:
        return Rotated(bits, self.rotation, self.renormalise, self.seed)

    @classmethod
    def choices(cls, host: Host, residual: int, group: int) -> Iterator[Self]:
        """See `EncodingPolicy.choices`. Deep models leave out two layers at each end where the budget allows it."""
        found = layout(host).layers
        plain = all(layer.width & (layer.width - 1) == 0 for layer in found)
        kind: RotationKind = "hadamard" if plain else "random"
        for bits in (None, 8, 4, 3, 2):
            for dense in (2, 0) if len(found) >= _DEEP else (0,):
                yield cls(bits=bits, dense=dense, residual=residual, group=group, rotation=kind)


_DEEP = 12
