"""What policies learnt about a model, kept in files that say which model it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from foveate.host import Host
from foveate.kv.base import Policy
from foveate.kv.parts import calibration_store as learnt


class Learnt:
    """Finds what a policy learnt beside the model's checkpoint or in the output folder, or lets it learn and keeps it.

    A file of another model, or one that does not say whose it is, is passed over.
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
        if cls.calibrate.__func__ is Policy.calibrate.__func__:  # type: ignore[attr-defined]
            return {}
        self._model = self._model or learnt.model_digest(self.host.model)
        for folder in self.folders:
            found = learnt.load(folder / f"{key}.safetensors", self._model)
            if found is not None:
                return found
        self.note(f"{key}: learning about the model, once")
        found = cls.calibrate(
            self.host, self.data(), lambda step, steps, text: self.note(f"{key}: {step}/{steps} {text}")
        )
        learnt.save(found, self.folders[-1] / f"{key}.safetensors", self._model)
        return found
