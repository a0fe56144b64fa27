"""Stretched rotary embeddings of GGUF files, most of which transformers reads as plain ones.

A file says how its rotary embedding is stretched in three ways: by `rope.scaling.*` (linear, YaRN), by a tensor of
factors for each frequency (Llama 3.1), or by two of them (Phi 3's long form). Left out, every prompt comes out wrong,
and the longer it is the more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from foveate.bench.loading.refusal import refused

_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def stretch(name: str, file: Path, config: Any) -> None:
    """Put into the configuration what the file says of its rotary embedding.

    Raises:
        UnsupportedModel: where the file's factors are of no kind that transformers can express.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "default":
        return  # none, one for each kind of layer, or read already
    told, tensors = _told(file)
    kind, factor = told.get("type"), told.get("factor")
    original = int(told.get("original_context_length") or config.max_position_embeddings)
    if "rope_factors_long.weight" in tensors:
        short, long = (tensors[f"rope_factors_{length}.weight"].tolist() for length in ("short", "long"))
        found = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": original}
        rope |= {"rope_type": "longrope", **found}
        if told.get("attn_factor"):
            rope["attention_factor"] = float(told["attn_factor"])
    elif "rope_freqs.weight" in tensors and not (tensors["rope_freqs.weight"] == 1).all():
        rope |= _llama_3(name, tensors["rope_freqs.weight"], config)
    elif kind in ("linear", "yarn") and factor and float(factor) != 1:
        rope |= {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
    elif kind not in (None, "none", "linear", "yarn"):
        raise refused(name, f"stretches its rotary embedding by {kind!r}, which is not known here")


def _told(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says under `rope.scaling`, and its tensors of factors."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    told = {
        key.rpartition("rope.scaling.")[2]: field.contents()
        for key, field in reader.fields.items()
        if "rope.scaling." in key
    }
    tensors = {
        tensor.name: torch.tensor(tensor.data).float().flatten()
        for tensor in reader.tensors
        if tensor.name.startswith("rope_f")
    }
    return told, tensors


def _llama_3(name: str, factors: Tensor, config: Any) -> dict[str, Any]:
    """Llama 3's parameters, where they give exactly these factors."""
    rope = {**config.rope_parameters, **_LLAMA_3, "rope_type": "llama3", "factor": float(factors.max())}
    tried = type(config)(**{**config.to_dict(), "rope_parameters": rope})
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](tried, torch.device("cpu"))
    count = stretched.numel()
    plain = float(rope["rope_theta"]) ** -(torch.arange(count) / count)
    if factors.numel() != count or not torch.allclose(plain / stretched, factors, rtol=1e-3):
        raise refused(name, "stretches its rotary embedding by factors that are not Llama 3's; they cannot be read")
    return rope
