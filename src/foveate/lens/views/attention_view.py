"""Views of captured attention: heads of a layer, all heads of a model, and the neurons behind one row.

A Multiscale Visualization of Attention in the Transformer Model (2019), arXiv 1906.05714. The head view draws a line
from each query to each key, as opaque as the weight, in the head's colour. The model view has a small drawing for each
layer and head. The neuron view takes one row apart into the products of a query's and its keys' neurons. Weights are
shown as they are: nothing is normalised again.

    view = foveate.lens.attention_view(model, inputs, tokenizer=tokenizer)   # a notebook shows it
    view.head(3, heads=[1, 4]).edges(threshold=0.1)
    view.model().svg()
    view.neuron(3, 1, query=5).strongest(key=2)
    view.save("attention.html")                                              # one page that works offline

The release runs in notebooks, with scripts from a network, and computes neurons for three bundled models. Here a page
stands alone, and neurons come from any model's own queries and keys, taken after its rotary embedding. The scripts of
the paper's three use cases are `pattern_scores`, `pair_weights` and `neuron_distance`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, shown, unknown
from foveate.lens.views.drawing import head_drawing, model_drawing
from foveate.lens.views.edges import Edge, checked_heads, edges
from foveate.lens.views.neurons import NeuronTable, neuron_distance, neuron_strength, neuron_table
from foveate.lens.views.stack import Products, Segments, Stack
from foveate.lens.views.view_page import Start, render
from foveate.pages.skeleton import framed

#: Weights `(H, T, S)` or `(1, H, T, S)` of each layer, or `(T, S)` of each `(layer, head)`.
Maps = Sequence[Tensor] | Mapping[tuple[int, int], Tensor]

FAINT = 0.01  # weights up to this one are not drawn


@final
class AttentionView:
    """Maps of a model over its tokens, with three linked views.

    Args:
        attn: the weights of each layer, `(H, T, S)` or `(1, H, T, S)`, as transformers returns them; or those of single
            heads, `{(layer, head): (T, S)}`.
        tokens: the texts of the keys, and of the queries too if there are as many.
        q, k: queries `(H, T, D)` and keys `(Hkv, S, D)` of each layer, or with a batch of 1, for the neuron view.
        scale: the factor of a product of a query and a key; None is `D ** -0.5`.
        boundary: the place of the first token of the second segment (a sentence pair); None if there is one.
        queries: the texts of the queries, if they are tokens of another sequence, as in attention to an encoder.
        places: each query's place among `tokens`, if the maps have some rows only.
        name: the model, for the page's title.
    """

    def __init__(
        self, attn: Maps, tokens: Sequence[str], *, q: Sequence[Tensor] | None = None,
        k: Sequence[Tensor] | None = None, scale: float | None = None, boundary: int | None = None,
        queries: Sequence[str] | None = None, places: Sequence[int] | None = None, name: str = "a model",
    ) -> None:  # fmt: skip
        maps = _by_head(attn)
        if queries is None and places is None:
            places = range(len(tokens))
        inside = range(len(tokens))  # `Stack` refuses other places
        texts = [tokens[place] if place in inside else "" for place in places or ()] if queries is None else queries
        stack = Stack(maps, texts, tokens, places, boundary, _products(q, k, scale))
        self.stacks: dict[str, Stack] = {"": stack}
        self.name = name

    @classmethod
    def of(cls, stacks: Mapping[str, Stack], name: str = "a model") -> Self:
        """Return the view of one stack, or of several: `{"encoder": ..., "decoder": ..., "cross": ...}`."""
        if not stacks:
            raise OptionError("stacks must hold at least one stack; got none")
        found = cls.__new__(cls)
        found.stacks, found.name = dict(stacks), name
        return found

    @classmethod
    def joined(cls, name: str = "a model", **views: AttentionView) -> Self:
        """Return one view of several: `AttentionView.joined(encoder=..., decoder=..., cross=...)`."""
        return cls.of({part: view.stack() for part, view in views.items()}, name)

    def stack(self, part: str | None = None) -> Stack:
        """Return the maps of a part; None is the only part, or the first one."""
        if part is None:
            return next(iter(self.stacks.values()))
        if part not in self.stacks:
            raise unknown("part", part, self.stacks)
        return self.stacks[part]

    def head(self, layer: int, heads: Sequence[int] | None = None, part: str | None = None) -> HeadView:
        """Return the head view of a layer: some of its heads, or all that have a map."""
        stack = self.stack(part)
        return HeadView(self, self._part(part), layer, checked_heads(stack, layer, heads))

    def model(self, part: str | None = None) -> ModelView:
        """Return the model view: a small drawing of each head."""
        self.stack(part)
        return ModelView(self, self._part(part))

    def neuron(self, layer: int, head: int, query: int, part: str | None = None) -> NeuronTable:
        """Return the neuron view: a query's row of a map, taken apart into products of neurons."""
        return neuron_table(self.stack(part), layer, head, query)

    def neuron_distance(self, layer: int, head: int, part: str | None = None) -> Float[Tensor, " d"]:
        """Return the correlation of each neuron's product with the distance of query and key.

        A neuron far below 0 makes the head prefer near tokens.
        """
        return neuron_distance(self.stack(part), layer, head)

    def neuron_strength(self, layer: int, head: int, part: str | None = None) -> Float[Tensor, " d"]:
        """Return the mean size of each neuron's product over all visible pairs."""
        return neuron_strength(self.stack(part), layer, head)

    def pattern_scores(self, pattern: Bool[Tensor, "n m"], part: str | None = None) -> Float[Tensor, "l h"]:
        """Return how much of its attention each head puts on a pattern: the mean over queries that have a key in it.

        Heads without a map have NaN; `foveate.lens.top_heads` ranks the table of a whole model.

        Args:
            pattern: True for the pairs of query and key that belong to the pattern.
            part: the part of the model.
        """
        stack = self.stack(part)
        size = (len(stack.queries), len(stack.keys))
        if not isinstance(pattern, Tensor) or pattern.dtype != torch.bool or tuple(pattern.shape) != size:
            raise ShapeError(f"pattern must be bool {size}, queries by keys; got {shown(pattern)}")
        rows = pattern.any(-1)
        if not bool(rows.any()):
            raise OptionError("pattern must mark at least one pair of query and key")
        return self._table(stack, {at: (w * pattern.to(w.device)).sum(-1)[rows].mean() for at, w in stack.maps.items()})

    def pair_weights(self, query: int, key: int, part: str | None = None) -> Float[Tensor, "l h"]:
        """Return each head's weight from one token to another; NaN without a map.

        The difference of two views shows what a change of the text does: a pronoun's attention in two sentences.
        """
        stack = self.stack(part)
        for name, at, size in (("query", query, len(stack.queries)), ("key", key, len(stack.keys))):
            if not 0 <= at < size:
                raise OptionError(f"{name}={at} must be in 0..{size - 1}")
        return self._table(stack, {at: weights[query, key] for at, weights in stack.maps.items()})

    def html(self) -> str:
        """Return a page of all views, which works offline and loads nothing."""
        return render(self.stacks, self.name)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the page to a file, and return its path."""
        return _write(self.html(), path)

    def _repr_html_(self) -> str:
        """Return the page as a frame, which notebooks show."""
        return framed(self.html(), "Attention of all heads")

    def _part(self, part: str | None) -> str:
        return next(iter(self.stacks)) if part is None else part

    @staticmethod
    def _table(stack: Stack, values: Mapping[tuple[int, int], Tensor]) -> Float[Tensor, "l h"]:
        table = torch.full((stack.depth, stack.width), torch.nan)
        for (layer, head), value in values.items():
            table[layer, head] = value
        return table


@final
@dataclass(frozen=True, eq=False)
class HeadView:
    """Heads of one layer: lines from queries to keys.

    Args:
        view: all maps.
        part: the part of the model.
        layer, heads: the heads that are shown.
    """

    view: AttentionView
    part: str
    layer: int
    heads: tuple[int, ...]

    def edges(
        self, threshold: float = 0.0, query: int | None = None, segments: Segments = "all"
    ) -> list[Edge]:  # fmt: skip
        """Return a line `(query, key, head, weight)` for each weight above `threshold`.

        Args:
            threshold: the weight from which on there is a line, itself left out.
            query: the query whose lines to return; None is all.
            segments: "all", or the segments of query and key: "A->A", "A->B", "B->A", "B->B".
        """
        return edges(self.view.stack(self.part), self.layer, self.heads, threshold, query, segments)

    def summed(self) -> Float[Tensor, "n m"]:
        """Return the sum of the heads' weights, at most 1: how opaque their lines are together."""
        stack = self.view.stack(self.part)
        return torch.stack([stack.map(self.layer, head) for head in self.heads]).sum(0).clamp_max(1.0)

    def svg(self, threshold: float = FAINT, query: int | None = None, segments: Segments = "all") -> str:
        """Return a drawing; see `edges` for the options."""
        stack = self.view.stack(self.part)
        return head_drawing(stack.queries, stack.keys, self.edges(threshold, query, segments))

    def html(self) -> str:
        """Return the page of all views, opened at these heads."""
        return render(self.view.stacks, self.view.name, Start(self.part, self.layer, self.heads))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the page to a file, and return its path."""
        return _write(self.html(), path)

    def _repr_html_(self) -> str:
        return framed(self.html(), f"Attention of layer {self.layer}")


@final
@dataclass(frozen=True, eq=False)
class ModelView:
    """All heads of a part of a model.

    Args:
        view: all maps.
        part: the part of the model.
    """

    view: AttentionView
    part: str

    def cell(self, layer: int, head: int) -> HeadView:
        """Return the head view of one head."""
        return self.view.head(layer, [head], self.part)

    def svg(self, threshold: float = 0.1) -> str:
        """Return a drawing of all heads, a row for each layer; weights up to `threshold` are left out."""
        stack = self.view.stack(self.part)
        cells = [(layer, head, self.cell(layer, head).edges(threshold)) for layer, head in sorted(stack.maps)]
        return model_drawing(stack.depth, stack.width, (len(stack.queries), len(stack.keys)), cells)

    def html(self) -> str:
        """Return the page of all views, opened at this part."""
        stack = self.view.stack(self.part)
        layer, head = min(stack.maps)
        return render(self.view.stacks, self.view.name, Start(self.part, layer, (head,)))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the page to a file, and return its path."""
        return _write(self.html(), path)

    def _repr_html_(self) -> str:
        return framed(self.html(), "Attention of all heads")


def _by_head(attn: Maps) -> dict[tuple[int, int], Tensor]:
    """Return the maps by layer and head."""
    if isinstance(attn, Mapping):
        return {at: weights.detach().float() for at, weights in attn.items()}
    maps: dict[tuple[int, int], Tensor] = {}
    for layer, weights in enumerate(attn):
        if not isinstance(weights, Tensor) or weights.ndim not in (3, 4) or (weights.ndim == 4 and len(weights) != 1):
            raise ShapeError(
                f"attn[{layer}] must be weights (H, T, S) or (1, H, T, S) of one text; got {shown(weights)}"
            )
        one = weights.detach().float().reshape(weights.shape[-3:])
        maps |= {(layer, head): each for head, each in enumerate(one)}
    return maps


def _products(q: Sequence[Tensor] | None, k: Sequence[Tensor] | None, scale: float | None) -> dict[int, Products]:
    if q is None and k is None:
        return {}
    if q is None or k is None or len(q) != len(k):
        raise OptionError("q and k must come together, with as many layers")
    found = {}
    for layer, (queries, keys) in enumerate(zip(q, k, strict=True)):
        queries, keys = (x.detach().reshape(x.shape[-3:]) for x in (queries, keys))
        found[layer] = Products(queries, keys, queries.shape[-1] ** -0.5 if scale is None else scale)
    return found


def _write(page: str, path: str | os.PathLike) -> Path:
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target
