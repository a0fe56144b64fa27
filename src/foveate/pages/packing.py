"""Numbers in a form that fits into a page: bytes in base64, and JSON with seven digits."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor


def packed(share: Tensor, width: int) -> str:
    """Return numbers in 0..1 as whole numbers of one or two bytes, low byte first."""
    most, kind = (255, torch.uint8) if width == 1 else (65535, torch.uint16)
    return packed_integers((share * most).round().to(torch.int32).to(kind))


def packed_integers(numbers: Tensor) -> str:
    """Return whole numbers as bytes, low byte first; their dtype sets how many each takes."""
    plain = numbers.contiguous().cpu().numpy()
    return base64.b64encode(plain.astype(plain.dtype.newbyteorder("<")).tobytes()).decode()


def plain_table(table: Tensor) -> list[list[float | None]]:
    """Return a table's numbers with seven digits; None for what is not finite."""
    return [[plain_number(value) for value in row] for row in table.tolist()]


def plain_number(value: float) -> float | None:
    """Return a number with seven digits; None if it is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def bytes_of(data: dict[str, Any]) -> int:
    """Return the bytes that the packed texts of a page's data hold."""
    return sum(3 * len(text) // 4 for text in data.values() if isinstance(text, str))
