"""The base class of pools: N tokens `(B, N, C)` in, K vectors `(B, K, out)` out, for any N.

Pools read the tokens of a frozen encoder, the instances of a bag or the words of a sentence. The base class checks a
call and handles masks; subclasses define `_pool`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown


class Pooled(NamedTuple):
    """Pooled vectors, and the weights that made them; weights of a map add up to 1 over the real tokens."""

    vectors: Float[Tensor, "b k c"]
    weights: Float[Tensor, "b m n"]


class Pool(Checked, nn.Module, ABC):
    """A layer that turns a set of tokens into a fixed number of vectors.

    Attributes:
        dim: C, the width of tokens.
        slots: K, the number of vectors.
        out_dim: the width of a vector.
        maps: M, the number of weight maps.
    """

    def __init__(self, dim: int, *, slots: int = 1, out_dim: int | None = None, maps: int = 1) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        for name, value in {"dim": dim, "slots": slots, "out_dim": out_dim, "maps": maps}.items():
            validate.count(name, value, 1)
        self.dim, self.slots, self.out_dim, self.maps = dim, slots, out_dim, maps

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b k out"]:
        """Return the pooled vectors.

        Args:
            x: tokens `(B, N, C)`.
            mask: True for real tokens; None for all. What stands in the others has no effect. An example without a real
                token gets weights of zero.

        Raises:
            ShapeError: malformed tokens, or a mask that does not fit them.
        """
        return self.read(x, mask).vectors

    def weights(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b m n"]:
        """Return the weight maps of a call."""
        return self.read(x, mask).weights

    def read(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Pooled:
        """Return the pooled vectors and their weight maps."""
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x must be (B, N, C={self.dim}); got {shown(x)}")
        if mask is not None:
            validate.bool_mask("mask", mask, "B, N", tuple(x.shape[:2]), x.device)
            mask = mask.expand(x.shape[:2])
            x = x.masked_fill(~mask[..., None], 0.0)
        return self._pool(x, mask)

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, dim: int) -> Self:
        """Make an instance for tokens of this width, in which the mechanism has an effect; tests run it."""
        return cls(dim)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _pool(self, x: Tensor, mask: Tensor | None) -> Pooled:
        """Pool tokens; those outside the mask are zeros."""
