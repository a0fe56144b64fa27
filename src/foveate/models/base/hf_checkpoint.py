"""A trained decoder as a Hugging Face model, saved and loaded in the standard format.

Importing this module registers the model type "foveate" with `AutoModelForCausalLM` and `AutoConfig`.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from foveate.core.errors import UnsupportedModel
from foveate.models.base.decoder import Decoder, embedded
from foveate.models.base.spec import Spec
from foveate.nn import Block, Layer, MultiHeadAttention
from foveate.nn.base.layer import streaming
from foveate.nn.parts.blocks import stacked
from foveate.ops.dense.softmax import Softmax


class FoveateConfig(PreTrainedConfig):
    """A configuration: the network's `Spec` as `network`, and the fields that transformers reads of a decoder."""

    model_type = "foveate"

    def __init__(self, network: dict[str, Any] | None = None, **common: Any) -> None:
        self.network = network or {}
        spec = Spec.from_dict(self.network) if network else None
        if spec is not None:
            common = {
                "vocab_size": spec.vocabulary, "hidden_size": spec.dim, "num_hidden_layers": len(spec.mixers),
                "num_attention_heads": spec.heads, "num_key_value_heads": _kv_heads(spec),
                "tie_word_embeddings": spec.tied,
                "max_position_embeddings": spec.places or None, **common,
            }  # fmt: skip
        super().__init__(**common)


def _kv_heads(spec: Spec) -> int:
    """Return the number of key/value heads of the first layer that has its own number of them."""
    grouped = (mixer.around.get("kv_heads") for mixer in spec.mixers)
    return next((count for count in grouped if count), spec.heads)


class StateLayer(DynamicLayer):
    """A cache layer that holds a layer's own state instead of keys and values, and counts tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def get_seq_length(self) -> int:
        return self.seen


class Attention(nn.Module):
    """A decoder's layer, called as transformers calls attention modules.

    Plain softmax attention uses transformers' attention interface, so that cache policies, steering and `look` work as
    on any other model. Every other layer keeps its own state in the cache and decodes token by token.
    """

    def __init__(self, layer: Layer, config: FoveateConfig, index: int) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, index
        if goes_through_interface(layer):
            self.config, self.is_causal = config, True
            self.scaling = layer.op.capabilities.default_scale or layer.head_dim**-0.5
            self.num_key_value_groups = layer.heads // layer.kv_heads

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Cache | None = None,
        first: int = 0, **call: Any,
    ) -> Tensor:  # fmt: skip
        if not goes_through_interface(self.layer):
            return self._streamed(hidden_states, past_key_values)
        layer = self.layer
        q, k, v = layer.projected(hidden_states, torch.arange(first, first + hidden_states.shape[1]))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = function(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **call)
        return layer.merged(out.transpose(1, 2), hidden_states)

    def _streamed(self, x: Tensor, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.layer(x, causal=True)
        held = cache.layers[self.layer_idx]
        if not isinstance(held, StateLayer):
            held = cache.layers[self.layer_idx] = StateLayer()
        if held.seen == 0 and x.shape[1] > 1:
            out, held.state = streaming(self.layer).prefill(x)
        else:
            out = self._stepped(x, held)
        held.seen += x.shape[1]
        return out

    def _stepped(self, x: Tensor, held: StateLayer) -> Tensor:
        layer = streaming(self.layer)
        state = held.state or layer.init_state(x.shape[0], dtype=x.dtype, device=x.device)
        out = []
        for t in range(x.shape[1]):
            y, state = layer.step(x[:, t : t + 1], state)
            out.append(y)
        held.state = state
        return torch.cat(out, 1)


def goes_through_interface(layer: Layer) -> TypeGuard[MultiHeadAttention]:
    """Return whether the layer is softmax attention that transformers' interface can compute."""
    if not isinstance(layer, MultiHeadAttention) or type(layer.op) is not Softmax or layer.conv is not None:
        return False
    return layer.position is None or not layer.position.biased


def eager_attention_forward(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention and its weights, as transformers' own eager functions do."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    scores = (q * scaling) @ k.mT
    weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, -1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2), weights


class FoveatePreTrainedModel(PreTrainedModel):
    config_class = FoveateConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flex_attn = False
    _tied_weights_keys = {"decoder.head.weight": "decoder.embed.weight"}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: layers initialise themselves."""


class Backbone(nn.Module):
    """A decoder without its head, called as transformers calls one. `get_decoder()` returns it.

    It shares the modules of its decoder, under the same names.
    """

    def __init__(self, decoder: Decoder, config: FoveateConfig) -> None:
        super().__init__()
        self.config, self._decoder = config, [decoder]  # a list is not registered as a module
        self.embed, self.places, self.blocks = decoder.embed, decoder.places, decoder.blocks
        self.norm, self.head = decoder.norm, decoder.head
        for index, block in enumerate(stacked(self.blocks)):
            block.add_module("mixer", Attention(block.mixer, config, index))

    def wrapped(self) -> list[tuple[Block, Attention]]:
        """Return each block, and its layer as transformers calls it."""
        return [(block, cast(Attention, block.mixer)) for block in stacked(self.blocks)]

    def released(self) -> Decoder:
        """Return the decoder without the wrappers."""
        for block, attention in self.wrapped():
            block.mixer = attention.layer
        (decoder,) = self._decoder
        decoder.embed, decoder.head = self.embed, self.head
        return decoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None,
        use_cache: bool | None = None, **call: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        first = 0 if past_key_values is None else past_key_values.get_seq_length()
        x = embedded(self.embed, self.places, input_ids, first)  # its own, which may have been resized or quantised
        mask = self._mask(x, attention_mask, past_key_values, first)
        for block, attention in self.wrapped():
            mixed = attention(block.norm(x), attention_mask=mask, past_key_values=past_key_values, first=first)
            x = block.channels(x + mixed)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )

    def _mask(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, first: int) -> Any:
        through = [goes_through_interface(attention.layer) for _, attention in self.wrapped()]
        if attention_mask is not None and not attention_mask.bool().all() and not all(through):
            raise UnsupportedModel("layers with a state of their own read padding as text; send prompts one by one")
        if not any(through):
            return None
        positions = torch.arange(first, first + x.shape[1], device=x.device)[None]
        return create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=cache,
            position_ids=positions,
        )  # fmt: skip


class FoveateForCausalLM(FoveatePreTrainedModel, GenerationMixin):
    """A `Decoder` that transformers can save, load and generate with."""

    def __init__(self, config: FoveateConfig) -> None:
        super().__init__(config)
        with torch.device("cpu"):  # on transformers' meta device, tables that are not saved would stay empty
            built = Spec.from_dict(config.network).build()
        assert isinstance(built, Decoder)
        self.adopt(built)
        self.post_init()

    def adopt(self, decoder: Decoder) -> None:
        """Use this decoder; its layers are wrapped for transformers."""
        self.decoder = Backbone(decoder, self.config)

    def released(self) -> Decoder:
        """Return the decoder without the wrappers; this model can then no longer be used."""
        return self.decoder.released()

    def get_decoder(self) -> Backbone:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder.head = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int = 0, **call: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        read = self.decoder(input_ids, attention_mask, past_key_values, use_cache)
        x = read.last_hidden_state
        logits = self.decoder.head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=read.past_key_values)


AutoConfig.register("foveate", FoveateConfig)
AutoModelForCausalLM.register(FoveateConfig, FoveateForCausalLM)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["foveate"] = "FoveateForCausalLM"
