"""A tiny random CLIP image encoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


def clip_config(layers: int = 3) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4, image_size=24,
        patch_size=8, projection_dim=20,
    )  # fmt: skip


def clip_vision() -> Any:
    """Return a model of three blocks for images `(B, 3, 24, 24)`, with embeddings of 20 channels."""
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(clip_config()).eval()
