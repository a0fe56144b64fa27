"""Fingerprints of everything that a measured answer hangs on: an answer is used again only where they all agree."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foveate.kv.parts import calibration_store as learnt

_NO_MATTER = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


def of(*parts: Any) -> str:
    """The digest of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of_model(model: PreTrainedModel) -> str:
    """The digest of a model as it stands in memory: its configuration, and all its weights to the last bit."""
    return of(_configuration(model), learnt.digest(model.state_dict()))


@cache
def of_code() -> str:
    """The digest of the installed package's own source: a changed method has no old answers."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()[:32]


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in _NO_MATTER}
