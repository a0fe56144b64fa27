"""What a policy learnt about a model, in a file that says which model that was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.core.errors import OptionError

_MODEL = "model"  # the metadata's name for the digest of the model
_SAMPLE = 4096  # numbers of each tensor that are hashed in their order; the rest of it goes into an exact sum
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """The digest of named tensors: of each its name, shape, the sum of its bits and evenly spread numbers of it.

    Args:
        tensors: any mapping.
        dtype: what floating numbers are brought to first, so that a copy in another precision has the same digest.

    It reads the tensors once, at the speed of memory: hashing all bits of eight billion numbers would take a minute.
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
    """The digest of a model's weights in any precision (they are compared as bfloat16)."""
    return digest(model.state_dict(), torch.bfloat16)


def save(learnt: Mapping[str, Tensor], file: Path, model: str) -> None:
    """Write what was learnt about the model with this `model_digest`.

    Raises:
        OptionError: where the file cannot be written.
    """
    draft = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in learnt.items()}, draft, {_MODEL: model})
        draft.replace(file)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise OptionError(f"cannot write {file}: {error}") from None


def load(file: Path, model: str) -> dict[str, Tensor] | None:
    """What was learnt about the model with this `model_digest`; None where the file has nothing about it."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get(_MODEL) != model:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError):
        return None
