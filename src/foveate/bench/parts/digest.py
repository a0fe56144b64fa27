"""Digests of everything that a result depends on; a stored result is reused only if all of them agree."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from foveate.kv.parts import calibration_store

_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


def of(*parts: Any) -> str:
    """Return the digest of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of_model(model: PreTrainedModel) -> str:
    """Return the digest of a loaded model: its configuration and the exact bits of its weights."""
    return of(_configuration(model), calibration_store.digest(model.state_dict()))


@cache
def of_code() -> str:
    """Return the digest of the package's own source, so that results of changed code are not reused."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()[:32]


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
