"""Fits to measured curves."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent of a power law through the points, by least squares in logarithms; NaN where it has none."""
    a, b = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).sum() / a.square().sum()).item()
