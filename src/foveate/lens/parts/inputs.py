"""The inputs of a model by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.core.errors import OptionError


def by_name(model: Any, inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's inputs by name, where one tensor is its main input."""
    if not isinstance(inputs, Tensor):
        return dict(inputs)
    name = getattr(model, "main_input_name", None)
    if not isinstance(name, str):
        raise OptionError(f"{type(model).__name__} has no single main input: give inputs by name, as {{name: tensor}}")
    return {name: inputs}
