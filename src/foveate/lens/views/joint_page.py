"""The page of a joint matrix: its data in a size that a browser opens at once, and its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from foveate.lens.views.joint_points import Points, Strongest
from foveate.lens.views.joint_qk import JointEmbedding
from foveate.pages.packing import packed, packed_integers, plain_number
from foveate.pages.skeleton import asset, environment, policy
from foveate.pages.text import visible

_SCRIPTS = ("values.js", "grid.js", "joint.js")
_METHODS = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}


def render(
    heads: Mapping[tuple[int, int], JointEmbedding], points: tuple[Points, Points],
    strongest: Mapping[tuple[int, int], Strongest], texts: Sequence[Sequence[str]], name: str, method: str,
    patches: Float[Tensor, "n 3"] | None,
) -> str:  # fmt: skip
    """Return the page; it makes no requests, and all texts are escaped. See `JointMatrix` for the arguments."""
    templates = environment("foveate.lens.views")
    scripts = [asset(templates, each) for each in _SCRIPTS]
    queries, keys = points
    data = {
        "layers": max(layer for layer, _ in heads) + 1, "heads": max(head for _, head in heads) + 1,
        "texts": [[visible(token, lines=True) for token in text] for text in texts],
        "same": queries is keys, "queries": _points(queries), "keys": _points(keys),
        "patches": None if patches is None else packed(patches, 1),
        "pictures": [_picture(*at, each, strongest[at]) for at, each in sorted(heads.items())],
    }  # fmt: skip
    return templates.get_template("joint.html.j2").render(
        policy=policy(scripts),
        style=Markup("".join(asset(templates, each) for each in ("page.css", "heads.css", "view.css"))),
        scripts=[Markup(script) for script in scripts],
        name=name, heads=len(heads), points=len(queries), texts=len(texts), method=_METHODS[method],
        has_patches=patches is not None, data=data,
    )  # fmt: skip


def _points(points: Points) -> dict[str, Any]:
    return {
        "tokens": [visible(token) for token in points.tokens], "text": points.text.tolist(),
        "place": points.place.tolist(),
    }  # fmt: skip


def _picture(layer: int, head: int, found: JointEmbedding, strongest: Strongest) -> dict[str, Any]:
    """Return the points of one head in a square from 0 to 1, with their norms and the strongest keys."""
    both = torch.cat([found.q_xy, found.k_xy])[:, :2].double()
    low, high = both.amin(0), both.amax(0)
    middle, side = (low + high) / 2, (high - low).amax().clamp_min(1e-12)
    square = ((both - middle) / side + 0.5).clamp(0.0, 1.0)
    norms = torch.cat([found.q.norm(dim=-1), found.k.norm(dim=-1)])
    measures = {name: plain_number(value) for name, value in found.measures().items()}
    return {
        "layer": layer, "head": head, "c": plain_number(found.c), "measures": measures, "xy": packed(square, 2),
        "norms": packed(_share(norms), 1), "count": strongest.keys.shape[1],
        "neighbours": packed_integers((strongest.keys + 1).to(torch.uint16)),
        "weights": packed(strongest.weights.clamp(0.0, 1.0), 2),
    }  # fmt: skip


def _share(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp_min(1e-12)
