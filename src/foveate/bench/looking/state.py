"""An unfinished run over texts on disk, from which the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foveate.bench.parts.plaindata import draft_and_move
from foveate.core.errors import OptionError
from foveate.lens.survey import Survey

FILE = "look.unfinished.safetensors"
_FORMAT = "foveate.look-state/1"
_TENSORS = ("count", "mean", "squares")


class State:
    """The file of an unfinished run.

    Args:
        folder: its folder.
        identity: all that its numbers depend on, in words that a message can name.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.file, self.identity = folder / FILE, dict(identity)

    def load(self, fresh: bool = False) -> tuple[Survey | None, int]:
        """Return the survey and the number of finished batches; None and 0 if there is no file, or it is not wanted.

        Raises:
            OptionError: the file is that of another run, or damaged.
        """
        if fresh:
            self.forget()
        if not self.file.exists():
            return None, 0
        try:
            with safe_open(self.file, "pt") as file:
                noted = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            if noted.get("format") != _FORMAT:
                raise ValueError(noted.get("format"))
            identity, done = json.loads(noted["identity"]), json.loads(noted["progress"])
            if not isinstance(identity, dict):
                raise TypeError(type(identity))
            unseen = {int(layer): why for layer, why in done["unseen"].items()} or None
            survey = Survey(tuple(done["names"]), **tensors, texts=int(done["texts"]), unseen=unseen)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            raise OptionError(f"{self.file} is damaged; add --fresh to begin again, or name another folder") from None
        other = [name for name, value in self.identity.items() if identity.get(name) != value]
        if other:
            raise OptionError(
                f"{self.file} is an unfinished run with another {' and another '.join(other)}; add --fresh to begin "
                f"again, or name another folder"
            )
        return survey, int(done["batches"])

    def save(self, survey: Survey, batches: int) -> None:
        """Replace the file in one step."""
        progress = {
            "names": survey.names, "texts": survey.texts, "batches": batches,
            "unseen": {str(layer): why for layer, why in (survey.unseen or {}).items()},
        }  # fmt: skip
        noted = {"format": _FORMAT, "identity": json.dumps(self.identity), "progress": json.dumps(progress)}
        tensors = {name: getattr(survey, name).contiguous() for name in _TENSORS}
        draft_and_move(self.file, lambda draft: save_file(tensors, draft, noted))

    def forget(self) -> None:
        """Remove the file, once the results are written."""
        try:
            self.file.unlink(missing_ok=True)
        except OSError as error:
            raise OptionError(f"cannot remove {self.file}: {error.strerror or error}") from None
