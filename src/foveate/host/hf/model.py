"""A pretrained model as a host: its attention modules, and what its configuration says about them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.errors import OptionError, UnsupportedModel


@dataclass(frozen=True)
class Host:
    """A model that uses transformers' attention interface."""

    model: PreTrainedModel

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the language part."""
        return self.model.config.get_text_config()

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def decoder(self) -> nn.Module | None:
        """The part that generates text: the model itself, or its decoder behind an encoder or a vision tower.

        None if no module attends causally.
        """
        if not any(_writes(module) for module in self.attention_modules()):
            return None
        found = self.model.get_decoder()
        if isinstance(found, nn.Module) and any(_writes(module) for module in found.modules()):
            return found
        return self.model

    @property
    def language_part(self) -> nn.Module:
        """The part that reads embeddings of tokens: the decoder, also one that attends both ways; else the model."""
        found: object = self.decoder
        found = self.model.get_decoder() if found is None else found
        if not isinstance(found, nn.Module):
            return self.model
        inside = set(found.modules())
        return found if any(module in inside for module in self.attention_modules()) else self.model

    def scope(self, on: str = "auto") -> list[nn.Module]:
        """Return the attention modules of a part of the model: "decoder", "all", or "auto" (the decoder, else all)."""
        modules, decoder = self.attention_modules(), self.decoder if on != "all" else None
        if on == "decoder" and decoder is None:
            raise UnsupportedModel(f'on="decoder": {type(self.model).__name__} has no decoder')
        if decoder is None:
            return modules
        inside = set(decoder.modules())
        return [module for module in modules if module in inside]

    def attention_modules(self) -> list[nn.Module]:
        """Return the modules that call the interface: those with a configuration and an `is_causal` flag."""
        return [
            module
            for module in self.model.modules()
            if isinstance(getattr(module, "config", None), PreTrainedConfig)
            and isinstance(getattr(module, "is_causal", None), bool)
            and not isinstance(module, PreTrainedModel)
        ]

    def check_heads(self, heads: Iterable[tuple[int, int]]) -> None:
        """Refuse a pair of layer and query head that the model does not have."""
        check_heads(heads, self.layers, self.heads)

    def configs(self) -> Iterator[PreTrainedConfig]:
        """Yield every configuration object from which a part of the model reads its attention implementation."""
        seen = set()
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and id(config) not in seen:
                seen.add(id(config))
                yield config


def _writes(module: nn.Module) -> bool:
    """Return whether a module attends causally, as a decoder does."""
    return getattr(module, "is_causal", None) is True or getattr(module, "is_decoder", None) is True


#: Where torch.compile, parallel wrappers and others hold the model that they wrap.
_WRAPPED = ("_orig_mod", "module", "model")


def host(model: object) -> Host:
    """Return the model as a host.

    Raises:
        UnsupportedModel: the model does not use the attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        inside = (name for name in _WRAPPED if isinstance(getattr(model, name, None), PreTrainedModel))
        hint = next((f": give the model inside it, model.{name}" for name in inside), "")
        raise UnsupportedModel(f"model must be a transformers PreTrainedModel; got {type(model).__name__}{hint}")
    found = Host(model)
    if not model._can_set_attn_implementation() or not found.attention_modules():
        name = type(model).__name__
        raise UnsupportedModel(
            f"model {name} does not go through transformers' attention interface, which apply() needs"
        )
    return found


def check_heads(heads: Iterable[tuple[int, int]], layers: int, count: int) -> None:
    """Refuse a pair of layer and query head that a stack of `layers` layers with `count` heads each does not have."""
    for layer, head in heads:
        if layer not in range(layers) or head not in range(count):
            raise OptionError(
                f"head {layer}.{head} must be in 0.0..{layers - 1}.{count - 1} (layer.head) for this model"
            )


def native_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """Return the attention function that this module calls without Foveate."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if function is None:
        raise UnsupportedModel(
            f'no attention function for implementation "{implementation}" of {type(module).__name__}'
        )
    return function


def plain_call(model: PreTrainedModel) -> dict[str, Any]:
    """Return arguments under which a model keeps no cache and, where it can, computes the logits of one token only.

    The logits of all tokens of a long text may not fit into memory.
    """
    known = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in known}
