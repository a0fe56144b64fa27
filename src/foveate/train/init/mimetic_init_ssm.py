"""Mimetic initialisation of state space layers: Mamba that starts as linear attention with a long memory.

Mimetic Initialization Helps State Space Models Learn to Recall (2024), arXiv 2410.11135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention


@dataclass(frozen=True)
class StateSpaceLayer:
    """What there is to set in one Mamba layer, as views of its own weights.

    Args:
        decay: `A_log`; the state fades by `exp(-exp(A_log) delta)` a step.
        step, step_bias: the weights of the step size before its softplus: `delta = softplus(x W + b)`.
        read, write: `W_C` and `W_B`, `(G * S, inputs)`: what is looked for, and where a token is written.
        conv: the short convolution before them.
        value, out: the matrices on the way of the values, `W_x` and `W_out`.
    """

    decay: Tensor
    step: Tensor
    step_bias: Tensor
    read: Tensor
    write: Tensor
    conv: nn.Conv1d
    value: Tensor
    out: Tensor


@torch.no_grad()
def mimetic_init_ssm(
    module: nn.Module, *, a_log: float = -8.0, delta: float = 1.0, tie_bc: bool = True, identity_conv: bool = True,
    identity_value: bool = False,
) -> int:  # fmt: skip
    """Set every Mamba layer inside `module` to recall, and return how many layers that were.

    A Mamba layer is linear attention with C for queries, B for keys and a decay; by default the decay forgets and C has
    nothing to do with B. Here the state keeps everything (`a_log`), each token is written with the same step (`delta`),
    and a token is found by its like (`W_C = W_B`). Nothing stays tied: the first step of training separates them.
    One layer set so is enough for recall if the layer before it keeps its convolution, which brings a key to where its
    value stands: give that layer alone. The wrong choice for a pretrained model.

    Args:
        module: anything that holds transformers' `MambaMixer` or `Mamba2Mixer`, or layers with those attributes.
        a_log: the new `A_log`: at -8 the state keeps 0.99966 a step.
        delta: the step size of every token.
        tie_bc: whether `W_C` becomes `W_B`, scaled so that the mean diagonal of `W_Bᵀ W_B` is 1.
        identity_conv: whether the convolution lets tokens through as they are.
        identity_value: whether values pass the layer unchanged, `W_out W_x` being the identity.

    `a_log` and `delta` are the defaults of a re-implementation that follows the paper; its own constants, the scale of
    `W_B`, and what `identity_conv` and `identity_value` do exactly are reconstructed.

    Raises:
        OptionError: no such layer, or an option out of range.
    """
    validate.between("a_log", a_log, -60, 10)
    validate.between("delta", delta, 1e-6, 80)
    layers = list(state_spaces(module))
    if not layers:
        raise OptionError(f"{type(module).__name__} holds no Mamba layer")
    for layer in layers:
        layer.decay.fill_(a_log)
        layer.step.zero_()
        layer.step_bias.fill_(math.log(math.expm1(delta)))
        if tie_bc:
            layer.write.mul_(math.sqrt(layer.write.shape[1]) / layer.write.norm())
            layer.read.copy_(layer.write)
        if identity_conv:
            _let_through(layer.conv)
        if identity_value:
            _pass_values(layer)
    return len(layers)


@torch.no_grad()
def mimetic_init_linear_attention(module: nn.Module) -> int:
    """The same for linear attention: queries made as keys are, identity convolutions, and no forgetting at first.

    Args:
        module: anything that holds `foveate.nn.MultiHeadAttention` around an operator with a state.

    Gates that decay the state start at a bias of -8 ("alpha", a sigmoid) or 8 (a log-sigmoid). Returns how many layers.
    """
    layers = [part for part in module.modules() if isinstance(part, MultiHeadAttention) and part.op.growth == "N"]
    if not layers:
        raise OptionError(f"{type(module).__name__} holds no MultiHeadAttention around a linear operator")
    for layer in layers:
        groups = layer.heads // layer.kv_heads
        keys = layer.k.weight.unflatten(0, (layer.kv_heads, layer.head_dim))
        layer.q.weight.copy_(keys.repeat_interleave(groups, 0).flatten(0, 1))
        if layer.conv is not None:
            layer.conv.identity_()
        for name, gate in layer.rates.items():
            kind = layer.op.gates[name].squash
            if name == "alpha" or kind == "logsigmoid":
                gate.weight.zero_()
                gate.bias.fill_(8.0 if kind == "logsigmoid" else -8.0)
    return len(layers)


def state_spaces(module: nn.Module) -> Iterator[StateSpaceLayer]:
    """The Mamba layers inside `module`, of either generation."""
    for part in module.modules():
        if all(hasattr(part, name) for name in ("A_log", "x_proj", "dt_proj", "conv1d", "in_proj")):
            yield _first(part)
        elif all(hasattr(part, name) for name in ("A_log", "dt_bias", "conv1d", "in_proj", "n_groups")):
            yield _second(part)


def _first(part: nn.Module) -> StateSpaceLayer:
    """Mamba: steps, B and C are made from what the convolution gives."""
    states = part.A_log.shape[1]
    made = part.x_proj.weight
    write, read = made[-2 * states : -states], made[-states:]
    value = part.in_proj.weight.chunk(2)[0]
    return StateSpaceLayer(
        part.A_log, part.dt_proj.weight, part.dt_proj.bias, read, write, part.conv1d, value, part.out_proj.weight
    )


def _second(part: nn.Module) -> StateSpaceLayer:
    """Mamba-2: one projection makes gate, values, B, C and steps; the convolution comes after it."""
    heads, inner = part.A_log.shape[0], part.out_proj.weight.shape[1]
    groups = (part.conv1d.in_channels - inner) // 2
    made = part.in_proj.weight
    _, value, write, read, step = made.split([inner, inner, groups, groups, heads])
    return StateSpaceLayer(part.A_log, step, part.dt_bias, read, write, part.conv1d, value, part.out_proj.weight)


def _let_through(conv: nn.Conv1d) -> None:
    conv.weight.zero_()
    conv.weight[..., -1] = 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def _pass_values(layer: StateSpaceLayer) -> None:
    """`W_out W_x` is the identity: orthonormal columns in, and the same back."""
    basis = torch.linalg.qr(layer.value.double()).Q
    layer.value.copy_(basis)
    layer.out.copy_(basis.mT)
