"""The tensors inside a stream's state, and their bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors inside a stream's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))


def tensors(state: Any) -> list[Tensor]:
    """Yield the tensors inside a state of lists, tuples, dicts and dataclasses."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors(part)]
    return [tensor for part in vars(state).values() for tensor in tensors(part)] if hasattr(state, "__dict__") else []
