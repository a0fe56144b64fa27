"""The base class of pools: N tokens `(B, N, C)` in, K vectors `(B, K, out)` out, for any N.

Pools read the tokens of a frozen encoder, the instances of a bag or the words of a sentence. The base class checks a
call and handles masks; subclasses define `_pool`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown
from foveate.core.scoring import safe_softmax


class Pooled(NamedTuple):
    """Pooled vectors, and the weights that made them; weights of a map add up to 1 over the real tokens."""

    vectors: Float[Tensor, "b k c"]
    weights: Float[Tensor, "b m n"]


class Pool(Checked, nn.Module, ABC):
    """A layer that turns a set of tokens into a fixed number of vectors, whatever the order of the tokens.

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

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "#b #n"] | None = None) -> Float[Tensor, "b k out"]:
        """Return the pooled vectors.

        Args:
            x: tokens `(B, N, C)`.
            mask: True for real tokens, `(B, N)` or `(1, N)`; None for all. What stands in the others has no effect. An
                example without a real token gets weights of zero.

        Raises:
            ShapeError: malformed tokens, or a mask that does not fit them.
        """
        return self._vectors(*real_tokens(x, mask, self.dim))

    def weights(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "#b #n"] | None = None) -> Float[Tensor, "b m n"]:
        """Return the weight maps of a call."""
        return self.read(x, mask).weights

    def read(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "#b #n"] | None = None) -> Pooled:
        """Return the pooled vectors and their weight maps."""
        return self._pool(*real_tokens(x, mask, self.dim))

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

    def _vectors(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vectors alone; pools that make them faster without their weights override it."""
        return self._pool(x, mask).vectors

    def _softmax(self, logits: Float[Tensor, "b m n"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b m n"]:
        """Return the softmax of each map over the real tokens."""
        return safe_softmax(logits if mask is None else logits.masked_fill(~mask[:, None], masks.NEG_INF))


def real_tokens(x: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Check tokens `(B, N, C)` and their mask; return the tokens, zeros outside the mask, and the mask `(B, N)`."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != dim or not x.shape[1]:
        raise ShapeError(f"x must be (B, N, C={dim}) with N > 0; got {shown(x)}")
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point; got {x.dtype}")
    if mask is None:
        return x, None
    validate.bool_mask("mask", mask, "B, N", tuple(x.shape[:2]), x.device)
    mask = mask.expand(x.shape[:2])
    return x.masked_fill(~mask[..., None], 0.0), mask
