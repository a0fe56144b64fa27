"""A prompt with two phrases, encoded for the tiny diffusion models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.steer import StructuredDiffusion
from tests.support.diffusion_models import LENGTH, inputs, text_encoder, words

PROMPT, PHRASES = "a red cube and a blue ball", ["a red cube", "a blue ball"]
SPANS = [(0, 3), (4, 7)]


def states(*texts: str) -> Tensor:
    ids = words()(list(texts), padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        return text_encoder()(ids)[0]


def steering(mode: Any = "values", phrases: list[str] = PHRASES) -> StructuredDiffusion:
    return StructuredDiffusion.of_prompt(words(), text_encoder(), PROMPT, phrases, mode)


def given(name: str, masked: bool, batch: int = 3) -> dict[str, Any]:
    """Inputs of a batch whose last two rows read the prompt, and the first the empty one."""
    made = inputs(name, batch=batch, masked=masked)
    made["encoder_hidden_states"] = torch.cat([states(""), states(PROMPT).expand(batch - 1, -1, -1)])
    return made
