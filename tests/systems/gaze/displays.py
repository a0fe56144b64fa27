"""Displays for visual search, one odd item among others of one kind, and small networks that have seen such items."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.gaze import VisualSearcher

ACROSS_BAR = 12  # pixels of a bar's image


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


def fixations_needed(searcher: VisualSearcher, found: Display, target: Tensor | None = None) -> int:
    """Return the number of items that were fixated up to the odd one; `target` is shown in place of it."""
    search = searcher(found.target if target is None else target, found.image, goal=found.goal, objects=found.objects)
    x, y = search.fixations[0].long().tolist()
    assert search.found and not found.objects[:, y, x].any()
    return len(search.fixations) - 1


def trained(
    sample: Callable[[torch.Generator], tuple[Tensor, Tensor]], classes: int, widths: tuple[int, ...], steps: int,
    seed: int, weight_decay: float = 0.0,
) -> nn.Sequential:  # fmt: skip
    """Train blocks of a convolution, a ReLU and an average pool, under a linear layer, to classify small images."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, width in zip((1, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        net, head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], 0.01, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(steps):
        images, labels = sample(random)
        loss = F.cross_entropy(head(net(images).mean((2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


# -- digits ------------------------------------------------------------------------------------------------------------


@cache
def digits_network(seed: int) -> nn.Sequential:
    pytest.importorskip("sklearn.datasets")
    from foveate.tasks import Digits

    return trained(lambda random: Digits().sample(64, random), 10, (16, 16, 32), 300, seed, weight_decay=0.1)


def digits_display(random: torch.Generator) -> Display:
    """Put one digit among 15 images of another, none of which the network was trained on.

    Cells of 16 pixels keep the 8 pixels of a digit on the grid that the network was trained with. It has seen no other
    position: on cells of 12 pixels, half a grid cell off, its search is one at random.
    """
    from foveate.tasks import Digits

    images, labels = Digits().heldout()
    odd, other = torch.randperm(10, generator=random)[:2].tolist()
    chosen = [torch.nonzero(labels == each)[:, 0] for each in (odd, other)]
    one = int(torch.randint(len(chosen[0]), (1,), generator=random))
    several = chosen[1][torch.randperm(len(chosen[1]), generator=random)[:15]]
    place = int(torch.randint(16, (1,), generator=random))
    return display(images[chosen[0][one]], list(images[several]), place, across=4, cell=16)


# -- bars --------------------------------------------------------------------------------------------------------------


def bars(count: int, vertical: float, random: torch.Generator, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return images `(count, 1, 12, 12)` of a bar, of which a share is vertical, and 1 for those.

    Place and length vary; a horizontal bar is a vertical one, transposed.
    """
    is_vertical = torch.rand(count, generator=random) < vertical
    shift = torch.randn(2, count, 1, 1, generator=random).clamp(-1, 1)
    half = 3.5 + 1.5 * torch.rand(count, 1, 1, generator=random)
    place = torch.arange(ACROSS_BAR) + 0.5 - ACROSS_BAR / 2
    across, along = place - shift[0], place[:, None] - shift[1]
    images = torch.sigmoid(4 * (1.5 - across.abs())) * torch.sigmoid(4 * (half - along.abs()))
    images = torch.where(is_vertical[:, None, None], images, images.mT)
    return (images + noise * torch.randn(images.shape, generator=random))[:, None], is_vertical.long()


def bars_network(seed: int, vertical: float) -> nn.Sequential:
    """Return a network that was trained to tell bars apart, of which it has seen this share of vertical ones."""
    return trained(lambda random: bars(32, vertical, random, noise=0.3), 2, (6, 8, 8), 150, seed)


def bars_display(odd_is_vertical: bool, random: torch.Generator) -> Display:
    """Put one bar among 15 of the other orientation."""
    odd, _ = bars(1, float(odd_is_vertical), random)
    others, _ = bars(15, 1 - float(odd_is_vertical), random)
    place = int(torch.randint(16, (1,), generator=random))
    return display(odd[0], list(others), place, across=4, cell=16)
