"""A diffusion model as a host: its attention modules, found by the processors that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.model import check_heads

#: Processors that compute attention without a softmax, so that it has no weights and methods have no place there.
LINEAR = frozenset({
    "SanaLinearAttnProcessor2_0", "SanaLinearAttnProcessor3_0", "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0", "SanaMultiscaleAttnProcessor2_0",
})  # fmt: skip


@dataclass(frozen=True)
class DiffusionHost:
    """A network whose attention modules hold processors, as those of diffusers do.

    Layers are attention modules, numbered in the order of `model.modules()`. Those of linear attention are left out.
    """

    model: nn.Module

    @property
    def layers(self) -> int:
        return len(self.attention_modules())

    @property
    def heads(self) -> int:
        """Query heads of the widest layer."""
        return max(heads_of(module) for module in self.attention_modules())

    @property
    def decoder(self) -> None:
        """The part that generates text: there is none."""

    @property
    def config(self) -> NoReturn:
        raise UnsupportedModel(
            f"{type(self.model).__name__} is a diffusion model, and the method reads the configuration of a "
            f"transformers model"
        )

    def attention_modules(self) -> list[nn.Module]:
        """Return the modules of softmax attention."""
        modules = [module for module in self.model.modules() if holds_processor(module)]
        return [module for module in modules if type(module.processor).__name__ not in LINEAR]

    def part(self, crosses: bool) -> list[nn.Module]:
        """Return the modules of cross-attention, or all others: self-attention, and attention to both joined."""
        return [module for module in self.attention_modules() if may_cross(module) == crosses]

    def check_heads(self, heads: Iterable[tuple[int, int]]) -> None:
        """Refuse a pair of layer and query head that the model does not have."""
        check_heads(heads, self.layers, self.heads)


def heads_of(module: nn.Module) -> int:
    """Return the number of query heads of an attention module."""
    heads: Any = module.heads
    return int(heads)


def holds_processor(module: nn.Module) -> bool:
    """Return whether a module leaves its attention to a processor."""
    return hasattr(module, "processor") and callable(getattr(module, "set_processor", None))


def may_cross(module: nn.Module) -> bool:
    """Return whether a module takes its keys from a context, such as the prompt."""
    return bool(getattr(module, "is_cross_attention", False))


def is_diffusion_model(model: object) -> bool:
    """Return whether a model is a network with attention processors, and not a transformers model."""
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return False
    return any(holds_processor(module) for module in model.modules())


def diffusion_host(model: nn.Module) -> DiffusionHost:
    """Return a diffusion model as a host.

    Raises:
        UnsupportedModel: it is compiled, or has linear attention alone.
    """
    name, found = type(model).__name__, DiffusionHost(model)
    if any(getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
           for module in model.modules()):  # fmt: skip
        raise UnsupportedModel(f"{name} is compiled, and methods act on the model as it was before compile()")
    if not found.attention_modules():
        raise UnsupportedModel(f"{name} has linear attention alone, which has no weights that a method could act on")
    return found


def refuse_pipeline(model: object) -> None:
    """Refuse a pipeline of diffusers with a word about its network."""
    if not isinstance(model, nn.Module) and type(model).__module__.startswith("diffusers."):
        raise UnsupportedModel(
            f"{type(model).__name__} is a pipeline of several models: apply to pipe.unet or pipe.transformer"
        )
