"""A file of finished results: an interrupted run loses at most the unfinished one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.core.errors import OptionError


class Journal:
    """Records in an append-only file of JSON lines, each under the digest of its inputs.

    The file may hold records of other inputs, which are found again if those inputs recur.
    """

    def __init__(self, file: Path, fresh: bool = False) -> None:
        self.file = file
        self._records: dict[str, dict[str, Any]] = {}
        if fresh:
            file.unlink(missing_ok=True)
        elif file.exists():
            self._read()

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record under this key, or None."""
        return self._records.get(key)

    def add(self, records: dict[str, dict[str, Any]]) -> None:
        """Append records, in a single write."""
        if not records:
            return
        self._records |= records
        lines = "".join(json.dumps({"key": key, **record}) + "\n" for key, record in records.items())
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(lines)
        except OSError as error:
            reason = error.strerror or error
            raise OptionError(f"cannot write {self.file}: {reason}; earlier records are kept") from None

    def _read(self) -> None:
        try:
            text = self.file.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise OptionError(f"cannot read {self.file}: {error.strerror or error}") from None
        *lines, partial = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                raise OptionError(
                    f"{self.file} line {number} is damaged; add --fresh to measure again, or name another folder"
                ) from None
        if partial:  # the run was killed while it wrote: that record is measured again
            try:
                self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
            except OSError as error:
                raise OptionError(f"cannot write {self.file}: {error.strerror or error}") from None
