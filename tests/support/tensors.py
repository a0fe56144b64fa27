"""Small random tensors for tests, from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def qkv(
    n_queries: int, n_keys: int | None = None, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 8,
    value_width: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0, grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normally distributed q, k, v: leaves that want a gradient where `grad`."""
    random = torch.Generator().manual_seed(seed)
    n_keys = n_queries if n_keys is None else n_keys
    shapes = (heads, n_queries, width), (kv_heads, n_keys, width), (kv_heads, n_keys, value_width or width)
    q, k, v = (torch.randn(batch, *shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)


def gradients(out: Tensor, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random projection of `out`; zeros for what it does not depend on."""
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * direction).sum(), list(inputs), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]


def assert_near(ours: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """No NaN, and the largest error within `tolerance` of the largest value expected (at least of 1)."""
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (ours.double() - expected.double()).abs().max().item()
    limit = tolerance * max(1.0, expected.double().abs().max().item())
    assert error <= limit, f"{what}: off by {error:.3g}, more than {limit:.3g}"
