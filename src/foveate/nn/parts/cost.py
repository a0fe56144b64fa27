"""The cost of a module: trained parameters, and multiply-adds of a call, counted from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """The cost of a module.

    parameters: trained numbers.
    macs: multiply-adds of products of matrices and of convolutions in one call, for the whole batch.
    """

    parameters: int
    macs: int


def cost(module: nn.Module, *inputs: Tensor) -> Cost:
    """Count without computing; module and inputs may lie on the meta device.

    A module that reads the values of its inputs, to choose among them or to check them, cannot be counted so.
    """
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter:
        module(*(fake.from_tensor(x) for x in inputs))
    return Cost(parameters, counter.get_total_flops() // 2)
