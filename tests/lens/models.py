"""Tiny random models with different kinds of attention, and their eager attention maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

DECODER = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None, bos_token_id=1,
)  # fmt: skip
ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
#: Encoders and decoders of different sizes.
BART = dict(
    vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=32,
    decoder_attention_heads=2, decoder_ffn_dim=32, init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    decoder_start_token_id=1, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=4, pad_token_id=0,
    eos_token_id=None, decoder_start_token_id=1, relative_attention_num_buckets=8, relative_attention_max_distance=12,
)  # fmt: skip
#: Kinds that read with an encoder and write with a decoder.
BOTH = ("bart", "t5")


def tiny(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model with large weights, so that its attention is not uniform."""
    torch.manual_seed(seed)
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER | changes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER | changes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER | {"sliding_window": 6} | changes)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **DECODER | {"sliding_window": 6, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1} | changes
            )
        ),
        "gpt_oss": lambda: GptOssForCausalLM(
            GptOssConfig(**DECODER | {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 2} | changes)
        ),
        "bert": lambda: BertModel(BertConfig(vocab_size=50, **ENCODER | changes)),
        "vit": lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **ENCODER | changes)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**BART | changes)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**T5 | changes)),
    }
    model = makers[kind]().eval()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 and kind != "t5" else 1.0)  # T5 does not scale its logits
        if name.endswith("sinks"):  # learnt sinks with a share of their own
            parameter.data.copy_(torch.linspace(-1.0, 1.5, len(parameter)))
    return model


def text(padding: str = "none", n: int = 24) -> dict[str, Tensor]:
    """Return two random texts, the first with seven tokens of padding on one side or none."""
    ids = torch.randint(2, 50, (2, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(0, 7) if padding == "left" else slice(-7, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair(padding: str = "none", n: int = 24, written: int = 11) -> dict[str, Tensor]:
    """Return two random texts for an encoder and a decoder each.

    With padding, the first text is padded for the encoder, and the second one has four tokens of it for the decoder.
    """
    ids = torch.randint(2, 50, (2, written), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, -4:] = 0
    return {**text(padding, n), "decoder_input_ids": ids, "decoder_attention_mask": mask}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


#: The names of a part's maps among a model's outputs, and of the mask of its queries among the inputs.
PARTS = {
    "auto": ("attentions", "attention_mask"),
    "encoder": ("encoder_attentions", "attention_mask"),
    "decoder": ("decoder_attentions", "decoder_attention_mask"),
    "cross": ("cross_attentions", "decoder_attention_mask"),
}


def eager_maps(model: PreTrainedModel, inputs: dict[str, Tensor], part: str = "auto") -> list[Tensor]:
    """Return each layer's weights with `attn_implementation="eager"`; rows of padding are zero."""
    name, mask = PARTS[part]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True)[name]
    if before != "eager":
        model.set_attn_implementation(before)
    if mask not in inputs:
        return list(maps)
    real = inputs[mask].bool()[:, None, :, None]
    return [weights.masked_fill(~real, 0.0) for weights in maps]
