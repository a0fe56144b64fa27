"""Position encodings: schemes that a layer applies to its queries, keys and scores."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.ops.functional import alibi, rotary


class Position(nn.Module, ABC):
    """A scheme rotates queries and keys by their positions, or adds a bias to their scores, or both.

    Positions `at` are `(N,)`, counted in the sequence. Queries and keys are `(B, H, N, D)`.
    """

    #: True if `bias` is not None; a layer then needs an operator that takes a bias, and does not stream.
    biased: ClassVar[bool] = False

    def rotate(self, x: Float[Tensor, "b h n d"], at: Tensor) -> Float[Tensor, "b h n d"]:
        """Return queries or keys for the operator."""
        return x

    def bias(self, queries: Tensor, keys: Tensor) -> Float[Tensor, "h q k"] | None:
        """Return the bias on the scores of queries and keys at these positions, or None."""
        return None


@final
class Rotary(Position):
    """Pairs of channels rotate by angles that grow with the position: scores depend on distances (RoFormer, 2021).

    Args:
        base: the base of the frequencies `base ** (-2c / D)`.
        layout: the channels of a pair. "half": c and c + D/2, as in Hugging Face's Llama and GPT-NeoX.
            "interleaved": 2c and 2c + 1, as in RoFormer, Meta's Llama and GPT-J. Weights trained with one are wrong in
            the other.
    """

    def __init__(self, base: float = 10_000.0, layout: rotary.Layout = "half") -> None:
        super().__init__()
        validate.at_least("base", base, 1)
        validate.one_of("layout", layout, ("half", "interleaved"))
        self.base, self.layout = base, layout

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        angles = rotary.rotary_angles(at, x.shape[-1], self.base).to(x.device)
        return rotary.rotate(x, angles, self.layout).to(x.dtype)


@final
class Alibi(Position):
    """Scores fall with distance, at a rate per head (Train Short, Test Long, 2021)."""

    biased = True
    slopes: Float[Tensor, " h"]

    def __init__(self, heads: int) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        self.register_buffer("slopes", alibi.alibi_slopes(heads), persistent=False)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        return -self.slopes[:, None, None] * (queries[:, None] - keys).abs()


@final
class RelativeBias(Position):
    """A learned number for each head and distance; distances beyond `reach` are clipped.

    Args:
        heads: H.
        reach: the largest distance with its own number, in either direction.
    """

    biased = True

    def __init__(self, heads: int, reach: int = 128) -> None:
        super().__init__()
        validate.count("heads", heads, 1)
        validate.count("reach", reach, 1)
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(heads, 2 * reach + 1))

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.table[:, (keys - queries[:, None]).clamp(-self.reach, self.reach) + self.reach]


def check(position: object, heads: int) -> None:
    """Refuse an object that is no scheme, or a scheme for another number of heads."""
    if position is not None and not isinstance(position, Position):
        raise OptionError(f"position={shown(position)} must be a foveate.nn.Position, such as Rotary(), or None")
    made_for = heads
    if isinstance(position, Alibi):
        made_for = len(position.slopes)
    elif isinstance(position, RelativeBias):
        made_for = len(position.table)
    if made_for != heads:
        raise OptionError(f"position is for {made_for} heads; the layer has heads={heads}")
