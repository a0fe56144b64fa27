"""The blocks of a model, found from its modules without class names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from foveate.core.errors import UnsupportedModel


def blocks_of(root: nn.Module, attending: Iterable[nn.Module], depth: int, who: str = "edit_hidden") -> list[nn.Module]:
    """Return the blocks of a stack, in order: the items of the list of modules that holds its attention modules.

    Blocks that do not attend (convolutions, states) are among them. Of several lists around an attention module, the
    stack is the outermost one with `depth` items, or else the innermost one.

    Args:
        root: holds the stack.
        attending: its attention modules.
        depth: the number of layers that the configuration names.
        who: the hook that asks, for errors.

    Raises:
        UnsupportedModel: an attention module stands in no list, or the modules stand in several.
    """
    parents = {child: parent for parent in root.modules() for child in parent.children()}
    stacks: dict[nn.Module, None] = {}
    for module in attending:
        around = _lists_around(module, parents)
        if not around:
            raise UnsupportedModel(
                f"{type(module).__name__} of {type(root).__name__} stands in no list of blocks, so that the stream "
                f"between blocks is unknown"
            )
        stacks[next((each for each in reversed(around) if len(each) == depth), around[0])] = None
    if len(stacks) != 1:
        raise UnsupportedModel(
            f"{type(root).__name__} has {len(stacks)} lists of blocks that attend, and {who} needs one"
        )
    (stack,) = stacks
    assert isinstance(stack, nn.ModuleList)
    return list(stack)


def _lists_around(module: nn.Module, parents: dict[nn.Module, nn.Module]) -> list[nn.ModuleList]:
    """Return the lists that a module stands in, the innermost first."""
    found = []
    while module in parents:
        module = parents[module]
        if isinstance(module, nn.ModuleList):
            found.append(module)
    return found
