"""Tiny random models with different kinds of attention, and their eager attention maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

DECODER = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None, bos_token_id=1,
)  # fmt: skip
ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)


def tiny(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model with large weights, so that its attention is not uniform."""
    torch.manual_seed(seed)
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER | changes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER | {"sliding_window": 6} | changes)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**DECODER | {"sliding_window": 6, "attn_logit_softcapping": 0.5} | changes)
        ),
        "bert": lambda: BertModel(BertConfig(vocab_size=50, **ENCODER | changes)),
        "vit": lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **ENCODER | changes)),
    }
    model = makers[kind]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def text(padding: str = "none", n: int = 24) -> dict[str, Tensor]:
    """Return two random texts, the first with seven tokens of padding on one side or none."""
    ids = torch.randint(2, 50, (2, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(0, 7) if padding == "left" else slice(-7, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def eager_maps(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return each layer's weights with `attn_implementation="eager"`; rows of padding are zero."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    if before != "eager":
        model.set_attn_implementation(before)
    if "attention_mask" not in inputs:
        return list(maps)
    real = inputs["attention_mask"].bool()[:, None, :, None]
    return [weights.masked_fill(~real, 0.0) for weights in maps]
