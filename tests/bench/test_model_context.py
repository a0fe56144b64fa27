"""The context length by a model's configuration; the numbers are those of published checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
)

from foveate.bench.comparison.model_context import context_length

SHORT_LONG = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


@pytest.mark.parametrize(
    ("stored", "scaling", "length"),
    [
        (4096, None, 4096),
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen2.5's card
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek-V2
        (131072, {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),  # gpt-oss
        (131072, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}, 131072),
        (4096, {"type": "linear", "factor": 4.0}, 16384),  # Vicuna 16k
        (4096, {"type": "dynamic", "factor": 2.0}, 8192),
        (131072, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192}, 131072),  # Llama 3.1
        (2048, {"rope_type": "default"}, 2048),
    ],
)  # fmt: skip
def test_rope_scaling_extends_the_context(stored: int, scaling: dict[str, Any] | None, length: int) -> None:
    config = LlamaConfig(max_position_embeddings=stored, rope_parameters={"rope_theta": 1e4, **(scaling or {})})
    assert context_length(config) == length


def test_longrope_stores_its_full_length() -> None:
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, **SHORT_LONG}
    config = Phi3Config(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=scaling)
    assert context_length(config) == 131072


def test_parameters_by_layer_leave_the_length_unchanged() -> None:
    scaling = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert context_length(Gemma3TextConfig(max_position_embeddings=131072, rope_parameters=scaling)) == 131072


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (GPT2Config(n_positions=1024), 1024), (MptConfig(max_seq_len=2048), 2048), (MambaConfig(), None),
        (BloomConfig(), None), (Qwen2Config(), 32768),
    ],
)  # fmt: skip
def test_other_names_and_no_limit(config: Any, length: int | None) -> None:
    assert context_length(config) == length
