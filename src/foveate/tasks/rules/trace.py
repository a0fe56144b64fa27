"""The score of a written-out computation: its last result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_RESULT = re.compile(r"Result:\s*(-?\d+)")


def final(output: str, answers: tuple[str, ...], facts: Mapping[str, Any]) -> float:
    """Return 1.0 if the number after the last `Result:` of the output is the answer; 0.0 without such a line."""
    found = _RESULT.findall(output)
    return float(bool(found) and found[-1] == answers[0].strip())
