"""Small real models that ship with the package, and the recipes that made them.

A hub may be out of reach, and random toy models have no sinks and no retrieval heads, so that broken policies pass on
them. `LABS` can be read without torch; `load(name)` gives the model and its tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lab:
    """A shipped model: `path` holds a standard Hugging Face checkpoint in safetensors."""

    name: str
    title: str
    task: str
    path: Path

    @property
    def size(self) -> int:
        """Bytes of the weights; 0 where the checkpoint is missing."""
        weights = self.path / "model.safetensors"
        return weights.stat().st_size if weights.exists() else 0


_HERE = Path(__file__).parent

LABS: dict[str, Lab] = {
    "lm": Lab("lm", "byte-level Llama that retrieves needles from real text", "needle", _HERE / "lm" / "checkpoint"),
}
