"""Analytics of a ViT's heads: their importance, how far they look, and the patterns of their maps.

How Does Attention Work in Vision Transformers? A Visual Analytics Attempt (2023), arXiv 2303.13731. Heads are pruned
one at a time, and several metrics say what that changes. A head's attention is profiled by hops: rings of patches
around the query. An auto-encoder summarises all maps, and clusters of its codes are the patterns that heads have.

    importance = pruning_importance(vit, [(images, labels)])
    importance.top("prob_drop", 2)                          # the heads that matter most
    attn = attention_maps(vit, images)
    expected_hop(hop_profile(attn))                         # (layers, heads): how far they look
    attention_patterns(attn).common()                       # (layers, heads): their patterns

There is no release, and the paper's text was not at hand. The set of metrics, the square root in the pictures, the
auto-encoder (an MLP), k-means and the embedding by principal components are reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown, unknown
from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.lens.circuits.interventions import Head, Scale
from foveate.lens.parts.head_table import one_stack
from foveate.lens.parts.k_means import k_means
from foveate.lens.parts.map_autoencoder import MapAutoencoder
from foveate.lens.parts.patch_maps import check_maps, checked_grid, patch_attention, patch_places
from foveate.lens.parts.rank_correlation import rank_correlation


@dataclass(frozen=True, eq=False)
class _Results:
    """A model's log-probabilities `(B, classes)` and its last features of the CLS token `(B, C)`."""

    logp: Tensor
    feature: Tensor


def _jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    middle = torch.logaddexp(a, b) - torch.log(torch.tensor(2.0, dtype=a.dtype))
    return ((a.exp() * (a - middle)).sum(-1) + (b.exp() * (b - middle)).sum(-1)) / 2


#: Metrics of a pruned head, for each image: `metric(whole, pruned, labels)`. Larger is more important.
METRICS: dict[str, Callable[[_Results, _Results, Tensor], Tensor]] = {
    "prob_drop": lambda whole, pruned, y: (whole.logp.exp() - pruned.logp.exp()).gather(1, y[:, None])[:, 0],
    "loss_rise": lambda whole, pruned, y: (whole.logp - pruned.logp).gather(1, y[:, None])[:, 0],
    "jsd": lambda whole, pruned, _: _jensen_shannon(whole.logp, pruned.logp),
    "cls_shift": lambda whole, pruned, _: 1 - F.cosine_similarity(whole.feature, pruned.feature, -1),
    "acc_drop": lambda whole, pruned, y: (whole.logp.argmax(-1) == y).double() - (pruned.logp.argmax(-1) == y).double(),
}


@final
@dataclass(frozen=True, eq=False)
class HeadImportance:
    """The change that pruning each head makes, image by image.

    Args:
        values: a number for each image, head and metric.
        labels: the class of each image.
        metrics: names of the metrics.
    """

    values: Float[Tensor, "n l h m"]
    labels: Int[Tensor, " n"]
    metrics: tuple[str, ...]

    def mean(self, label: int | None = None) -> Float[Tensor, "l h m"]:
        """Return the mean over images, or over those of a class."""
        if label is None:
            return self.values.mean(0)
        if not bool((self.labels == label).any()):
            raise OptionError(f"label={label} must be one of {self.labels.unique().tolist()}")
        return self.values[self.labels == label].mean(0)

    def top(self, metric: str, count: int, label: int | None = None) -> list[Head]:
        """Return the most important heads by a metric, the first ones first."""
        if metric not in self.metrics:
            raise unknown("metric", metric, self.metrics)
        table = self.mean(label)[..., self.metrics.index(metric)]
        ranked = table.flatten().argsort(descending=True, stable=True)[:count].tolist()
        return [divmod(number, table.shape[1]) for number in ranked]

    def agreement(self) -> Float[Tensor, "m m"]:
        """Return Spearman's rank correlation between the metrics, over heads."""
        return rank_correlation(self.mean().flatten(0, 1).T)


def pruning_importance(
    model: object,
    batches: Iterable[tuple[Tensor | Mapping[str, Any], Tensor | None]],
    metrics: Iterable[str] = tuple(METRICS),
    *,
    prune: Literal["one", "all but one"] = "one",
) -> HeadImportance:
    """Prune the heads of a classifier one at a time, and measure what that changes.

    A pruned head gives zero to the output projection. Costs a forward pass for each head and batch.

    Args:
        model: an image classifier of transformers with one stack of attention layers; its first token is CLS.
        batches: pairs of images (or the model's inputs) and labels `(B,)`; None for the labels that the model gives.
        metrics: names from "prob_drop" (of the label), "loss_rise" (cross entropy), "jsd" (Jensen-Shannon divergence
            of the outputs in nats), "cls_shift" (1 - cosine of the CLS token's last features), "acc_drop".
        prune: "one" head at a time, or "all but one" in its layer.
    """
    names = tuple(metrics)
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    validate.one_of("prune", prune, ("one", "all but one"))
    host, values, all_labels = one_stack(model), list[Tensor](), list[Tensor]()
    whole_mask = torch.ones(host.layers, host.heads)
    for inputs, labels in batches:
        whole = _results(host, inputs, whole_mask)
        y = whole.logp.argmax(-1) if labels is None else labels.to(whole.logp.device)
        if y.shape != whole.logp.shape[:1]:
            raise ShapeError(f"labels must be ({len(whole.logp)},), one for each image; got {shown(y)}")
        found = torch.empty(len(y), host.layers, host.heads, len(names), dtype=torch.float64)
        for layer in range(host.layers):
            for head in range(host.heads):
                mask = whole_mask.clone()
                if prune == "all but one":
                    mask[layer] = 0.0
                mask[layer, head] = float(prune == "all but one")
                pruned = _results(host, inputs, mask)
                found[:, layer, head] = torch.stack([METRICS[name](whole, pruned, y) for name in names], -1).cpu()
        values.append(found)
        all_labels.append(y.cpu())
    if not values:
        raise OptionError("batches must hold at least one batch; got none")
    return HeadImportance(torch.cat(values).float(), torch.cat(all_labels), names)


def _results(host: Host, inputs: Any, mask: Float[Tensor, "l h"]) -> _Results:
    given = {host.model.main_input_name: inputs} if isinstance(inputs, Tensor) else dict(inputs)
    with torch.no_grad(), apply(host.model, Scale(mask)):
        output = host.model(**given, output_hidden_states=True)
    return _Results(output.logits.double().log_softmax(-1), output.hidden_states[-1][:, 0].double())


def hop_profile(
    attn: Float[Tensor, "b l h n n"],
    grid: tuple[int, int] | None = None,
    prefix: int = 1,
    *,
    per: Literal["ring", "patch"] = "ring",
) -> Float[Tensor, "l h k"]:
    """Return the attention of each head by hops: how much goes to the patches that are k away, `(layers, heads, k)`.

    Hops count rows or columns, whichever are more: 0 is the query, 1 its eight neighbours. Weights on tokens that are
    no patches are taken out, and rows divided by what is left. Averaged over images and queries.

    Args:
        attn: weights; see `attention_maps`.
        grid: rows and columns of patches; None for a square.
        prefix: tokens before the patches.
        per: "ring" adds up the patches of a hop, so that a profile sums to 1; "patch" is the mean over pairs, since
            outer rings have more patches.
    """
    validate.one_of("per", per, ("ring", "patch"))
    hops = _hops(checked_grid(attn, grid, prefix)).to(attn.device)
    mean = patch_attention(attn, prefix).mean(0).flatten(2)
    sums = mean.new_zeros(*mean.shape[:2], int(hops.max()) + 1).index_add_(2, hops.flatten(), mean)
    return sums / (len(hops) if per == "ring" else hops.flatten().bincount())


def uniform_hops(grid: tuple[int, int]) -> Float[Tensor, " k"]:
    """Return the profile of uniform attention: the mean share of the patches at each hop."""
    hops = _hops(grid)
    return hops.flatten().bincount() / hops.numel()


def expected_hop(profile: Float[Tensor, "*rest k"]) -> Float[Tensor, "*rest"]:
    """Return the mean number of hops of a profile (per ring)."""
    return (profile * torch.arange(profile.shape[-1]).to(profile)).sum(-1)


def _hops(grid: tuple[int, int]) -> Int[Tensor, "p p"]:
    places = patch_places(grid)
    return torch.cdist(places, places, p=float("inf")).round().long()


@final
@dataclass(frozen=True, eq=False)
class PatternAtlas:
    """The patterns of a model's maps.

    Args:
        clusters: the pattern of each map.
        codes: the auto-encoder's code of each map.
        points: the codes in two dimensions, by principal components.
        prototypes: each pattern: the decoded centre of its codes, as weights.
        error: mean squared error of the auto-encoder on the pictures.
    """

    clusters: Int[Tensor, "b l h"]
    codes: Float[Tensor, "b l h d"]
    points: Float[Tensor, "b l h 2"]
    prototypes: Float[Tensor, "c s s"]
    error: float

    def shares(self) -> Float[Tensor, "l h c"]:
        """Return in which share of the images a head has each pattern."""
        return F.one_hot(self.clusters, len(self.prototypes)).float().mean(0)

    def common(self) -> Int[Tensor, "l h"]:
        """Return each head's most frequent pattern."""
        return self.shares().argmax(-1)


def attention_patterns(
    attn: Float[Tensor, "b l h n n"],
    prefix: int = 1,
    *,
    latent: int = 32,
    clusters: int = 8,
    size: int = 32,
    steps: int = 600,
    seed: int = 0,
) -> PatternAtlas:
    """Train an auto-encoder on all maps of a model, and cluster its codes.

    A map's picture is the square root of its weights among patches, so that faint and sharp patterns are comparable.

    Args:
        attn: weights; see `attention_maps`.
        prefix: tokens before the patches.
        latent: numbers of a code.
        clusters: number of patterns.
        size: larger maps are averaged down to pictures of this size.
        steps: training steps of the auto-encoder.
        seed: of its weights, its batches, and the clusters' starts.
    """
    for name, value in (("latent", latent), ("clusters", clusters), ("size", size)):
        validate.count(name, value, 1)
    validate.count("steps", steps)
    check_maps(attn)
    draw = torch.Generator().manual_seed(seed)
    maps = patch_attention(attn, prefix)
    side = min(size, maps.shape[-1])
    pictures = F.adaptive_avg_pool2d(maps.flatten(0, 2)[:, None], side).flatten(1).sqrt()
    network = MapAutoencoder(side * side, latent, 4 * latent, draw).to(pictures.device)
    error = network.fit(pictures, steps, draw)
    with torch.no_grad():
        codes = network.encoder(pictures)
        labels, centres = k_means(codes, clusters, generator=draw)
        prototypes = network.decoder(centres).clamp_min(0.0).square().unflatten(1, (side, side))
    centred = codes - codes.mean(0)
    points = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    points = F.pad(points, (0, 2 - points.shape[1]))
    shape = attn.shape[:3]
    return PatternAtlas(labels.view(shape), codes.view(*shape, -1), points.view(*shape, -1), prototypes, error)
