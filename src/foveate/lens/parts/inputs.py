"""The inputs of a model by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown


def by_name(model: Any, inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's inputs by name, where one tensor is its main input."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if not isinstance(inputs, Tensor):
        raise OptionError(
            f"inputs must be a tensor or a tokenizer's mapping, such as tokenizer(text, return_tensors='pt'); got a "
            f"{type(inputs).__name__}"
        )
    name = getattr(model, "main_input_name", None)
    if not isinstance(name, str):
        raise OptionError(f"{type(model).__name__} has no single main input: give inputs by name, as {{name: tensor}}")
    return {name: inputs}


def check_ids(ids: object) -> None:
    """Refuse tokens that a model would fail on in the middle of its layers; None stands for other inputs."""
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise ShapeError(f"input_ids must be whole numbers (B, N), such as ids[None] of one text; got {shown(ids)}")
