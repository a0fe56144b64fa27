"""Head patterns in the format that DuoAttention's authors publish: a table of gates, and the sizes of its window.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024), arXiv 2410.10819. A folder
has `full_attention_heads.tsv` (a line for each layer, a number for each key/value head) and `config.json` with
`sink_size` and `recent_size`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import OptionError

GATES, SIZES = "full_attention_heads.tsv", "config.json"


@dataclass(frozen=True)
class DuoPattern:
    """A published pattern: `DuoAttention(pattern.gates, sparsity=0.5, sink=pattern.sink, recent=pattern.recent)`.

    Args:
        gates: `(layers, kv_heads)` in 0..1.
        sink, recent: tokens that streaming heads kept when the gates were trained.
    """

    gates: Float[Tensor, "l hkv"]
    sink: int
    recent: int


def load_duo_pattern(folder: str | Path) -> DuoPattern:
    """Read a pattern from its folder; gates are clipped to 0..1, as the release does.

    Raises:
        OptionError: a file is missing or malformed; the message names it.
    """
    folder = Path(folder)
    rows = []
    for number, line in enumerate(_read(folder / GATES).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                rows.append([float(word) for word in line.split("\t")])
            except ValueError:
                raise OptionError(f"{folder / GATES}: line {number} must hold numbers with tabs between them") from None
    if not rows or len({len(row) for row in rows}) != 1:
        raise OptionError(f"{folder / GATES} must have a line for each layer, with equally many numbers")
    gates = torch.tensor(rows)
    if not bool(gates.isfinite().all()):
        raise OptionError(f"{folder / GATES} must hold finite numbers")
    return DuoPattern(gates.clamp(0.0, 1.0), *_sizes(folder / SIZES))


def save_duo_pattern(pattern: DuoPattern, folder: str | Path) -> Path:
    """Write a pattern in the published format, and return its folder."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(f"{gate:.18e}" for gate in row) for row in pattern.gates.tolist()]
        (folder / GATES).write_text("\n".join(lines) + "\n", "utf-8")
        (folder / SIZES).write_text(json.dumps({"sink_size": pattern.sink, "recent_size": pattern.recent}), "utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {folder}: {error.strerror or error}") from None
    return folder


def _sizes(file: Path) -> tuple[int, int]:
    text = _read(file)
    try:
        found = json.loads(text)
    except ValueError:
        raise OptionError(f"{file} is not JSON") from None
    sink, recent = (found.get(name) if isinstance(found, dict) else None for name in ("sink_size", "recent_size"))
    if type(sink) is not int or type(recent) is not int or min(sink, recent) < 0:
        raise OptionError(f"{file} must hold sink_size and recent_size, whole numbers; got {sink} and {recent}")
    return sink, recent


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise OptionError(f"{file} cannot be read: {reason}") from None
