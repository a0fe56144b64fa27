"""Other positions for a block: those of tokens that took consecutive numbers when others were dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.calls import parameters
from foveate.host.kept import taken
from foveate.host.stream import Stream


@dataclass(slots=True)
class Rotaries:
    """The calls of a decoder's rotary embeddings in one pass, which can be repeated at other positions.

    Args:
        calls: module, arguments by name, and output of each.
        made: embeddings at other positions, by the output that they replace.
    """

    calls: list[tuple[Any, dict[str, Any], Any]] = field(default_factory=list)
    made: dict[Any, Any] = field(default_factory=dict)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record a call."""
        given = {**dict(zip(parameters(type(module).forward), args, strict=False)), **kwargs}
        self.calls.append((module, given, output))

    def clear(self) -> None:
        self.calls.clear()
        self.made.clear()

    def at(self, value: Any, shift: Int[Tensor, "b n"], index: Int[Tensor, "b n"] | None) -> Any:
        """Return embeddings at other positions in place of the output of a call; None if it is none.

        Args:
            value: an argument of a block.
            shift: how much earlier each position becomes.
            index: the tokens that are left; None for all.
        """
        for module, given, output in self.calls:
            if output is value or _same(output, value):
                key = (id(output), id(shift))  # layers share embeddings
                if key not in self.made:
                    ids = shifted(given.get("position_ids"), shift, index)
                    self.made[key] = module.forward(**{**given, "position_ids": ids}), output, shift
                return self.made[key][0]
        return None


def _same(output: Any, value: Any) -> bool:
    if type(output) is not tuple or type(value) is not tuple or len(output) != len(value):
        return False
    return all(a is b for a, b in zip(output, value, strict=True))


def rotaries_of(part: nn.Module, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules outside the blocks that make embeddings of positions."""
    inside = {module for block in blocks for module in block.modules()}
    for module in part.modules():
        if module not in inside and "position_ids" in parameters(type(module).forward) and _rotates(module):
            yield module


def _rotates(module: nn.Module) -> bool:
    return any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))


def shifted(ids: Any, shift: Int[Tensor, "b n"], index: Int[Tensor, "b n"] | None) -> Int[Tensor, "b n"]:
    """Return positions after a shift, of the tokens that are left."""
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UnsupportedModel(
            "positions of several axes, as of images in time and space, cannot be renumbered; keep the original ones"
        )
    return (ids.expand(len(shift), -1) if index is None else taken(ids, index)) - shift


def renumbered(
    stream: Stream, rotaries: Rotaries, shift: Int[Tensor, "b n"], block: nn.Module, given: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a block that say positions, after a shift.

    Args:
        stream: the tokens that are left.
        rotaries: the calls of the pass.
        shift: how much earlier each position becomes.
        block: the block.
        given: its arguments as the model gave them, by name.

    Raises:
        UnsupportedModel: positions entered the model before this block.
    """
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name == "position_ids" and isinstance(value, Tensor):
            if not rotaries.calls and not any(_rotates(module) for module in block.modules()):
                continue  # they are here, and nothing reads them
            changed[name] = shifted(value, shift, stream.index)
        elif type(value) is tuple or isinstance(value, Tensor):
            found = rotaries.at(value, shift, stream.index)
            if found is not None:
                changed[name] = found
    if not changed or ("position_embeddings" in given and "position_embeddings" not in changed):
        raise UnsupportedModel(
            f"{type(block).__name__} is given no positions that could be renumbered; keep the original ones"
        )
    return changed
