"""The state of a short training that may be interrupted, in one small file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from foveate.kv.parts import calibration_store


@dataclass(frozen=True)
class TrainingState:
    """The file of a parameter, the optimiser's state for it, and the number of finished steps.

    Args:
        file: path of the file.
        settings: settings of the training; a file with other settings is ignored.
    """

    file: Path
    settings: str

    def save(self, done: int, parameter: Tensor, optimiser: Optimizer) -> None:
        """Write the state after `done` steps; it replaces an older one atomically.

        Raises:
            OptionError: the file cannot be written.
        """
        state = {f"state.{name}": torch.as_tensor(value) for name, value in optimiser.state[parameter].items()}
        about = {"settings": self.settings, "done": str(done)}
        calibration_store.write({"parameter": parameter.detach(), **state}, self.file, about)

    def load(self, parameter: Tensor, optimiser: Optimizer) -> int:
        """Restore parameter and optimiser from an interrupted training; return the number of finished steps."""
        if not self.file.is_file():
            return 0
        try:
            with safe_open(self.file, "pt") as opened:
                about = opened.metadata() or {}
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
        except (SafetensorError, OSError):
            return 0
        if about.get("settings") != self.settings or found["parameter"].shape != parameter.shape:
            return 0
        parameter.data.copy_(found.pop("parameter"))
        optimiser.state[parameter] = {name.removeprefix("state."): value for name, value in found.items()}
        return int(about["done"])
