"""A training of a few numbers that may be interrupted: where it stands, in one small file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Unfinished:
    """The parameter, the optimiser's state of it, and the steps that are done.

    Args:
        file: where it stands.
        settings: what the training was asked for; what other settings left is passed over.
    """

    file: Path
    settings: str

    def save(self, done: int, parameter: Tensor, optimiser: Optimizer) -> None:
        """Write down where the training stands after `done` steps; an older state is replaced in one step."""
        state = {f"state.{name}": torch.as_tensor(value) for name, value in optimiser.state[parameter].items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}.tmp")
        save_file({"parameter": parameter.detach(), **state}, draft, {"settings": self.settings, "done": str(done)})
        draft.replace(self.file)

    def load(self, parameter: Tensor, optimiser: Optimizer) -> int:
        """Put parameter and optimiser where an earlier training stopped; returns the steps that are done."""
        if not self.file.is_file():
            return 0
        try:
            with safe_open(self.file, "pt") as opened:
                about = opened.metadata() or {}
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, OSError):
            return 0
        if about.get("settings") != self.settings or found["parameter"].shape != parameter.shape:
            return 0
        parameter.data.copy_(found.pop("parameter"))
        optimiser.state[parameter] = {name.removeprefix("state."): value for name, value in found.items()}
        return int(about["done"])
