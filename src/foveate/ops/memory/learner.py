"""The small learner inside a memory: a linear map, or an MLP without biases, with its gradients written by hand.

By hand, since the gradients are part of the forward pass: they exist under `no_grad`, and have gradients of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.ops.memory.fast import Layer, Outer, Weights


def read(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """`x (B, H, C, in)` through the layers, with SiLU between them."""
    for layer in layers[:-1]:
        x = F.silu(layer(x))
    return layers[-1](x)


def gradients(weights: Weights, k: Tensor, slope_of_loss: Callable[[Tensor], Tensor]) -> tuple[Outer, ...]:
    """Each layer's gradient for each token of `k (B, H, C, in)`; `slope_of_loss` maps what is read to dloss/dread."""
    inputs, slopes = [k], []
    for matrix in weights[:-1]:
        z = inputs[-1] @ matrix.mT
        gate = torch.sigmoid(z)
        inputs.append(z * gate)
        slopes.append(gate * (1 + z * (1 - gate)))
    left = slope_of_loss(inputs[-1] @ weights[-1].mT)
    found = [Outer(left, inputs[-1])]
    for index in range(len(weights) - 1, 0, -1):
        left = (left @ weights[index]) * slopes[index - 1]
        found.append(Outer(left, inputs[index - 1]))
    return tuple(reversed(found))
