"""Displays for visual search: one odd item among equal ones in an array of cells, and where it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Display(NamedTuple):
    """An image to search.

    Attributes:
        target: the odd item, `(C, s, s)`.
        image: the display, `(C, H, W)`.
        goal: True for the pixels of the odd item's cell.
        objects: the cells, `(N, H, W)`.
    """

    target: Tensor
    image: Tensor
    goal: Tensor
    objects: Tensor


def display(odd: Tensor, others: list[Tensor], at: int, across: int, cell: int) -> Display:
    """Put an odd item at place `at`, row by row, among others that fill the array; the background is 0."""
    side, items = across * cell, list(others)
    items.insert(at, odd)
    assert len(items) == across * across
    image = torch.zeros(odd.shape[0], side, side)
    objects = torch.zeros(len(items), side, side, dtype=torch.bool)
    gap = (cell - odd.shape[1]) // 2
    for number, item in enumerate(items):
        top, left = number // across * cell + gap, number % across * cell + gap
        place = slice(top, top + item.shape[1]), slice(left, left + item.shape[2])
        image[(slice(None), *place)] = item
        objects[(number, *place)] = True
    return Display(odd, image, objects[at].clone(), objects)
