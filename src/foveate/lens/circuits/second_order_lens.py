"""The second-order lens: what a neuron of an image encoder adds to the output through all later attention heads.

Interpreting the Second-Order Effects of Neurons in CLIP (2024), arXiv 2406.04341. The direct effect of a CLIP neuron on
the image embedding is small. Most of what it does goes through later heads, which copy it to the class token. That
effect is significant for few images, lies along one direction for each neuron, and this direction is a sparse sum of
text embeddings.

    lens = SecondOrderLens(clip, mlp_layer=9)
    effects = torch.cat([lens.effects(batch) for batch in batches])        # (images, neurons, channels)
    directions = neuron_directions(effects)
    describe(directions, text_embeddings, 8)                               # the texts of each neuron
    lens.segment(images, text_embeddings[0], directions)                   # where the text's neurons are active

The formula in `neuron_paths` leaves out constants. The authors' code adds to each effect its equal share of them, which
is the same for all neurons: `share_constants`. It counts the means that LayerNorms subtract as constants too
(`means="shared"`); `means="own"` takes from each part its own mean, as `direct_effects` does. Summed over all parts of
the stream, with the constants, both give the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.lens.circuits.image_stream import neuron_paths
from foveate.lens.circuits.neuron_directions import NeuronDirections
from foveate.lens.circuits.neuron_paths import NeuronPaths
from foveate.lens.circuits.residual_stream import Inputs


@final
class SecondOrderLens:
    """The second-order effects of one layer's neurons on the output of an image encoder.

    Effects are on image embeddings for CLIP, on logits for a classifier that reads the class token, and otherwise on
    the class token behind the last norm. They cost one run of the model for each call, and
    O(images · neurons · heads · channels). Nothing is trained.

    Args:
        model: a pre-norm vision transformer with a class token, in evaluation mode: `CLIPModel`,
            `CLIPVisionModelWithProjection`, `ViTForImageClassification`, `Dinov2Model` ...
        mlp_layer: the block whose MLP is read, from 0; later blocks must follow. In ViT-B/32, of 12 blocks, those of 8
            to 10 matter most.
        share_constants: add to each effect its equal share of all biases and shared means, as the authors' code does.
            Without it, a neuron that is not active has no effect.
        means: who subtracts the norms' means: "shared" leaves them to the constants, "own" takes them from each part.
        coefficient: effects and outputs are multiplied by this and divided by the length of the output; the authors'
            code has 100, CLIP's logit scale. None leaves them as they are.
    """

    def __init__(
        self, model: object, mlp_layer: int, *, share_constants: bool = False,
        means: Literal["shared", "own"] = "shared", coefficient: float | None = None,
    ) -> None:  # fmt: skip
        validate.count("mlp_layer", mlp_layer)
        validate.flag("share_constants", share_constants)
        validate.one_of("means", means, ("shared", "own"))
        if coefficient is not None:
            validate.at_least("coefficient", coefficient, 0.0)
        self.model, self.mlp_layer, self.share_constants = model, mlp_layer, share_constants
        self.own_mean, self.coefficient = means == "own", coefficient

    def effects(self, images: Inputs, neurons: Iterable[int] | None = None) -> Float[Tensor, "b m e"]:
        """Return the second-order effect of each neuron on each image.

        Args:
            images: pixel values `(B, C, H, W)`, or an image processor's mapping.
            neurons: numbers of some neurons, in the order of the result; None for all.
        """
        paths = self._paths(images)
        chosen = None if neurons is None else torch.tensor(list(neurons), device=paths.rows.device)
        if chosen is not None and (not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= len(paths.rows)):
            raise OptionError(
                f"neurons must be numbers in 0..{len(paths.rows) - 1}, at least one; got {shown(neurons)}"
            )
        found = paths.of_neurons(self.own_mean, chosen)
        if self.share_constants:
            found = found + paths.shared_constants(self.own_mean)[:, None]
        return found * self._unit(paths)[:, None, None]

    def layer_effect(self, images: Inputs) -> Float[Tensor, "b e"]:
        """Return the second-order effect of the layer: the sum over its neurons, at about the cost of one."""
        paths = self._paths(images)
        found = paths.of_all_neurons(self.own_mean)
        if self.share_constants:
            found = found + len(paths.rows) * paths.shared_constants(self.own_mean)
        return found * self._unit(paths)[:, None]

    def outputs(self, images: Inputs) -> Float[Tensor, "b e"]:
        """Return the model's own output, in the units of the effects."""
        paths = self._paths(images)
        return paths.output * self._unit(paths)[:, None]

    def activations(self, images: Inputs) -> Float[Tensor, "b n m"]:
        """Return the neurons' activations at all tokens, the class token first."""
        return self._paths(images).activations

    def segment(
        self, images: Inputs, text: Float[Tensor, " e"], directions: NeuronDirections, neurons: int = 200,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b rows columns"]:  # fmt: skip
        """Return a map of where a text is in each image; see `neuron_segmentation`, which joins several layers."""
        return neuron_segmentation([self], images, text, [directions], neurons, grid)

    def _paths(self, images: Inputs) -> NeuronPaths:
        return neuron_paths(self.model, images, self.mlp_layer)

    def _unit(self, paths: NeuronPaths) -> Float[Tensor, " b"]:
        if self.coefficient is None:
            return torch.ones_like(paths.output[:, 0])
        return self.coefficient / torch.linalg.vector_norm(paths.output, dim=-1)


def neuron_segmentation(
    lenses: Sequence[SecondOrderLens], images: Inputs, text: Float[Tensor, " e"],
    directions: Sequence[NeuronDirections], neurons: int = 200, grid: tuple[int, int] | None = None,
) -> Float[Tensor, "b rows columns"]:  # fmt: skip
    """Return a map of where a text is in each image: 1 where its neurons are most active, 0 where they are least.

    The neurons are those whose directions have the largest product with the text, of either sign, over all layers. The
    map is the mean of their activations. The paper enlarges it to the image and cuts it at 0.5.

    Args:
        lenses: of one or more layers of a model; the paper has three.
        images: pixel values `(B, C, H, W)`, or an image processor's mapping.
        text: the embedding of a text, such as the image's most probable class.
        directions: of each lens.
        neurons: the number of neurons.
        grid: rows and columns of patches; None for a square. Other tokens come before the patches.
    """
    validate.count("neurons", neurons, 1)
    if not lenses or len(lenses) != len(directions):
        raise OptionError(f"directions must be as many as lenses, at least one; got {len(directions)}, {len(lenses)}")
    width = directions[0].vectors.shape[1]
    if not isinstance(text, Tensor) or text.shape != (width,):
        raise ShapeError(f"text must be an embedding ({width},); got {shown(text)}")
    products = torch.cat([each.vectors @ text.to(each.vectors) for each in directions]).abs()
    chosen = torch.zeros_like(products)
    chosen[products.topk(min(neurons, len(products))).indices] = 1.0 / min(neurons, len(products))
    total: Tensor | float = 0.0
    for lens, weights in zip(lenses, chosen.split([len(each.vectors) for each in directions]), strict=True):
        total = total + lens.activations(images) @ weights.to(products)
    assert isinstance(total, Tensor)
    patches = total.shape[1] - 1 if grid is None else grid[0] * grid[1]
    rows, columns = (round(patches**0.5),) * 2 if grid is None else grid
    if rows < 1 or rows * columns != patches or patches >= total.shape[1]:
        raise ShapeError(f"grid={grid} must be (rows, columns) of the patches among {total.shape[1]} tokens")
    maps = total[:, total.shape[1] - patches :]
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    maps = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps.unflatten(1, (rows, columns))
