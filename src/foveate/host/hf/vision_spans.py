"""The spans of a vision-language model's prompt, from what its processor returns.

A processor puts one placeholder token into `input_ids` for every image embedding that the language model will read, and
the configuration names that token. So spans need no offsets and no class names. This holds for LLaVA, Qwen-VL,
Idefics, SmolVLM, InternVL, PaliGemma, Gemma 3 and others that are built in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from foveate.core.errors import OptionError, UnsupportedModel

#: Names of spans, in the order in which they occur. No two share a token.
NAMES = ("system", "image", "video", "text", "generated")

#: Attributes of configurations that name the placeholder of an image, or of a video.
_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}
#: Numbers in `mm_token_type_ids`; 0 is text.
_TYPES = {"image": 1, "video": 2}

#: Inputs that hold pictures.
_PICTURES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


def spans_of(model: Any, inputs: Mapping[str, Any]) -> dict[str, Bool[Tensor, "b n"]]:
    """Return the spans of a prompt by name, bool `(B, N)` each.

    `image` and `video` are the placeholders, `system` is the text before the first of them, and `text` all other text.
    A prompt without pictures is `text`. `generated` is empty here, and grows in a run. Padding is in no span. Tokens
    that only mark where a picture begins or ends count as text.

    Args:
        model: a transformers model, or its configuration.
        inputs: the processor's output: `input_ids (B, N)`, or `mm_token_type_ids` if the model is given embeddings; and
            `attention_mask`, if there is one.

    Raises:
        OptionError: neither of the two is given.
        UnsupportedModel: there are pictures, and no token stands for them.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    vision = _vision(config, inputs)
    first = next(iter(vision.values()))
    real = inputs.get("attention_mask")
    real = real.bool() if isinstance(real, Tensor) and real.shape == first.shape else torch.ones_like(first)
    vision = {name: tokens & real for name, tokens in vision.items()}
    seen = vision["image"] | vision["video"]
    before = (seen.cumsum(1) == 0) & seen.any(1, keepdim=True) & real
    text = real & ~seen & ~before
    return {"system": before, **vision, "text": text, "generated": torch.zeros_like(text)}


def _vision(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> dict[str, Bool[Tensor, "b n"]]:
    """Return the tokens of images and of videos."""
    ids, types = _matrix(inputs.get("input_ids")), _matrix(inputs.get("mm_token_type_ids"))
    if ids is None and types is None:
        raise OptionError("inputs must hold input_ids (B, N), or mm_token_type_ids (B, N) beside embeddings")
    if ids is None:
        assert types is not None
        return {name: types == number for name, number in _TYPES.items()}
    places = {name: _placeholder(config, names) for name, names in _PLACEHOLDERS.items()}
    found = {
        name: torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token
        for name, token in places.items()
    }
    if any(inputs.get(name) is not None for name in _PICTURES) and not any(bool(x.any()) for x in found.values()):
        token = next((token for token in places.values() if token is not None), None)
        reason = "its configuration names no image token" if token is None else f"no token {token} is in input_ids"
        raise UnsupportedModel(
            f"the pictures of {config.model_type} have no tokens of their own ({reason}), so that their span is unknown"
        )
    return found


def has_placeholders(model: Any) -> bool:
    """Return whether a model, or its configuration, names a token that stands for pictures."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return any(_placeholder(config, names) is not None for names in _PLACEHOLDERS.values())


def _matrix(value: Any) -> Int[Tensor, "b n"] | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def _placeholder(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((token for token in found if isinstance(token, int)), None)
