"""The graph that a prompt lists: a node, its neighbours, and their neighbours, each mention a place of its own.

Attention Mechanisms Perspective: Exploring LLM Processing of Graph-Structured Data (2025), arXiv 2505.02130.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, final

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.core.node_graphs import check_edges


@final
@dataclass(frozen=True)
class NodeTree:
    """A node with its neighbours and theirs. A prompt lists the centre, then each neighbour with its own behind it.

    A node that is listed twice is mentioned twice: mentions are numbered in the order of the prompt, the centre is 0.

    Args:
        centre: the node that the question is about.
        neighbours: each neighbour of the centre, with the neighbours of that neighbour.
    """

    centre: int
    neighbours: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def sample(
        cls, edges: Int[Tensor, "2 e"], centre: int, most: tuple[int, int] = (8, 8),
        generator: torch.Generator | None = None,
    ) -> Self:  # fmt: skip
        """Take a node's surroundings from a graph; the centre is not listed among its neighbours' neighbours.

        Args:
            edges: pairs of nodes, in either direction.
            centre: the node that the question is about.
            most: the most neighbours of the centre, and of each neighbour; the paper takes eight of each.
            generator: draws them where there are more; None takes those with the lowest numbers.
        """
        check_edges(edges)
        for name, value in (("centre", centre), ("most", most[0]), ("most", most[1])):
            validate.count(name, value)

        def around(node: int, count: int) -> list[int]:
            found = torch.cat([edges[1, edges[0] == node], edges[0, edges[1] == node]]).unique()
            found = found[(found != node) & (found != centre)]
            if generator is not None:
                found = found[torch.randperm(len(found), generator=generator)]
            return found[:count].tolist()

        return cls(centre, tuple((near, tuple(around(near, most[1]))) for near in around(centre, most[0])))

    @property
    def mentions(self) -> list[int]:
        """The node of each mention."""
        return [self.centre, *(node for near, behind in self.neighbours for node in (near, *behind))]

    @property
    def hops(self) -> Int[Tensor, " m"]:
        """The ring of each mention: 0 for the centre, 1 for its neighbours, 2 for theirs."""
        return torch.tensor([0, *(ring for _, behind in self.neighbours for ring in (1, *(2 for _ in behind)))])

    def links(self, variant: Literal["paper", "release"] = "paper") -> Int[Tensor, "2 e"]:
        """Return the links between mentions: from a parent to a child that is listed behind it.

        Args:
            variant: "paper" links the centre to its neighbours, and each neighbour to its own. The "release" skips
                empty lists but not their parents: behind a neighbour without neighbours, lists go to a parent before
                their own, and the neighbours of the centre to one of themselves.
        """
        validate.one_of("variant", variant, ("paper", "release"))
        parents, children, at = list[int](), list[Sequence[int]](), 1
        for _, behind in self.neighbours:
            parents.append(at)
            children.append(range(at + 1, at + 1 + len(behind)))
            at += 1 + len(behind)
        if variant == "release":
            children = [each for each in children if each]
        lists = zip([*parents, 0], [*children, parents], strict=variant == "paper")
        found = [(parent, child) for parent, each in lists for child in each]
        return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T.contiguous()

    def at_tokens(self, places: Sequence[int], length: int) -> Int[Tensor, " t"]:
        """Return the mention that each token of a prompt stands for, -1 for text: `nodes` of `graph_window_mask`.

        Args:
            places: the token of each mention, in their order.
            length: T, the number of tokens.
        """
        validate.count("length", length)
        if len({*places}) != len(self.hops) or not all(0 <= place < length for place in places):
            raise OptionError(
                f"places={list(places)} must be {len(self.hops)} different tokens of the {length} in the prompt"
            )
        nodes = torch.full((length,), -1)
        nodes[list(places)] = torch.arange(len(places))
        return nodes
