"""Tiny random vision-language models of every kind whose spans the host finds, with prompts of one picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB, IMAGE, VIDEO, START, STOP = 64, 60, 61, 58, 59
#: Tokens of a picture.
PICTURE = 4

_TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    initializer_range=0.3,
)  # fmt: skip
_GEMMA = _TEXT | {"head_dim": 8}
_TOWER: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
_SMALL = _TOWER | {"image_size": 8, "patch_size": 4}  # 4 patches
_LARGE = _TOWER | {"image_size": 16, "patch_size": 4}  # 16 patches, of which the model merges 4 each
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_QWEN: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=STOP
)
_QWEN_TOWER: dict[str, Any] = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)


def _llava() -> hf.PreTrainedModel:
    vision, text = hf.CLIPVisionConfig(**_SMALL, projection_dim=16), hf.LlamaConfig(**_TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PICTURE)
    return hf.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> hf.PreTrainedModel:
    vision = _QWEN_TOWER | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=_TEXT | {"rope_parameters": dict(_MROPE)}, vision_config=vision, **_QWEN)
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> hf.PreTrainedModel:
    vision = _QWEN_TOWER | {
        "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = hf.Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": dict(_MROPE)}, vision_config=vision, **_QWEN)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _idefics3() -> hf.PreTrainedModel:
    text = {"model_type": "llama", **_TEXT}
    config = hf.Idefics3Config(text_config=text, vision_config=_LARGE, scale_factor=2, image_token_id=IMAGE)
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> hf.PreTrainedModel:
    text = {"model_type": "llama", **_TEXT}
    config = hf.SmolVLMConfig(text_config=text, vision_config=_LARGE, scale_factor=2, image_token_id=IMAGE)
    return hf.SmolVLMForConditionalGeneration(config)


def _internvl() -> hf.PreTrainedModel:
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **_TEXT}, vision_config=_LARGE, image_token_id=IMAGE,
        image_seq_length=PICTURE, downsample_ratio=0.5,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _paligemma() -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_SMALL, "vision_use_head": False},
        text_config={"model_type": "gemma", **_GEMMA}, image_token_index=IMAGE, vocab_size=VOCAB, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> hf.PreTrainedModel:
    config = hf.Gemma3Config(
        text_config=_GEMMA | {"sliding_window": 8}, image_token_index=IMAGE, boi_token_index=START,
        eoi_token_index=STOP, mm_tokens_per_image=PICTURE,
        vision_config={"model_type": "siglip_vision_model", **_LARGE, "vision_use_head": False},
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


_MAKE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llava": _llava, "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "idefics3": _idefics3, "smolvlm": _smolvlm,
    "internvl": _internvl, "paligemma": _paligemma, "gemma3": _gemma3,
}  # fmt: skip
KINDS = tuple(_MAKE)
#: The side of the pictures of each kind; Qwen-VL takes them in patches.
_SIDES = {"llava": 8, "paligemma": 8}


@cache
def vision_model(kind: str) -> hf.PreTrainedModel:
    """One model a kind, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _MAKE[kind]().eval()
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():  # Gemma 3's projector starts with zeros, and shows no picture
                nn.init.normal_(weight)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(kind: str, batch: int = 2, before: int = 3, after: int = 5, padding: int = 0) -> dict[str, Tensor]:
    """Return the inputs of prompts as a processor makes them: some words, a picture, and some words.

    Args:
        kind: the model's kind.
        batch: prompts.
        before, after: words before and after the picture.
        padding: padding tokens before the words of the first prompt.
    """
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(2, 50, (batch, before + PICTURE + after), generator=draw)
    words[:, before : before + PICTURE] = IMAGE
    ids = torch.cat([torch.randint(2, 50, (batch, padding), generator=draw), words], 1)
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, **_picture(kind, batch, draw), **_types(kind, ids)}


def _picture(kind: str, batch: int, draw: torch.Generator) -> dict[str, Tensor]:
    if kind.startswith("qwen"):
        patches = torch.randn(16 * batch, 3 * 2 * 4 * 4, generator=draw)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}
    side = _SIDES.get(kind, 16)
    pictures = torch.randn(batch, 3, side, side, generator=draw)
    return {"pixel_values": pictures[:, None] if kind in ("idefics3", "smolvlm") else pictures}


def _types(kind: str, ids: Tensor) -> dict[str, Tensor]:
    if kind.startswith("qwen"):
        return {"mm_token_type_ids": (ids == IMAGE).int()}
    return {"token_type_ids": (ids == IMAGE).long()} if kind == "gemma3" else {}
