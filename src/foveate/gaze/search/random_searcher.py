"""Search at random: the baseline of models of visual search."""

from __future__ import annotations

from typing import Any, Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.gaze.base.searcher import Searcher


@final
class RandomSearcher(Searcher):
    """A search that knows nothing of the target: each fixation is on a pixel at random, of those that are still open.

    With `objects` of one size it finds the target among N after (N + 1) / 2 fixations on objects, on average.

    Args:
        ior: the side in pixels of the square that is seen around a fixation.
        max_fix: the most fixations, the first one included.
    """

    def __init__(self, ior: int = 10, max_fix: int = 20) -> None:
        super().__init__(ior, max_fix)

    @classmethod
    def example(cls) -> Self:
        return cls(ior=4, max_fix=6)

    def _prepare(self, target: Tensor) -> None:
        return None

    def _priority(
        self, sought: Any, image: Tensor, at: tuple[int, int], seen: Bool[Tensor, "h w"],
        generator: torch.Generator | None,
    ) -> Float[Tensor, "h w"]:  # fmt: skip
        if generator is None:
            raise OptionError("generator=None: a random search needs a torch.Generator")
        return torch.rand(image.shape[-2:], generator=generator, dtype=torch.float64, device=image.device)
