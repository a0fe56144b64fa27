"""Call an attention module for its queries, keys and values alone: no attention, no cache, no methods."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.calls import parameters

_LOCAL = threading.local()

#: The queries, keys and values of a call of the attention interface.
Inputs = tuple[Float[Tensor, "b hq n d"], Float[Tensor, "b hkv n d"], Float[Tensor, "b hkv n dv"]]


class _TakenError(Exception):
    """A call that was ended where its attention would begin."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs


def hand_over(q: Tensor, k: Tensor, v: Tensor) -> None:
    """End the call of an attention module, if only its queries, keys and values were asked for."""
    if getattr(_LOCAL, "is_taking", False):
        raise _TakenError((q, k, v))


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an attention module by name, its hidden states first."""
    return {**dict(zip(parameters(type(module).forward), args, strict=False)), **kwargs}


def hidden_name(arguments: Mapping[str, Any]) -> str:
    """Return the name of the argument that holds the hidden states."""
    return "hidden_states" if "hidden_states" in arguments else next(iter(arguments))


def take_inputs(module: nn.Module, arguments: Mapping[str, Any], hidden: Float[Tensor, "b n c"]) -> Inputs:
    """Return the queries, keys and values that an attention module makes of hidden states, rotary embedding included.

    Works inside `foveate.apply`. The module's own projections, norms and embeddings run, and carry gradients.

    Args:
        module: the attention module.
        arguments: those of a call in a forward pass, see `arguments_of`; they say the positions.
        hidden: the hidden states that stand in place of the call's own.
    """
    given = {name: None if isinstance(value, Cache) else value for name, value in arguments.items()}
    given[hidden_name(arguments)] = hidden
    _LOCAL.is_taking = True
    try:
        module.forward(**given)
    except _TakenError as taken:
        return taken.inputs
    finally:
        _LOCAL.is_taking = False
    raise UnsupportedModel(f"{type(module).__name__} did not attend when it was called for its queries and keys")


def mapped(arguments: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return the arguments of a call with a change to each tensor in them, also those in tuples and lists."""

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if type(value) in (tuple, list):
            return type(value)(each(part) for part in value)
        return value

    return {name: each(value) for name, value in arguments.items()}
