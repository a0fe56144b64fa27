"""Linear maps in half precision: the fast product is used, and no result is less exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import precision
from foveate.nn.parts.linear_maps import Linear

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def made(dtype: torch.dtype, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(24, 16, bias=bias).to(dtype)


def tokens(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Record the dtypes of products."""
    seen: list[torch.dtype] = []
    plain = F.linear

    def spied(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(input.dtype)
        return plain(input, weight, bias)

    monkeypatch.setattr(F, "linear", spied)
    return seen


@HALVES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_half_precision_uses_the_fast_product(
    dtype: torch.dtype, bias: bool, fast: bool, multiplied: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_halves", lambda dtype: fast)
    layer, x = made(dtype, bias), tokens(3, 5, dtype=dtype).requires_grad_()
    out = layer(x)
    assert multiplied == [dtype if fast else torch.float32]
    assert out.dtype == dtype
    whole = made(dtype, bias).double()
    torch.testing.assert_close(out.double(), whole(x.double()), rtol=2**-8, atol=2**-8)
    grads = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
    assert {grad.dtype for grad in grads} == {dtype}
    given = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(whole(given).square().sum(), [given, *whole.parameters()])
    for ours, theirs in zip(grads, exact, strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 0.01


@HALVES
def test_through_float32_the_result_is_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_halves", lambda dtype: False)
    layer, x = made(dtype), tokens(3, 5, dtype=dtype)
    exact = x.float() @ layer.weight.float().mT + layer.bias.float()
    torch.testing.assert_close(layer(x), exact.to(dtype), rtol=0, atol=0)


@HALVES
def test_a_single_row_is_not_cast(
    dtype: torch.dtype, multiplied: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_halves", lambda dtype: False)
    made(dtype)(tokens(1, 1, dtype=dtype))
    made(dtype)(tokens(2, 1, dtype=dtype))
    assert multiplied == [dtype, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_dtypes_are_not_cast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_halves", lambda dtype: False)
    layer, x = made(dtype), tokens(3, 5, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


def test_it_is_torch_s_linear_in_all_else() -> None:
    ours, theirs = made(torch.float32), nn.Linear(24, 16)
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    with pytest.raises(RuntimeError, match="dtype"):
        ours(tokens(3, dtype=torch.bfloat16))
