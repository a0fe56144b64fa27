"""What was measured, one line at a time: a run that is cut off loses at most what it was at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.core.errors import OptionError


class Journal:
    """Records under the digest of the question that they answer, in a file of JSON lines that only grows.

    Records of other questions may stand in the same file: they are found again where their question is asked again.
    """

    def __init__(self, file: Path, fresh: bool = False) -> None:
        self.file = file
        self._records: dict[str, dict[str, Any]] = {}
        if fresh:
            file.unlink(missing_ok=True)
        elif file.exists():
            self._read()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record under this key; None where there is none."""
        return self._records.get(key)

    def add(self, records: dict[str, dict[str, Any]]) -> None:
        """Write records down, all in one piece."""
        if not records:
            return
        self._records |= records
        lines = "".join(json.dumps({"key": key, **record}) + "\n" for key, record in records.items())
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(lines)
        except OSError as error:
            raise OptionError(f"cannot write {self.file}: {error.strerror or error}; what it held is kept") from None

    def _read(self) -> None:
        try:
            text = self.file.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise OptionError(f"cannot read {self.file}: {error.strerror or error}") from None
        *lines, cut = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                raise OptionError(
                    f"{self.file} line {number} is damaged; add --fresh to measure anew, or name another folder"
                ) from None
        if cut:  # a run that was killed while it wrote: that line is measured again
            try:
                self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
            except OSError as error:
                raise OptionError(f"cannot write {self.file}: {error.strerror or error}") from None
