"""The small learner inside a memory: a linear map or an MLP without biases, with gradients in closed form.

Autograd does not serve here, since the gradients are part of the forward pass: they exist under `no_grad`, and have
gradients of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import ShapeError
from foveate.ops.functional.fast_weights import Layer, Outer, Weights


class Activation(NamedTuple):
    """An elementwise function and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _gelu_slope(z: Tensor) -> Tensor:
    below = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return below + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


SILU, GELU = Activation(F.silu, _silu_slope), Activation(F.gelu, _gelu_slope)
ACTIVATIONS = {"silu": SILU, "gelu": GELU}


class Around(NamedTuple):
    """The residual and the norm of `x + norm(mlp(x))`: gain and shift over channels, `(H, 1, D)` each."""

    gain: Tensor
    shift: Tensor


def read(layers: Sequence[Layer], x: Tensor, act: Activation = SILU, around: Around | None = None) -> Tensor:
    """Apply the layers to `x (B, H, C, in)`, with the activation between them."""
    inner = x
    for layer in layers[:-1]:
        inner = act.value(layer(inner))
    y = layers[-1](inner)
    return y if around is None else x + _normed(y)[0] * around.gain.to(y.dtype) + around.shift.to(y.dtype)


def gradients(
    weights: Weights, k: Tensor, slope_of_loss: Callable[[Tensor], Tensor], act: Activation = SILU,
    around: Around | None = None,
) -> tuple[Outer, ...]:  # fmt: skip
    """Return each layer's gradient for each token of `k (B, H, C, in)`; `slope_of_loss` maps outputs to slopes."""
    inputs, slopes = [k], []
    for matrix in weights[:-1]:
        z = inputs[-1] @ matrix.mT
        inputs.append(act.value(z))
        slopes.append(act.slope(z))
    y = inputs[-1] @ weights[-1].mT
    left = slope_of_loss(y) if around is None else _through_the_norm(y, k, slope_of_loss, around)
    found = [Outer(left, inputs[-1])]
    for index in range(len(weights) - 1, 0, -1):
        left = (left @ weights[index]) * slopes[index - 1]
        found.append(Outer(left, inputs[index - 1]))
    return tuple(reversed(found))


def _normed(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y` with mean 0 and variance 1 over its channels, and the factor that scaled it."""
    centred = y - y.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return centred * scale, scale


def _through_the_norm(y: Tensor, k: Tensor, slope_of_loss: Callable[[Tensor], Tensor], around: Around) -> Tensor:
    """Return dloss/dy for the output `k + norm(y)`."""
    gain, shift = (t.to(y.dtype) for t in around)
    normed, scale = _normed(y)
    slope = slope_of_loss(k + normed * gain + shift) * gain
    return scale * (slope - slope.mean(-1, keepdim=True) - normed * (slope * normed).mean(-1, keepdim=True))


def first(name: str, weights: nn.ParameterList, sizes: tuple[int, int, int], like: Tensor) -> Weights:
    """Return first weights for a call of `sizes` (Hq, D, Dv); refuse weights that were made for other sizes."""
    built = weights[0].shape[0], weights[0].shape[2], weights[-1].shape[1]
    if sizes != built:
        raise ShapeError(f"{name} was built for (Hq, D, Dv)={tuple(built)}; got {sizes}")
    return tuple(matrix.to(like.dtype) for matrix in weights)
