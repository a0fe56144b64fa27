"""The calibration of policies for a model, stored in files that name the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from foveate.host import Host
from foveate.kv.base.policy import Policy
from foveate.kv.parts import calibration_store


class CalibrationStore:
    """Loads a policy's calibration from one of the folders, or calibrates the policy and saves the result.

    Files of other models, and files that name no model, are ignored.

    Args:
        host: the model.
        data: makes the sequences on which policies calibrate.
        folders: searched in order, such as the checkpoint's and the output folder; the last one receives new files.
        note: called with messages about the progress.
    """

    def __init__(
        self,
        host: Host,
        data: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        folders: list[Path],
        note: Callable[[str], None],
    ) -> None:
        self.host, self.data, self.folders, self.note = host, data, folders, note
        self._model = ""

    def __call__(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        """Return the calibration of a policy; empty if it needs none."""
        # mypy takes a bound class method for a plain function
        if cls.calibrate.__func__ is Policy.calibrate.__func__:  # type: ignore[attr-defined]
            return {}
        self._model = self._model or calibration_store.model_digest(self.host.model)
        for folder in self.folders:
            found = calibration_store.load(folder / f"{key}.safetensors", self._model)
            if found is not None:
                return found
        self.note(f"{key}: calibrating for this model, once")
        found = cls.calibrate(
            self.host, self.data(), lambda step, steps, text: self.note(f"{key}: {step}/{steps} {text}")
        )
        calibration_store.save(found, self.folders[-1] / f"{key}.safetensors", self._model)
        return found
