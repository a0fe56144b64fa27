"""A griffe extension: docstrings describe several arguments in one line ("q, k, v: ..."), the site each by its name."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {5,}\S.*)*)", re.MULTILINE)


class Joined(griffe.Extension):
    """Give every argument of a joined line an item of its own, with the line's text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = _ITEM.sub(_apart, obj.docstring.value)


def _apart(item: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {item[2]}" for name in item[1].split(", "))
