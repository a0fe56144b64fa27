"""The base class of policies that hold older tokens encoded, and drop none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, shown
from foveate.host import Host
from foveate.host.hf.layout import layout
from foveate.host.site import Site
from foveate.host.slots.codec import Coding
from foveate.kv.base.policy import Policy, check_budget, check_layers


@dataclass(eq=False)
class EncodingPolicy(Policy):
    """Older tokens are held encoded, a group at a time, and the newest ones in full precision.

    A group is encoded once, when the layer has that many tokens beside the residual. Attention decodes chunks of tokens
    into a small buffer, so that no copy of the whole cache is made. Before a method that evicts, as in
    `apply(model, SnapKV(...), KIVI(...))`, tokens are dropped first, and those that stay are encoded. A system writes
    `coding`, and `choices` for `at_budget`.

    Args:
        residual: newest tokens of each head that are never encoded. Until the next group is full, up to `group - 1`
            more are not.
        group: tokens that are encoded at a time.
        dense: number of attending layers at each end of the model that hold everything in full precision.
        layers: numbers of the layers, in the cache, that the policy acts on; None for all.
    """

    residual: int = 128
    group: int = 32
    dense: int = 0
    layers: tuple[int, ...] | None = None
    encodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        validate.count("residual", self.residual)
        validate.count("group", self.group, 1)
        validate.count("dense", self.dense)
        if self.layers is not None and not isinstance(self.layers, tuple | list):
            raise OptionError(f"layers={shown(self.layers)} must be a tuple of layer numbers, or None for all")
        self._depth = 0

    # -- what a system writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def coding(self, order: int, site: Site | None) -> Coding | None:
        """Return how the attending layer of this order holds its older tokens; None as they are.

        `site` is its call, or None to count bytes.
        """

    @classmethod
    @abstractmethod
    def choices(cls, host: Host, residual: int, group: int) -> Iterator[Self]:
        """Yield the policy at its widths, from full precision to the narrowest."""

    # -- what the base makes of it -------------------------------------------------------------------------------------

    def bind(self, host: Host) -> None:
        super().bind(host)
        check_layers(self.layers, host)
        self._depth = len(layout(host))
        for order, layer in enumerate(layout(host).layers):
            if layer.expanded and self._acts(order, layer.layer, self._depth):
                raise UnsupportedModel(
                    f"{type(host.model).__name__} computes the keys of layer {layer.layer} anew at each call, "
                    f"so that its tokens cannot be held encoded; leave it out with layers=, or evict instead"
                )
        if self.dense and 2 * self.dense >= self._depth:
            raise OptionError(f"dense={self.dense} leaves none of the model's {self._depth} attending layers to encode")

    def at(self, site: Site) -> bool:
        return self._acts(site.order, site.layer, self._depth)

    def _acts(self, order: int, layer: int, depth: int) -> bool:
        chosen = self.layers is None or layer in self.layers
        return chosen and self.dense <= order < depth - self.dense

    def encode(self, site: Site) -> Coding | None:
        return self.coding(site.order, site)

    def share(self, host: Host, length: int) -> float:
        """Return the share of the full cache's bytes that the policy holds after `length` tokens, at most."""
        dtype, found = next(host.model.parameters()).dtype, layout(host)
        stored = full = 0.0
        for order, layer in enumerate(found.layers):
            tokens = length if layer.window is None else min(length, layer.window)
            size = (layer.width + layer.value_width) * dtype.itemsize
            coding = self.coding(order, None) if self._acts(order, layer.layer, len(found)) else None
            whole = tokens if coding is None else min(tokens, coding.residual + coding.group - 1)
            coded = 0.0
            if coding is not None:
                coded = coding.nbytes(tokens - whole, layer.width, layer.value_width, dtype)
            stored += layer.kv_heads * (whole * size + coded)
            full += layer.kv_heads * length * size
        return stored / full

    @classmethod
    def least(cls, host: Host, length: int) -> float:
        """Return the smallest budget that the policy can meet."""
        return min(policy.share(host, length) for policy in cls._candidates(host))

    @classmethod
    def at_budget(cls, budget: float, host: Host, length: int, **learnt: Tensor) -> Self:
        """See `Policy.at_budget`. The budget is of bytes: the widest codes that fit, and then the longest residual."""
        check_budget(budget, length)
        for policy in cls._candidates(host):
            if policy.share(host, length) <= budget:
                return policy
        raise OptionError(
            f"budget={budget} is less than the {cls.least(host, length):.3g} of the bytes of {length} tokens that "
            f"{cls.__name__} needs in this model; give it more, or evict first"
        )

    @classmethod
    def _candidates(cls, host: Host) -> Iterator[Self]:
        """Yield policies from the dearest to the cheapest: by width, and then by the length of the residual."""
        for width in zip(*(cls.choices(host, residual, group) for residual, group in _SIZES), strict=True):
            yield from width


#: Residuals and groups that `at_budget` tries.
_SIZES = ((128, 32), (64, 32), (32, 32), (16, 16), (8, 8), (4, 4), (0, 4))


#: The width of a code in every layer, or in each attending layer; None holds a layer in full precision.
Bits = int | tuple[int | None, ...] | None


def check_bits(name: str, bits: object, widths: tuple[int, ...]) -> None:
    """Refuse widths of codes that are none of `widths`."""
    for one in bits if isinstance(bits, tuple | list) else (bits,):
        if one is not None and (isinstance(one, bool) or one not in widths):
            raise OptionError(
                f"{name}={shown(bits)} must be one of {', '.join(map(str, widths))}, None for full precision, or a "
                f"tuple of these with one for each attending layer"
            )


def bits_at(bits: Bits, order: int) -> int | None:
    """Return the width at one attending layer."""
    return bits[order] if isinstance(bits, tuple | list) else bits


def check_depth(name: str, bits: Bits, host: Host) -> None:
    """Refuse a tuple of widths that does not fit a model's layers."""
    if isinstance(bits, tuple | list) and len(bits) != len(layout(host)):
        raise OptionError(
            f"{name} has {len(bits)} widths, and {type(host.model).__name__} has {len(layout(host))} attending layers"
        )
