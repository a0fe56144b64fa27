"""One direction for each neuron: an approximation of its second-order effects, and the texts that it is made of.

    directions = neuron_directions(effects)                    # of many images, (images, neurons, channels)
    codes = describe(directions, texts, 128)                   # the texts of each neuron
    mean_ablated(outputs, effects, directions, "rank one")     # outputs, if effects lay along their directions

Interpreting the Second-Order Effects of Neurons in CLIP (2024), arXiv 2406.04341.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.lens.circuits.head_pursuit import Pursuit, somp
from foveate.lens.circuits.residual_stream import wide

#: The largest number of effects whose products are held at a time.
TILE = 1 << 24

#: The effects that stay when the others are replaced by their means.
Kept = Literal["none", "significant", "insignificant", "rank one"]


@final
@dataclass(frozen=True, eq=False)
class NeuronDirections:
    """The directions of a layer's neurons.

    Args:
        vectors: of unit length; most of a neuron's largest effects point along it, rather than against it.
        means: the mean effect over all images.
        bounds: the least length, mean taken off, among the effects that a direction was fitted to.
        explained: the share of these effects' squared length that the direction explains.
    """

    vectors: Float[Tensor, "m e"]
    means: Float[Tensor, "m e"]
    bounds: Float[Tensor, " m"]
    explained: Float[Tensor, " m"]

    def along(self, effects: Float[Tensor, "b m e"]) -> Float[Tensor, "b m"]:
        """Return the coordinate of each effect along its neuron's direction, from the mean."""
        return torch.einsum("bme,me->bm", self._centred(effects), self.vectors)

    def rank_one(self, effects: Float[Tensor, "b m e"]) -> Float[Tensor, "b m e"]:
        """Return each effect's approximation: the mean, and the part along the direction."""
        return self.means + self.along(effects)[..., None] * self.vectors

    def significant(self, effects: Float[Tensor, "b m e"]) -> Bool[Tensor, "b m"]:
        """Return whether each effect is longer than the least that its direction was fitted to."""
        return torch.linalg.vector_norm(self._centred(effects), dim=-1) > self.bounds

    def _centred(self, effects: Tensor) -> Tensor:
        if effects.dim() != 3 or effects.shape[1:] != self.means.shape:
            raise ShapeError(f"effects must be (images, {', '.join(map(str, self.means.shape))}); got {shown(effects)}")
        return effects.to(self.means) - self.means


def neuron_directions(effects: Float[Tensor, "b m e"], top: int = 100) -> NeuronDirections:
    """Return the first principal direction of each neuron's longest effects.

    The mean over all images is taken off first, and no other. The paper has 5,000 images, so that 100 are 2 % of them.

    Args:
        effects: second-order effects on many images.
        top: the number of images with the longest effects; all if there are fewer.
    """
    validate.count("top", top, 1)
    if not isinstance(effects, Tensor) or effects.dim() != 3 or len(effects) < 2:
        raise ShapeError(f"effects must be (images, neurons, channels) of two images or more; got {shown(effects)}")
    effects, top = wide(effects.detach()), min(top, len(effects))
    means = effects.mean(0)
    step = max(1, TILE // (len(effects) * effects.shape[2]))
    found = [_fit(effects[:, i : i + step] - means[i : i + step], top) for i in range(0, len(means), step)]
    vectors, bounds, explained = map(torch.cat, zip(*found, strict=True))
    return NeuronDirections(vectors, means, bounds, explained)


def _fit(centred: Float[Tensor, "b m e"], top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the directions of some neurons, their bounds, and the shares that they explain."""
    lengths, order = torch.linalg.vector_norm(centred, dim=-1).topk(top, 0)
    longest = centred.gather(0, order[..., None].expand(-1, -1, centred.shape[2])).transpose(0, 1)
    values, left = torch.linalg.eigh(longest @ longest.mT)  # smaller than the covariance over channels
    vectors = torch.nn.functional.normalize((left[..., -1:].mT @ longest)[:, 0], dim=-1)
    along = torch.einsum("mte,me->mt", longest, vectors)
    flipped = (along > 0).sum(1) <= top // 2
    vectors = torch.where(flipped[:, None], -vectors, vectors)
    whole = lengths.square().sum(0).clamp_min(torch.finfo(lengths.dtype).tiny)
    return vectors, lengths[-1], values[:, -1].clamp_min(0.0) / whole


def mean_ablated(
    outputs: Float[Tensor, "b e"], effects: Float[Tensor, "b m e"], directions: NeuronDirections, keep: Kept = "none"
) -> Float[Tensor, "b e"]:
    """Return outputs of a model in which a layer's second-order effects are replaced by their means.

    Args:
        outputs: the model's, in the units of the effects; see `SecondOrderLens.outputs`.
        effects: of all neurons of the layer on these images.
        directions: hold the means.
        keep: the effects that stay: "none"; the "significant" or the "insignificant" ones; or "rank one", the part of
            each along its direction.
    """
    validate.one_of("keep", keep, ("none", "significant", "insignificant", "rank one"))
    centred = directions.rank_one(effects) if keep == "rank one" else effects.to(directions.means)
    centred = centred - directions.means
    if keep == "none":
        centred = torch.zeros_like(centred)
    elif keep != "rank one":
        stays = directions.significant(effects) == (keep == "significant")
        centred = centred * stays[..., None]
    return outputs.to(directions.means) + (directions.means - effects.to(directions.means) + centred).sum(1)


def describe(
    directions: NeuronDirections, texts: Float[Tensor, "v e"], count: int = 128, *,
    neurons: Iterable[int] | None = None, normalize: Literal["texts", "channels"] = "texts",
) -> list[Pursuit]:  # fmt: skip
    """Return the sparse code of each neuron's direction in embeddings of texts, by orthogonal matching pursuit.

    Args:
        directions: of a layer's neurons.
        texts: an embedding for each text; the mean over texts is taken off.
        count: the number of texts of a code: 8 to 128 in the paper.
        neurons: numbers of the neurons to describe; None for all.
        normalize: "texts" gives each text unit length, "channels" each channel over all texts, as the authors' code.
    """
    validate.one_of("normalize", normalize, ("texts", "channels"))
    if texts.dim() != 2 or texts.shape[1] != directions.vectors.shape[1] or len(texts) < 2:
        raise ShapeError(f"texts must be (texts, {directions.vectors.shape[1]}), at least two; got {shown(texts)}")
    rows = wide(texts.detach())
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1 if normalize == "texts" else 0)
    chosen = range(len(directions.vectors)) if neurons is None else list(neurons)
    return [somp(directions.vectors[neuron][None], rows, count) for neuron in chosen]


def contrast_texts(
    directions: NeuronDirections, codes: Sequence[Pursuit], contrast: Float[Tensor, " e"],
    neurons: int = 50, count: int = 20,
) -> list[tuple[int, float]]:  # fmt: skip
    """Return the texts that push an image along a contrast of two classes through shared neurons, the strongest first.

    These are the words of the paper's semantic adversarial images: a neuron of one class also codes for other things.
    A text's score is its coefficient in a neuron's code times the neuron's product with the contrast; that of the best
    neuron counts. Texts that name the class itself are among them.

    Args:
        directions, codes: of all neurons; see `describe`.
        contrast: the embedding of one class minus that of the other.
        neurons: the number of neurons with the largest product, of either sign.
        count: the number of texts.
    """
    validate.count("neurons", neurons, 1)
    validate.count("count", count, 1)
    _check_codes(directions, codes)
    products = directions.vectors @ contrast.to(directions.vectors)
    chosen = products.abs().topk(min(neurons, len(products))).indices.tolist()
    best: dict[int, float] = {}
    for neuron in chosen:
        for text, weight in zip(codes[neuron].atoms.tolist(), codes[neuron].coefficients[0].tolist(), strict=True):
            best[text] = max(best.get(text, -torch.inf), weight * float(products[neuron]))
    return _top(best, count)


def image_texts(
    effects: Float[Tensor, "m e"], directions: NeuronDirections, codes: Sequence[Pursuit], count: int = 10
) -> list[tuple[int, float]]:
    """Return the texts of an image: those in the codes of its significant neurons, the strongest first.

    A text's score is the sum over these neurons of its coefficient times the length of the effect, mean taken off.

    Args:
        effects: of all neurons on one image.
        directions, codes: of all neurons; see `describe`.
        count: the number of texts.
    """
    validate.count("count", count, 1)
    _check_codes(directions, codes)
    lengths = torch.linalg.vector_norm(effects.to(directions.means) - directions.means, dim=-1)
    total: dict[int, float] = {}
    for neuron in directions.significant(effects[None])[0].nonzero()[:, 0].tolist():
        for text, weight in zip(codes[neuron].atoms.tolist(), codes[neuron].coefficients[0].tolist(), strict=True):
            total[text] = total.get(text, 0.0) + weight * float(lengths[neuron])
    return _top(total, count)


def _top(scores: dict[int, float], count: int) -> list[tuple[int, float]]:
    return sorted(scores.items(), key=lambda pair: -pair[1])[:count]


def _check_codes(directions: NeuronDirections, codes: Sequence[Pursuit]) -> None:
    if len(codes) != len(directions.vectors):
        raise OptionError(f"codes must be those of all {len(directions.vectors)} neurons; got {len(codes)}")
