"""The arguments of a block behind dropped tokens: masks, positions and all else that has an entry for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.calls import parameters
from foveate.host.hf.kept_mask import KeptMask, kept_mask
from foveate.host.hf.mask import MaskPlan
from foveate.host.kept import taken
from foveate.host.stream import Stream

#: The arguments of a block's call, by position and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BlockArguments:
    """The arguments of a block's call.

    Args:
        block: the block.
        args, kwargs: its arguments, hidden states among them.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    @property
    def named(self) -> dict[str, Any]:
        """All arguments but the hidden states, by name."""
        names = parameters(type(self.block).forward)
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        given.pop(names[0], None)
        given.pop("hidden_states", None)
        return given

    def plans(self) -> list[MaskPlan]:
        """Return the descriptions of masks among them."""
        return [value for value in self.named.values() if isinstance(value, MaskPlan)]

    def replaced(self, hidden: Tensor, change: Callable[[str, Any], Any]) -> Arguments:
        """Return the arguments with other hidden states, and with a change to each of the others.

        They stay where they are, by position or by name, since other hooks read them there.
        """
        names = parameters(type(self.block).forward)
        args = tuple(change(name, value) for name, value in zip(names[1:], self.args[1:], strict=False))
        args += self.args[1 + len(args) :]
        kwargs = {name: change(name, value) for name, value in self.kwargs.items() if name != "hidden_states"}
        if self.args:
            return (hidden, *args), kwargs
        return (), {"hidden_states": hidden, **kwargs}


def followed(stream: Stream, block: nn.Module, name: str, value: Any, cached: bool) -> Any:
    """Return what is left of an argument of a block.

    Args:
        stream: the tokens that are left.
        block: the block, for errors.
        name, value: the argument; nests of tensors are followed too.
        cached: whether a cache stores the keys.

    Raises:
        UnsupportedModel: it has an entry for each token on an axis that this function does not know.
    """
    if stream.index is None:
        return value
    if type(value) in (tuple, list):
        return type(value)(followed(stream, block, name, part, cached) for part in value)
    if type(value) is dict:
        return {key: followed(stream, block, name, part, cached) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    key = (id(value), cached)  # layers share masks and positions
    if key not in stream.memo:
        stream.memo[key] = _followed(stream, block, name, value, cached), value
    return stream.memo[key][0]


def _followed(stream: Stream, block: nn.Module, name: str, value: Tensor, cached: bool) -> Any:
    index, tokens = stream.index, stream.tokens
    assert index is not None
    if isinstance(value, MaskPlan):
        if value.arguments["q_length"] != tokens:
            raise UnsupportedModel(
                f"{type(block).__name__} is given a mask {tuple(value.shape)} for {tokens} tokens, which dropped "
                f"tokens cannot be taken out of"
            )
        return KeptMask.of(value.whole, index, cached)
    if value.dim() == 4 and value.shape[2] == tokens and ("mask" in name or "bias" in name):
        return kept_mask(value, index, cached)
    if tokens not in value.shape:
        return value
    for dim in (1, 2):
        if value.dim() > dim and value.shape[dim] == tokens and value.shape[dim - 1] in (1, len(index)):
            return taken(value, index, dim)
    raise UnsupportedModel(
        f"{type(block).__name__} is given {name} {tuple(value.shape)} for {tokens} tokens, which dropped tokens cannot "
        f"be taken out of"
    )
