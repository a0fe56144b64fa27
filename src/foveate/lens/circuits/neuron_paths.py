"""The ways from the neurons of an MLP through later heads to a model's output, frozen at their values in one run.

A part `x_t` of the residual stream at tokens t reaches the output through one head as

    P N_out( W_O sum_t a_t W_V N(x_t) )

with the class token's weights `a`, the norms `N` of attention and `N_out` of the output, and the map `P` to the output.
With the weights and the norms' scales frozen, this is linear in x. `image_stream.neuron_paths` finds these ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.lens.circuits.direct_effects import FrozenNorm
from foveate.lens.circuits.residual_stream import Step, wide


@final
@dataclass(frozen=True, eq=False)
class StreamNorm:
    """A norm in one run as a linear function and a constant.

    Args:
        weight, bias: per channel.
        scale: the reciprocal of the standard deviation, or of the root mean square, of each token.
        mean: the mean over channels that was subtracted from each token; zero if the norm does not centre.
        centres: whether it subtracts a mean, as LayerNorm does.
    """

    weight: Float[Tensor, " c"]
    bias: Float[Tensor, " c"]
    scale: Float[Tensor, "*tokens"]
    mean: Float[Tensor, "*tokens"]
    centres: bool

    @classmethod
    def of(cls, module: nn.Module, given: Float[Tensor, "*tokens c"], made: Float[Tensor, "*tokens c"]) -> Self:
        """Return a module's call as a frozen norm; refuse what is neither RMSNorm nor LayerNorm."""
        norm = FrozenNorm.of(Step(module, given.flatten(0, -2), made.flatten(0, -2)))
        mean = wide(given).mean(-1)
        mean = mean if norm.centres else torch.zeros_like(mean)
        return cls(norm.weight, norm.bias, norm.scale.view_as(mean), mean, norm.centres)

    def weighed(self, x: Float[Tensor, "*rest c"], own_mean: bool) -> Float[Tensor, "*rest c"]:
        """Return a part of the input times the weight, without the scale; `own_mean` subtracts the part's own mean."""
        x = x - x.mean(-1, keepdim=True) if own_mean and self.centres else x
        return x * self.weight.to(x)

    def shared(self, parts: int, own_mean: bool) -> Float[Tensor, "*tokens c"]:
        """Return one part's equal share of what the norm adds to its input: the bias, and the mean unless it is own."""
        mean = torch.zeros_like(self.mean) if own_mean else self.mean
        return (self.bias - self.weight * (self.scale * mean)[..., None]) / parts


@final
@dataclass(frozen=True, eq=False)
class HeadPaths:
    """The way from the stream through the heads of one block to the class token.

    Args:
        layer: the number of the block.
        norm: the norm in front of attention, at all tokens.
        weights: the class token's attention weights.
        values, value_bias: each head's part of the projection to values.
        outputs, output_bias: each head's part of the projection to the stream, with a layer scale if there is one.
    """

    layer: int
    norm: StreamNorm
    weights: Float[Tensor, "b h n"]
    values: Float[Tensor, "h d c"]
    value_bias: Float[Tensor, "h d"]
    outputs: Float[Tensor, "h d c"]
    output_bias: Float[Tensor, " c"]

    @property
    def scaled_weights(self) -> Float[Tensor, "b h n"]:
        """The class token's weights times the scales of the norm in front."""
        return self.weights * self.norm.scale[:, None]


@final
@dataclass(frozen=True, eq=False)
class NeuronPaths:
    """The neurons of one MLP in one run, and the ways from them to the model's output.

    Args:
        activations: of each neuron at each token: what the MLP's last linear map reads.
        rows: what a unit of each neuron adds to the stream.
        bias: what the MLP's last linear map adds besides.
        later: the heads of the later blocks.
        final: the norms between the class token's stream and the output.
        projection, projection_bias: the linear map behind them; the identity if the model has none.
        output: the model's own output: image embeddings, logits, or the class token behind the last norm.
        depth: the number of blocks.

    `own_mean` in the methods below says who subtracts the means of the norms: True takes each part's own mean from it,
    False leaves the means to the constants.
    """

    activations: Float[Tensor, "b n m"]
    rows: Float[Tensor, "m c"]
    bias: Float[Tensor, " c"]
    later: tuple[HeadPaths, ...]
    final: tuple[StreamNorm, ...]
    projection: Float[Tensor, "e c"]
    projection_bias: Float[Tensor, " e"]
    output: Float[Tensor, "b e"]
    depth: int

    def of_neurons(self, own_mean: bool, chosen: Int[Tensor, " k"] | None = None) -> Float[Tensor, "b k e"]:
        """Return the effect of each neuron through all later heads, or of some neurons.

        Each head and neuron has one direction for all images, and each image a number along it, so that the cost is
        O(images · neurons · heads · e) beside one run.
        """
        rows, active = self.rows, self.activations
        if chosen is not None:
            rows, active = rows[chosen], active[..., chosen]
        total = active.new_zeros(len(active), len(rows), len(self.projection))
        for heads in self.later:
            values = torch.einsum("kc,hdc->khd", heads.norm.weighed(rows, own_mean), heads.values)
            directions = torch.einsum("khd,hde->khe", values, self._to_output(heads.outputs, own_mean))
            along = torch.einsum("bhn,bnk->bkh", heads.scaled_weights, active)
            total = total + torch.einsum("bkh,khe->bke", along, directions)
        return total * self._scale[:, None, None]

    def of_part(self, part: Float[Tensor, "b n c"], own_mean: bool) -> Float[Tensor, "b e"]:
        """Return the effect of any part of the stream in front of the later blocks, through all their heads."""
        total = torch.zeros_like(self.output)
        for heads in self.later:
            mixed = torch.einsum("bhn,bnc->bhc", heads.scaled_weights, heads.norm.weighed(part, own_mean))
            values = torch.einsum("bhc,hdc->bhd", mixed, heads.values)
            total = total + torch.einsum("bhd,hde->be", values, self._to_output(heads.outputs, own_mean))
        return total * self._scale[:, None]

    def of_all_neurons(self, own_mean: bool) -> Float[Tensor, "b e"]:
        """Return the effect of all neurons together, without splitting it by neuron."""
        return self.of_part(self.activations @ self.rows, own_mean)

    def shared_constants(self, own_mean: bool) -> Float[Tensor, "b e"]:
        """Return one neuron's equal share of the constants on the ways: biases, and means unless they are own.

        A head of block l reads 1 + 2 l parts (the embedding, and attention and an MLP of each earlier block), each of
        them split by neuron; the output reads 1 + 2 depth parts, each of them split so again.
        """
        total = torch.zeros_like(self.output)
        for heads in self.later:
            read = len(self.rows) * (1 + 2 * heads.layer)
            own = heads.norm.weighed(self.bias / len(self.rows), own_mean) * heads.norm.scale[..., None]
            mixed = torch.einsum("bhn,bnc->bhc", heads.weights, own + heads.norm.shared(read, own_mean))
            values = torch.einsum("bhc,hdc->bhd", mixed, heads.values) + heads.value_bias / read
            count = read * len(heads.outputs)
            out = torch.einsum("bhd,hdc->bhc", values, heads.outputs) + heads.output_bias / count
            count *= 1 + 2 * self.depth
            for norm in self.final:
                share = norm.shared(count, own_mean)[:, None]
                out = norm.weighed(out, own_mean) * norm.scale[:, None, None] + share
            total = total + (out @ self.projection.mT + self.projection_bias / count).sum(1)
        return total

    @property
    def _scale(self) -> Float[Tensor, " b"]:
        scale = self.output.new_ones(len(self.output))
        for norm in self.final:
            scale = scale * norm.scale
        return scale

    def _to_output(self, x: Float[Tensor, "*rest c"], own_mean: bool) -> Float[Tensor, "*rest e"]:
        """Return parts of the class token's stream as they reach the output, without the norms' scales."""
        for norm in self.final:
            x = norm.weighed(x, own_mean)
        return x @ self.projection.mT
