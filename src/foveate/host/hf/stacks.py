"""The stacks of blocks of a model from which tokens may be dropped, and the part that each belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.blocks import blocks_of
from foveate.host.hf.calls import CROSS, parameters
from foveate.host.hf.model import Host
from foveate.host.stack_part import StackPart


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of an encoder or a decoder.

    Args:
        root: the innermost pretrained model around them.
        part: the part of the model.
        blocks: the blocks, in order.
        attention: the attention module of each block.
    """

    root: PreTrainedModel
    part: StackPart
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]


def stacks_of(host: Host, parts: Iterable[StackPart]) -> list[Stack]:
    """Return the stacks of these parts of a model.

    Raises:
        UnsupportedModel: a block does not attend to its own sequence, once.
    """
    by_root: dict[PreTrainedModel, list[nn.Module]] = {}
    for module, root in _roots(host).items():
        by_root.setdefault(root, []).append(module)
    wanted = set(parts)
    return [_stack(host, root, found) for root, found in by_root.items() if part_of(root) in wanted]


def part_of(root: PreTrainedModel) -> StackPart:
    """Return the part that a pretrained model is, by what it reads."""
    return "image" if root.main_input_name == "pixel_values" else "text"


def image_attention(host: Host) -> list[nn.Module]:
    """Return the attention modules of image encoders."""
    return [module for module, root in _roots(host).items() if part_of(root) == "image"]


def _roots(host: Host) -> dict[nn.Module, PreTrainedModel]:
    """Return the innermost pretrained model around each attention module."""
    found: dict[nn.Module, PreTrainedModel] = {}
    for root in host.model.modules():  # outer ones come first
        if isinstance(root, PreTrainedModel):
            inside = set(root.modules())
            found.update({module: root for module in host.attention_modules() if module in inside})
    return found


def _stack(host: Host, root: PreTrainedModel, attention: list[nn.Module]) -> Stack:
    name, config = type(root).__name__, _config(root)
    crossing = [module for module in attention if {*CROSS} & set(parameters(type(module).forward))]
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"tokens cannot be dropped in {name}: its blocks attend to another sequence too")
    depth = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "depth", 0))
    blocks = blocks_of(root, attention, depth, "drop")
    own = [[module for module in block.modules() if module in set(attention)] for block in blocks]
    if any(len(each) != 1 for each in own) or (crossing and part_of(root) == "text" and _always_crosses(crossing)):
        raise UnsupportedModel(
            f"tokens cannot be dropped in {name}: each block has to attend once, to its own sequence, through "
            f"transformers' attention interface"
        )
    shared = [module for module in attention if getattr(module, "is_kv_shared_layer", False)]
    if shared:
        raise UnsupportedModel(f"tokens cannot be dropped in {name}: its layers share keys")
    return Stack(root, part_of(root), tuple(blocks), tuple(each[0] for each in own))


def _always_crosses(modules: list[nn.Module]) -> bool:
    return any("cross_attention_states" in parameters(type(module).forward) for module in modules)


def _config(root: PreTrainedModel) -> Any:
    return root.config.get_text_config() if part_of(root) == "text" else root.config
