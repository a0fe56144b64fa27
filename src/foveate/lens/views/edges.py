"""The lines of the head view: one from each query to each key, as opaque as the weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.lens.views.stack import Segments, Stack


class Edge(NamedTuple):
    """One line: from a query to a key, for a head, with its weight."""

    query: int
    key: int
    head: int
    weight: float


def edges(
    stack: Stack, layer: int, heads: Iterable[int], threshold: float = 0.0, query: int | None = None,
    segments: Segments = "all",
) -> list[Edge]:  # fmt: skip
    """Return all pairs with a weight above `threshold`, in order of head, query and key.

    Args:
        stack: the maps.
        layer, heads: the heads whose lines they are.
        threshold: the weight from which on there is a line, itself left out.
        query: one query alone; None is all.
        segments: the segments of query and key.
    """
    validate.between("threshold", threshold, 0.0, 1.0)
    wanted = stack.in_segments(segments)
    if query is not None:
        if not 0 <= query < len(wanted):
            raise OptionError(f"query={query} must be in 0..{len(wanted) - 1}")
        others = [row for row in range(len(wanted)) if row != query]
        wanted[others] = False
    found = []
    for head in heads:
        weights = stack.map(layer, head)
        for row, key in ((weights > threshold) & wanted.to(weights.device)).nonzero().tolist():
            found.append(Edge(row, key, head, float(weights[row, key])))
    return found


def checked_heads(stack: Stack, layer: int, heads: Sequence[int] | None) -> tuple[int, ...]:
    """Return heads of a layer, all of those with a map for None; refuse others."""
    if heads is None:
        return stack.heads_of(layer)
    if not len(heads):
        raise OptionError("heads must name at least one head; got none")
    for head in heads:
        stack.map(layer, head)
    return tuple(dict.fromkeys(heads))
