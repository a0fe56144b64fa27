"""Fingerprints of everything that a measured answer hangs on: an answer is used again only where they all agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import foveate

_SAMPLE = 4096  # numbers of each tensor that are hashed in their order; the rest of it goes into an exact sum
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_MATTER = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


def of(*parts: Any) -> str:
    """The digest of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
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


def of_model(model: PreTrainedModel) -> str:
    """The digest of a model as it stands in memory: its configuration, and all its weights to the last bit."""
    return of(_configuration(model), of_tensors(model.state_dict()))


def of_origin(model: PreTrainedModel) -> str:
    """The digest of a model whatever precision it was loaded in: what belongs to a model in one belongs to it in all.

    Weights are compared as bfloat16.
    """
    return of(_configuration(model), of_tensors(model.state_dict(), torch.bfloat16))


@cache
def of_code() -> str:
    """The digest of the installed package's own source: a changed method has no old answers."""
    root, found = Path(foveate.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()[:32]


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in _NO_MATTER}
