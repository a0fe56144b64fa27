"""The queries' own sequence, in a call that attends to another one (cross attention)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.host.hf.mask import MaskPlan


@dataclass(frozen=True, eq=False)
class OwnSequence:
    """The queries' own sequence, in a call that attends to another one.

    Args:
        past: its tokens before the call.
        mask: the mask of its own attention.
    """

    past: int = 0
    mask: MaskPlan | Tensor | None = None


def crossing(layer: int | None) -> str:
    """Return the name of a layer's calls to another sequence, in notes; None for those of all layers."""
    return f"{layer}, to another sequence"
