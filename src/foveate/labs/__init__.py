"""Small real models that ship with the package, and the recipes that made them.

They need no download. Randomly initialised toy models would not do: they have no sinks and no retrieval heads, so that
broken policies pass on them. `LABS` can be read without torch; `bench.loading.load(name)` returns model and tokenizer.
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
        """The size of the weights in bytes; 0 if the checkpoint is missing."""
        weights = self.path / "model.safetensors"
        return weights.stat().st_size if weights.exists() else 0


_HERE = Path(__file__).parent

LABS: dict[str, Lab] = {
    "lm": Lab("lm", "byte-level Llama that retrieves needles from real text", "needle", _HERE / "lm" / "checkpoint"),
}
