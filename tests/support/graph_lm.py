"""A small decoder that reads a graph from a prompt: the label of a node is what most of its neighbours have.

A prompt lists twelve nodes, in the brackets of a `NodeTree`: `c [ n1 [ a b ] n2 [ ] ... ] ?`. A node's token is its
feature, one of four. The label of the centre c is the feature of most of its five neighbours; most of the six nodes
behind these have another, so that a count of all nodes misleads. Brackets tell neighbours apart for a model that reads
them, links of the graph for one with a graph window.

    lm = train(window=2)
    accuracy(lm, problems(256, seed=1), window=2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.graph_window import graph_window_mask
from foveate.lens.parts.node_tree import NodeTree
from foveate.models import Decoder
from foveate.nn import MultiHeadAttention, Rotary
from foveate.nn.parts.blocks import stacked

FEATURES, NEAR, FAR = 4, 5, 6
OPEN, CLOSE, ASK = FEATURES, FEATURES + 1, FEATURES + 2
NODES = 1 + NEAR + FAR
LENGTH = NODES + 2 * NEAR + 3


@dataclass(frozen=True)
class Problems:
    """Prompts: a tree each, the features of all their nodes, and the labels. No two trees share a node."""

    trees: list[NodeTree]
    features: Tensor
    labels: Tensor


def problems(count: int, seed: int) -> Problems:
    """Draw problems."""
    draw = torch.Generator().manual_seed(seed)
    trees = [_tree(number * NODES, draw) for number in range(count)]
    features, labels = _features(trees, draw)
    return Problems(trees, features, labels)


def _tree(first: int, draw: torch.Generator) -> NodeTree:
    """A tree with nodes numbered from `first` on in the order of the prompt; lists have random lengths."""
    lengths = torch.randint(NEAR, (FAR,), generator=draw).bincount(minlength=NEAR).tolist()
    neighbours, at = [], first + 1
    for length in lengths:
        neighbours.append((at, tuple(range(at + 1, at + 1 + length))))
        at += 1 + length
    return NodeTree(first, tuple(neighbours))


def _features(trees: Sequence[NodeTree], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw each node's feature, `(trees * NODES,)`, and each tree's label."""
    rings, count = torch.stack([tree.hops for tree in trees]), len(trees)
    labels = torch.randint(FEATURES, (count,), generator=draw)
    misleading = (labels + torch.randint(1, FEATURES, (count,), generator=draw)) % FEATURES
    features = torch.randint(FEATURES, rings.shape, generator=draw)
    for ring, size, common, others in ((1, NEAR, labels, 2), (2, FAR, misleading, 2)):
        places = (rings == ring).nonzero()[:, 1].view(count, size)
        shuffled = places.gather(1, torch.rand(count, size, generator=draw).argsort(1))
        rest = (common[:, None] + torch.randint(1, FEATURES, (count, others), generator=draw)) % FEATURES
        values = torch.cat([common[:, None].expand(-1, size - others), rest], 1)
        features.scatter_(1, shuffled, values)
    return features.flatten(), labels


def prompt(tree: NodeTree, features: Tensor) -> tuple[list[int], Tensor]:
    """Return the tokens of a prompt, and the mention that each stands for."""
    tokens, places = [int(features[tree.centre]), OPEN], [0]
    for near, behind in tree.neighbours:
        places.append(len(tokens))
        tokens += [int(features[near]), OPEN]
        places += range(len(tokens), len(tokens) + len(behind))
        tokens += [*(int(features[node]) for node in behind), CLOSE]
    tokens += [CLOSE, ASK]
    return tokens, tree.at_tokens(places, len(tokens))


def batch(
    trees: Sequence[NodeTree], features: Tensor, window: int | None, bidirectional: bool
) -> tuple[Tensor, Tensor]:
    """Return tokens `(B, T)` and masks `(B, 1, T, T)`."""
    tokens, masks = [], []
    for tree in trees:
        read, nodes = prompt(tree, features)
        tokens.append(read)
        masks.append(graph_window_mask(nodes, tree.links(), window, bidirectional=bidirectional))
    return torch.tensor(tokens), torch.stack(masks)[:, None]


def logits(lm: Decoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of the label, `(B, features)`."""
    x = lm.embedded(tokens)
    for block in stacked(lm.blocks):
        x = block(x, mask=mask)
    return lm.head(lm.norm(x))[:, -1, :FEATURES]


@cache
def _pool(count: int, window: int | None, bidirectional: bool) -> tuple[list[NodeTree], Tensor, Tensor]:
    """Trees to train on, their masks, and where each mention stands; features are drawn anew at each step."""
    drawn = problems(count, seed=1000)
    _, masks = batch(drawn.trees, drawn.features, window, bidirectional)
    plain = [prompt(tree, torch.full_like(drawn.features, -1))[0] for tree in drawn.trees]
    return drawn.trees, masks, torch.tensor(plain)


def train(
    window: int | None, bidirectional: bool = False, *, steps: int = 300, seed: int = 0, layers: int = 2,
    dim: int = 32, rate: float = 3e-3,
) -> Decoder:  # fmt: skip
    """Train a decoder under a graph window; None is plain causal attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixers = [MultiHeadAttention(dim, 4, position=Rotary()) for _ in range(layers)]
        lm = Decoder(FEATURES + 3, mixers)
    trees, masks, plain = _pool(256, window, bidirectional)
    draw, optimiser = torch.Generator().manual_seed(seed), torch.optim.AdamW(lm.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(trees), (64,), generator=draw)
        features, labels = _features([trees[at] for at in chosen], draw)
        tokens = plain[chosen].masked_scatter(plain[chosen] < 0, features)  # nodes are numbered as they are listed
        loss = F.cross_entropy(logits(lm, tokens, masks[chosen]), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return lm.eval()


@torch.no_grad()
def accuracy(
    lm: Decoder, given: Problems, window: int | None, bidirectional: bool = False, trees: Sequence[NodeTree] = ()
) -> float:
    """Return the share of right labels under a window; `trees` replace those of the problems."""
    tokens, masks = batch(trees or given.trees, given.features, window, bidirectional)
    return float((logits(lm, tokens, masks).argmax(-1) == given.labels).double().mean())
