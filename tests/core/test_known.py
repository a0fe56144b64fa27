"""Cached tensors serve every later call."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.readable import remembered


def test_a_tensor_cached_in_inference_mode_works_with_gradients() -> None:
    @remembered
    def table(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float32)

    with torch.inference_mode():
        first = table(4)
    assert table(4) is first and not first.is_inference()
    x = torch.ones(4, requires_grad=True)
    (x * table(4)).sum().backward()
    assert torch.equal(x.grad, first)
