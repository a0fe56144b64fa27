"""The cost of a module: its trained parameters, and the multiply-adds of a call that is traced, not computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """The cost of a module.

    Attributes:
        parameters: number of trained parameters; a shared one counts once.
        macs: multiply-adds of one call with the whole batch, in convolutions and matrix products. Norms, activations,
            pooling, interpolation, sums and biases are not counted; nor are recurrent cells that one kernel computes.
    """

    parameters: int
    macs: int


def cost(module: nn.Module, *inputs: Tensor) -> Cost:
    """Return the cost of `module(*inputs)`, which runs in eval mode on shapes alone; the module stays as it is.

    Args:
        module: any module whose path does not depend on its inputs' values.
        inputs: the call's tensors with the batch, on any device; a device "meta" costs no memory.
    """
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        macs = _macs(module, inputs)
    finally:
        for part, mode in training.items():
            part.training = mode
    return Cost(sum(p.numel() for p in module.parameters() if p.requires_grad), macs)


def _macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Count on fake tensors in place of inputs, parameters and buffers, which therefore nothing can change."""
    device = next((p.device for p in module.parameters()), inputs[0].device if inputs else torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        tied = {id(x): fake(x) for x in (*module.parameters(), *module.buffers())}
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        state = {name: tied[id(x)] for name, x in named}
        with _as_plain_products(), FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(module, state, tuple(fake(x) for x in inputs))
    return counter.get_total_flops() // 2


@contextmanager
def _as_plain_products() -> Iterator[None]:
    """Let attention be computed by matrix products, which the counter knows on every device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
