"""AttentionViz's matrix view: the joint picture of queries and keys of every head, over many texts or images.

AttentionViz: A Global View of Transformer Attention (2023), arXiv 2305.03210; see `joint_qk` for one head.

    seen = foveate.lens.attentionviz_matrix(model, [ids, more_ids], tokenizer=tokenizer, method="tsne")
    seen.measures()                        # a row for each layer, head and measure
    seen.save("queries-and-keys.html")     # all heads, one head, and the text of a chosen token

The study shows thousands of tokens of BERT, GPT-2 and ViT. Patches are drawn in their mean colour, not as small images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.host.hf.model import host
from foveate.lens.views.capture import attention_view
from foveate.lens.views.joint_page import render
from foveate.lens.views.joint_points import Points, Strongest
from foveate.lens.views.joint_qk import JointEmbedding, joint_qk
from foveate.lens.views.joint_scaling import Criterion
from foveate.lens.views.projections import Method, Metric
from foveate.lens.views.stack import Stack
from foveate.pages.skeleton import framed

NEAREST = 8  # keys of each query whose weights are kept

#: Inputs of a model: a tokenizer's mapping or the main input, each with one text or image or more.
Inputs = Tensor | Mapping[str, Any]


@final
@dataclass(frozen=True, eq=False)
class JointMatrix:
    """Joint pictures of all heads.

    Args:
        heads: the picture of each head, by `(layer, head)`.
        queries, keys: the tokens that the points are.
        strongest: each query's strongest keys, by head.
        texts: the tokens of each text.
        name, method: the model and the projection, for the page's title.
        patches: the mean colour of each query's patch, for images.
    """

    heads: Mapping[tuple[int, int], JointEmbedding]
    queries: Points
    keys: Points
    strongest: Mapping[tuple[int, int], Strongest]
    texts: Sequence[Sequence[str]]
    name: str
    method: str
    patches: Float[Tensor, "n 3"] | None = None

    def measures(self) -> list[dict[str, Any]]:
        """Return a row for each layer, head and measure; see `JointEmbedding.measures`. "c" is the factor."""
        return [
            {"layer": layer, "head": head, "measure": measure, "value": value}
            for (layer, head), found in sorted(self.heads.items())
            for measure, value in {"c": found.c, **found.measures()}.items()
        ]

    def html(self) -> str:
        """Return the page of all heads, which works offline and loads nothing."""
        both = self.queries, self.keys
        return render(self.heads, both, self.strongest, self.texts, self.name, self.method, self.patches)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the page to a file, and return its path."""
        target = Path(path)
        target.write_text(self.html(), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        """Return the page as a frame, which notebooks show."""
        return framed(self.html(), "Queries and keys of all heads")


def attentionviz_matrix(
    model: object, inputs: Inputs | Iterable[Inputs], *, tokenizer: Any = None, part: str | None = None,
    layers: Iterable[int] | None = None, points: int = 400, generator: torch.Generator | None = None,
    method: Method = "pca", metric: Metric = "cosine", scale: Literal["search", "norms"] | float = "search",
    shift: bool = True, criterion: Criterion = "weighted", quantile: float = 0.5,
) -> JointMatrix:  # fmt: skip
    """Collect queries and keys of many texts or images, and return the joint picture of each head.

    Args:
        model: any transformers model that `foveate.apply` takes.
        inputs: batches of the model's inputs.
        tokenizer: gives the texts of the tokens; None for numbers.
        part: "encoder", "decoder" or "cross" of an encoder-decoder; None is the first one.
        layers: the layers to show; None is all.
        points: the most queries, and the most keys, that are drawn.
        generator: draws the tokens, if there are more; None takes them in even steps.
        method, metric, scale, shift, criterion, quantile: see `joint_qk`.
    """
    validate.count("points", points, 4)
    chosen = None if layers is None else tuple(layers)
    stacks = [
        attention_view(model, one, tokenizer=tokenizer, item=item, layers=chosen).stack(part)
        for one, item in _items(model, inputs)
    ]
    if not stacks:
        raise OptionError("inputs must hold at least one text or image; got none")
    queries = Points.of([stack.queries for stack in stacks], points, generator)
    own = stacks[0].places is not None
    keys = queries if own else Points.of([stack.keys for stack in stacks], points, generator)
    heads: dict[tuple[int, int], JointEmbedding] = {}
    strongest: dict[tuple[int, int], Strongest] = {}
    for layer, head in sorted(stacks[0].maps):
        q = torch.cat([each.products[layer].q[head][queries.inside(at)] for at, each in enumerate(stacks)])
        k = torch.cat([each.products[layer].keys_of(head)[keys.inside(at)] for at, each in enumerate(stacks)])
        heads[layer, head] = joint_qk(q, k, method, 2, metric, scale, shift, criterion=criterion, quantile=quantile)
        strongest[layer, head] = Strongest.of([each.maps[layer, head] for each in stacks], queries, keys, NEAREST)
    return JointMatrix(
        heads, queries, keys, strongest, [stack.keys for stack in stacks], type(host(model).model).__name__, method,
        _patch_colours(stacks, queries),
    )  # fmt: skip


def _items(model: object, inputs: Inputs | Iterable[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """Yield each batch with the number of each of its items."""
    name = host(model).model.main_input_name
    for batch in [inputs] if isinstance(inputs, Tensor | Mapping) else inputs:
        main = batch if isinstance(batch, Tensor) else batch.get(name)
        if not isinstance(main, Tensor):
            raise OptionError(f"inputs must hold {name}; got {', '.join(batch) or 'nothing'}")
        yield from ((batch, item) for item in range(len(main)))


def _patch_colours(stacks: Sequence[Stack], queries: Points) -> Float[Tensor, "n 3"] | None:
    """Return the mean colour of each query's patch, grey for tokens that are none; None for texts."""
    found = []
    for text, stack in enumerate(stacks):
        if stack.grid is None or stack.image is None:
            return None
        patches = F.adaptive_avg_pool2d(stack.image, stack.grid).flatten(1).T
        front = len(stack.queries) - len(patches)
        found.append(torch.cat([torch.full((front, 3), 0.5), patches])[queries.inside(text)])
    return torch.cat(found)
