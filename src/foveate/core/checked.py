"""The root of classes with options: an option of the wrong type is refused before anything is built."""

from __future__ import annotations

from typing import Any, Self

from foveate.core import validate


class Checked:
    """A class whose options are checked against its constructor's annotations; see `validate.options`."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        validate.options(cls, args, options)
        return super().__new__(cls)
