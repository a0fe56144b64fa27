"""Mimetic initialisation of state space layers: start Mamba as linear attention without forgetting.

Mimetic Initialization Helps State Space Models Learn to Recall (2024), arXiv 2410.11135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast, final

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention
from foveate.train.base.initialiser import Initialiser


@dataclass(frozen=True)
class StateSpaceLayer:
    """The weights of a Mamba layer that the initialiser sets, as views.

    Args:
        decay: `A_log`; each step multiplies the state by `exp(-exp(A_log) delta)`.
        step, step_bias: the weights of the step size before its softplus: `delta = softplus(x W + b)`.
        read, write: `W_C` and `W_B`, `(G * S, inputs)`: they make the queries and the keys of the state.
        conv: the short convolution before them.
        value, out: `W_x` and `W_out`, the projections of values and output.
    """

    decay: Tensor
    step: Tensor
    step_bias: Tensor
    read: Tensor
    write: Tensor
    conv: nn.Conv1d
    value: Tensor
    out: Tensor


class _Mamba(Protocol):
    """The modules of a Mamba layer by the names that its implementations share."""

    A_log: Tensor
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    out_proj: nn.Linear


class _Mamba2(Protocol):
    """The same of a Mamba-2 layer."""

    A_log: Tensor
    dt_bias: Tensor
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    out_proj: nn.Linear


@torch.no_grad()
def mimetic_init_ssm(
    module: nn.Module, *, a_log: float = -8.0, delta: float = 1.0, tie_bc: bool = True, identity_conv: bool = True,
    identity_value: bool = False,
) -> int:  # fmt: skip
    """Initialise every Mamba layer inside `module` for recall; return the number of layers.

    A Mamba layer is linear attention with C as queries, B as keys and a decay; by default it forgets quickly, and C and
    B are unrelated. Here the state hardly decays (`a_log`), all tokens have the same step size (`delta`), and a token
    matches its own kind (`W_C = W_B`). The weights are not tied: the first training step separates them. One such layer
    is enough for recall if the layer before it keeps its convolution, which moves a key to its value's position; so
    pass only the later layer. It is the wrong choice for a pretrained model.

    Args:
        module: a module with transformers' `MambaMixer` or `Mamba2Mixer`, or layers with their attributes.
        a_log: the new `A_log`; at -8 each step multiplies the state by 0.99966.
        delta: the step size of every token.
        tie_bc: set `W_C` to `W_B`, scaled so that the mean diagonal of `W_Bᵀ W_B` is 1.
        identity_conv: set the convolution to the identity.
        identity_value: set `W_out W_x` to the identity, so that values pass unchanged.

    The defaults of `a_log` and `delta` are those of a re-implementation that follows the paper. The paper's own
    constants, the scale of `W_B`, and the exact effect of `identity_conv` and `identity_value` are reconstructed.

    Raises:
        OptionError: if there is no such layer, or an option is out of range.
    """
    _check_rates(a_log, delta)
    layers = list(state_spaces(module))
    if not layers:
        raise OptionError(f"module={type(module).__name__} must hold a Mamba layer; it holds none")
    for layer in layers:
        layer.decay.fill_(a_log)
        layer.step.zero_()
        layer.step_bias.fill_(math.log(math.expm1(delta)))
        if tie_bc:
            layer.write.mul_(math.sqrt(layer.write.shape[1]) / layer.write.norm())
            layer.read.copy_(layer.write)
        if identity_conv:
            _identity_conv(layer.conv)
        if identity_value:
            _identity_values(layer)
    return len(layers)


@final
@dataclass(eq=False)
class MimeticInitSSM(Initialiser):
    """`mimetic_init_ssm` as an initialiser, for every Mamba layer inside a model. It draws no random numbers.

    Args:
        a_log, delta, tie_bc, identity_conv, identity_value: see `mimetic_init_ssm`.
    """

    a_log: float = -8.0
    delta: float = 1.0
    tie_bc: bool = True
    identity_conv: bool = True
    identity_value: bool = False

    def __post_init__(self) -> None:
        _check_rates(self.a_log, self.delta)

    def _set(self, model: nn.Module, generator: torch.Generator | None) -> None:
        mimetic_init_ssm(model, **vars(self))

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Mapping[str, Any]]:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        config = Mamba2Config(
            vocab_size=20, hidden_size=16, state_size=8, num_hidden_layers=1, head_dim=8, num_heads=4, expand=2,
            n_groups=1, chunk_size=8,
        )  # fmt: skip
        return cls(identity_value=True), Mamba2ForCausalLM(config), {"input_ids": torch.arange(10)[None]}


def _check_rates(a_log: float, delta: float) -> None:
    validate.between("a_log", a_log, -60, 10)
    validate.between("delta", delta, 1e-6, 80)


@torch.no_grad()
def mimetic_init_linear_attention(module: nn.Module) -> int:
    """Initialise linear attention alike: equal query and key projections, identity convolutions, little decay.

    Gates that decay the state start at a bias of -8 ("alpha", a sigmoid) or 8 (a log-sigmoid). Returns the number of
    layers.

    Args:
        module: a module with `foveate.nn.MultiHeadAttention` layers around operators with a state.
    """
    layers = [
        part for part in module.modules() if isinstance(part, MultiHeadAttention) and part.op.capabilities.growth == "N"
    ]
    if not layers:
        raise OptionError(f"module={type(module).__name__} must hold linear MultiHeadAttention; it has none")
    for layer in layers:
        groups = layer.heads // layer.kv_heads
        keys = layer.k.weight.unflatten(0, (layer.kv_heads, layer.head_dim))
        layer.q.weight.copy_(keys.repeat_interleave(groups, 0).flatten(0, 1))
        if layer.conv is not None:
            layer.conv.identity_()
        for name, gate in layer.rates.items():
            assert isinstance(gate, nn.Linear)  # `Rates` makes nothing else
            kind = layer.op.capabilities.gates[name].activation
            if name == "alpha" or kind == "logsigmoid":
                gate.weight.zero_()
                gate.bias.fill_(8.0 if kind == "logsigmoid" else -8.0)
    return len(layers)


def state_spaces(module: nn.Module) -> Iterator[StateSpaceLayer]:
    """Yield the Mamba and Mamba-2 layers inside `module`."""
    for part in module.modules():
        if all(hasattr(part, name) for name in ("A_log", "x_proj", "dt_proj", "conv1d", "in_proj")):
            yield _mamba(cast(_Mamba, part))
        elif all(hasattr(part, name) for name in ("A_log", "dt_bias", "conv1d", "in_proj", "n_groups")):
            yield _mamba2(cast(_Mamba2, part))


def _mamba(part: _Mamba) -> StateSpaceLayer:
    """Read a Mamba layer, which projects step sizes, B and C from the convolution's output."""
    states = part.A_log.shape[1]
    weight = part.x_proj.weight
    write, read = weight[-2 * states : -states], weight[-states:]
    value = part.in_proj.weight.chunk(2)[0]
    return StateSpaceLayer(
        part.A_log, part.dt_proj.weight, part.dt_proj.bias, read, write, part.conv1d, value, part.out_proj.weight
    )


def _mamba2(part: _Mamba2) -> StateSpaceLayer:
    """Read a Mamba-2 layer, which projects gate, values, B, C and step sizes before the convolution."""
    heads, inner = part.A_log.shape[0], part.out_proj.weight.shape[1]
    groups = (part.conv1d.in_channels - inner) // 2
    _, value, write, read, step = part.in_proj.weight.split([inner, inner, groups, groups, heads])
    return StateSpaceLayer(part.A_log, step, part.dt_bias, read, write, part.conv1d, value, part.out_proj.weight)


def _identity_conv(conv: nn.Conv1d) -> None:
    conv.weight.zero_()
    conv.weight[..., -1] = 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def _identity_values(layer: StateSpaceLayer) -> None:
    """Set `W_x` to orthonormal columns and `W_out` to their transpose."""
    basis = torch.linalg.qr(layer.value.double()).Q
    layer.value.copy_(basis)
    layer.out.copy_(basis.mT)
