"""Files of a policy's calibration, each with the digest of its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.core.errors import OptionError

_MODEL = "model"  # the metadata's name for the digest of the model
_SAMPLE = 4096  # numbers of each tensor that are hashed; the others enter an exact sum
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


#: What a configuration says of attention that the weights do not show.
_ATTENDS = (
    "rope_parameters", "partial_rotary_factor", "sliding_window", "max_window_layers", "use_sliding_window",
    "layer_types", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "attention_chunk_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
)  # fmt: skip


def digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return the digest of named tensors: of their names, shapes, sums of bits and evenly spread samples.

    Args:
        tensors: any mapping.
        dtype: the type to which floating numbers are converted first; a copy in another precision then has the same
            digest.

    This reads the tensors once, at memory bandwidth. Hashing all bits of eight billion numbers would take a minute.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        bits = tensor.contiguous().reshape(-1).view(_INTEGERS.get(tensor.element_size(), torch.uint8))
        sample = bits[:: max(1, bits.numel() // _SAMPLE)].cpu().numpy().tobytes()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
        found.update(sample)
    return found.hexdigest()[:32]


def model_digest(model: nn.Module) -> str:
    """Return the digest of a model's weights, and of how it attends with them: positions, windows, caps and scales.

    It is the same in every precision, since the weights are read as bfloat16.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attends = {name: getattr(text, name, None) for name in _ATTENDS}
    own = json.dumps({name: value for name, value in attends.items() if value is not None}, sort_keys=True, default=str)
    return hashlib.sha256(f"{digest(model.state_dict(), torch.bfloat16)} {own}".encode()).hexdigest()[:32]


def save(learnt: Mapping[str, Tensor], file: Path, model: str) -> None:
    """Write the calibration of the model with this `model_digest`.

    Raises:
        OptionError: the file cannot be written.
    """
    write(learnt, file, {_MODEL: model})


def write(tensors: Mapping[str, Tensor], file: Path, about: dict[str, str]) -> None:
    """Write tensors and a few texts to a safetensors file, which replaces an older one in one step.

    Raises:
        OptionError: the file cannot be written.
    """
    draft = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, draft, about)
        draft.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # the folder may not exist, or be a file
            draft.unlink(missing_ok=True)
        raise OptionError(f"cannot write {file}: {error}") from None


def load(file: Path, model: str) -> dict[str, Tensor] | None:
    """Return the calibration of the model with this `model_digest`; None if the file does not have it."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get(_MODEL) != model:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError):
        return None
