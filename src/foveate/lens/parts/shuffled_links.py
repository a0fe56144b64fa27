"""Shuffled links: does a model that reads a graph use the graph's links?

Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data (2025), arXiv 2505.02130. Prompts
list wrong neighbours at test, more of them level by level. A score that hardly falls comes from the nodes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.lens.parts.node_tree import NodeTree

Level = Literal["swap", "exchange", "permute", "replace", "drop"]

#: The paper's levels, the mildest first.
LEVELS: tuple[Level, ...] = ("swap", "exchange", "permute", "replace")

_ROUNDS = 11


def shuffle_links(tree: NodeTree, level: Level, generator: torch.Generator, others: Iterable[int] = ()) -> NodeTree:
    """Return a tree with wrong links and the same centre. All but "drop" keep the number of mentions.

    - swap (I): two neighbours of the centre exchange their lists.
    - exchange (II): eleven times two neighbours exchange the beginnings of their lists, as long as the shorter list.
    - permute (III): all nodes but the centre change places.
    - replace (IV): eleven rounds in which foreign nodes, half as many as the centre has neighbours, take the places of
      nodes, of a neighbour or of a neighbour's neighbour with equal chance.
    - drop: no neighbours at all, which no level of the paper's is.

    Args:
        tree: the true tree; with fewer than two neighbours only "permute" and "drop" change it.
        level: how much is wrong.
        generator: draws the changes.
        others: nodes of other prompts, for "replace"; those that the tree lists itself do not count.

    The levels are the release's. Its third cuts the shuffled nodes into lists of equal length, and so loses some; here
    lists keep their lengths. Its fourth moves a new node behind the others of its list; here it takes the old place.
    """
    validate.one_of("level", level, (*LEVELS, "drop"))
    near = [node for node, _ in tree.neighbours]
    lists = [list(behind) for _, behind in tree.neighbours]
    if level == "drop":
        return NodeTree(tree.centre)
    if level == "swap":
        _swap(lists, generator)
    elif level == "exchange":
        _exchange(lists, generator)
    elif level == "permute":
        _permute(near, lists, generator)
    else:
        pool = sorted({*others} - {*tree.mentions})
        if not pool:
            raise OptionError(f"others={list(others)} must hold a node that the tree does not list")
        _replace(near, lists, pool, generator)
    return NodeTree(tree.centre, tuple((node, tuple(behind)) for node, behind in zip(near, lists, strict=True)))


def link_use(
    score: Callable[[Sequence[NodeTree]], float], trees: Sequence[NodeTree], levels: Iterable[Level] = LEVELS, *,
    seed: int = 0,
) -> dict[Level, float]:  # fmt: skip
    """Return the fall of a score at each level of shuffling: near 0 if the model does not use the links.

    Args:
        score: makes prompts of trees and returns how well the model does on them, such as its accuracy.
        trees: the true trees; a tree's foreign nodes, for "replace", are those of the others.
        levels: see `shuffle_links`.
        seed: of the changes.
    """
    whole, draw = score(trees), torch.Generator().manual_seed(seed)
    everyone = {node for tree in trees for node in tree.mentions}
    return {level: whole - score([shuffle_links(tree, level, draw, everyone) for tree in trees]) for level in levels}


def _swap(lists: list[list[int]], generator: torch.Generator) -> None:
    if len(lists) > 1:
        a, b = _draw(len(lists), 2, generator)
        lists[a], lists[b] = lists[b], lists[a]


def _exchange(lists: list[list[int]], generator: torch.Generator) -> None:
    for _ in range(_ROUNDS if len(lists) > 1 else 0):
        a, b = _draw(len(lists), 2, generator)
        count = min(len(lists[a]), len(lists[b]))
        lists[a][:count], lists[b][:count] = lists[b][:count], lists[a][:count]


def _permute(near: list[int], lists: list[list[int]], generator: torch.Generator) -> None:
    nodes = [*near, *(node for behind in lists for node in behind)]
    mixed = iter([nodes[at] for at in _draw(len(nodes), len(nodes), generator)])
    near[:] = [next(mixed) for _ in near]
    for behind in lists:
        behind[:] = [next(mixed) for _ in behind]


def _replace(near: list[int], lists: list[list[int]], pool: Sequence[int], generator: torch.Generator) -> None:
    for _ in range(_ROUNDS):
        for new in _draw(len(pool), min(len(pool), len(near)) // 2, generator):
            (in_ring_one,) = _draw(2, 1, generator)
            target = near if in_ring_one else lists[_draw(len(lists), 1, generator)[0]]
            if target:
                target[_draw(len(target), 1, generator)[0]] = pool[new]


def _draw(count: int, some: int, generator: torch.Generator) -> list[int]:
    """Return `some` different numbers below `count`, in random order."""
    return torch.randperm(count, generator=generator)[:some].tolist()
