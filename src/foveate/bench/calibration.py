"""What policies learnt about a model, kept in files that say which model it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.bench import digest
from foveate.host import Host
from foveate.kv.policy import Policy

_MODEL = "model"  # the metadata's name for the digest of the model


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
        self._origin = ""

    def __call__(self, cls: type[Policy], key: str) -> dict[str, Tensor]:
        if cls.calibrate.__func__ is Policy.calibrate.__func__:  # type: ignore[attr-defined]
            return {}
        self._origin = self._origin or digest.of_origin(self.host.model)
        for folder in self.folders:
            found = load(folder / f"{key}.safetensors", self._origin)
            if found is not None:
                return found
        found = cls.calibrate(
            self.host, self.data(), lambda step, steps, text: self.note(f"{key}: {step}/{steps} {text}")
        )
        save(found, self.folders[-1] / f"{key}.safetensors", self._origin)
        return found


def save(learnt: dict[str, Tensor], file: Path, origin: str) -> None:
    """Write what was learnt about the model with this `digest.of_origin`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in learnt.items()}, draft, {_MODEL: origin})
    draft.replace(file)


def load(file: Path, origin: str) -> dict[str, Tensor] | None:
    """What was learnt about the model with this `digest.of_origin`; None where the file has nothing about it."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get(_MODEL) != origin:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError):
        return None
