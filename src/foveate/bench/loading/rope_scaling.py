"""RoPE scaling of GGUF files, which transformers mostly ignores.

A file describes its RoPE scaling in one of three ways: by `rope.scaling.*` (linear, YaRN), by a tensor of factors per
frequency (Llama 3.1), or by two such tensors (Phi 3's LongRoPE). Without the scaling every output is wrong, the more so
the longer the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from foveate.bench.loading.refusal import refused

_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def apply_rope_scaling(name: str, file: Path, config: Any) -> None:
    """Copy the file's RoPE scaling into the configuration.

    Raises:
        UnsupportedModel: if transformers has no equivalent of the file's scaling.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "default":
        return  # no RoPE, one per type of layer, or scaling that transformers has read
    fields, tensors = _scaling(file)
    kind, factor = fields.get("type"), fields.get("factor")
    original = int(fields.get("original_context_length") or config.max_position_embeddings)
    if "rope_factors_long.weight" in tensors:
        short, long = (tensors[f"rope_factors_{length}.weight"].tolist() for length in ("short", "long"))
        found = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": original}
        rope |= {"rope_type": "longrope", **found}
        if fields.get("attn_factor"):
            rope["attention_factor"] = float(fields["attn_factor"])
    elif "rope_freqs.weight" in tensors and not (tensors["rope_freqs.weight"] == 1).all():
        rope |= _llama_3(name, tensors["rope_freqs.weight"], config)
    elif kind in ("linear", "yarn") and factor and float(factor) != 1:
        rope |= {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
    elif kind not in (None, "none", "linear", "yarn"):
        raise refused(name, f"has RoPE scaling of type {kind!r}; it must be linear, yarn or none")


def _scaling(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the file's fields under `rope.scaling`, and its tensors of factors."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {
        key.rpartition("rope.scaling.")[2]: field.contents()
        for key, field in reader.fields.items()
        if "rope.scaling." in key
    }
    tensors = {
        tensor.name: torch.tensor(tensor.data).float().flatten()
        for tensor in reader.tensors
        if tensor.name.startswith("rope_f")
    }
    return fields, tensors


def _llama_3(name: str, factors: Tensor, config: Any) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaling that give these factors; refuse other factors."""
    rope = {**config.rope_parameters, **_LLAMA_3, "rope_type": "llama3", "factor": float(factors.max())}
    trial = type(config)(**{**config.to_dict(), "rope_parameters": rope})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))
    count = scaled.numel()
    plain = float(rope["rope_theta"]) ** -(torch.arange(count) / count)
    if factors.numel() != count or not torch.allclose(plain / scaled, factors, rtol=1e-3):
        raise refused(name, "has RoPE scaling factors that are not Llama 3's; others are not supported")
    return rope
