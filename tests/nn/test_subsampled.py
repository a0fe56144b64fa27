"""Attention to a sub-sampled grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import GlobalSubsampledAttention, MultiHeadAttention
from tests.support.tensors import assert_near


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(ratio: int, **options) -> GlobalSubsampledAttention:
    torch.manual_seed(0)
    return GlobalSubsampledAttention(12, 3, ratio, **options).double()


def attended(module: GlobalSubsampledAttention, x: Tensor, keys: Tensor) -> Tensor:
    """Attend with the layer's projections, head by head."""
    part, out = module.attention, []
    q, k, v = part.q(x), part.k(keys), part.v(keys)
    for head in range(module.heads):
        at = slice(head * part.head_dim, (head + 1) * part.head_dim)
        weights = (q[..., at] @ k[..., at].mT / part.head_dim**0.5).softmax(-1)
        out.append(weights @ v[..., at])
    return torch.cat(out, -1) @ part.out.weight.mT + part.out.bias


def squares(x: Tensor, size: tuple[int, int], ratio: int) -> list[list[Tensor]]:
    """Return the tokens that are there of each square, `(B, at most r², C)`, by rows."""
    grid = x.unflatten(1, size)
    return [
        [grid[:, row : row + ratio, column : column + ratio] for column in range(0, size[1], ratio)]
        for row in range(0, size[0], ratio)
    ]


@pytest.mark.parametrize("padding", ["hidden", "seen", "dropped"])
@pytest.mark.parametrize(("size", "ratio"), [((6, 4), 2), ((7, 5), 2), ((7, 5), 3), ((4, 3), 3)])
def test_means_square_by_square(size: tuple[int, int], ratio: int, padding: str) -> None:
    module, x = layer(ratio, reduce="mean", padding=padding), randn(2, size[0] * size[1], 12)
    keys = []
    for square in (square for row in squares(x, size, ratio) for square in row):
        tokens = square.flatten(1, 2)
        if tokens.shape[1] < ratio**2 and padding == "dropped":
            continue
        keys.append(tokens.sum(1) / (tokens.shape[1] if padding == "hidden" else ratio**2))
    expected = torch.stack(keys, 1)
    assert_near(module.subsampled(x, size), expected, 1e-12)
    assert_near(module(x, size=size), attended(module, x, expected), 1e-12)


@pytest.mark.parametrize("padding", ["hidden", "seen", "dropped"])
@pytest.mark.parametrize(("size", "ratio"), [((6, 4), 2), ((7, 5), 2), ((7, 5), 3)])
def test_convolutions_square_by_square(size: tuple[int, int], ratio: int, padding: str) -> None:
    module, x = layer(ratio, padding=padding), randn(2, size[0] * size[1], 12)
    keys = []
    for square in (square for row in squares(x, size, ratio) for square in row):
        if padding == "dropped" and square.shape[1:3] != (ratio, ratio):
            continue
        whole = F.pad(square, (0, 0, 0, ratio - square.shape[2], 0, ratio - square.shape[1]))
        keys.append(torch.einsum("bijc,ocij->bo", whole, module.conv.weight) + module.conv.bias)
    found = torch.stack(keys, 1)
    centred = found - found.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_near(module.subsampled(x, size), expected, 1e-12)
    assert_near(module(x, size=size), attended(module, x, expected), 1e-12)


@pytest.mark.parametrize("reduce", ["conv", "mean"])
def test_ratio_1_is_multi_head_attention(reduce: str) -> None:
    module, x = layer(1, reduce=reduce), randn(2, 15, 12)
    plain = MultiHeadAttention(12, 3, bias=True).double()
    plain.load_state_dict({name.removeprefix("attention."): p for name, p in module.state_dict().items()})
    assert_near(module(x, size=(5, 3)), plain(x), 1e-12)
    assert module.conv is None and module.norm is None


def test_a_square_larger_than_the_grid() -> None:
    x = randn(1, 6, 12)
    assert_near(layer(4, reduce="mean").subsampled(x, (2, 3)), x.mean(1, keepdim=True), 1e-12)
    assert layer(4).subsampled(x, (2, 3)).shape == (1, 1, 12)
    for reduce in ("conv", "mean"):
        with pytest.raises(ShapeError, match=r'size=\(2, 3\) must be at least ratio=4, unless padding="hidden"'):
            layer(4, reduce=reduce, padding="dropped")(x, size=(2, 3))
        with pytest.raises(ShapeError, match=r"size=\(6, 1\) must be at least ratio=2"):
            layer(2, reduce=reduce, padding="dropped")(x, size=(6, 1))


def test_widths_and_biases() -> None:
    module = GlobalSubsampledAttention(12, 2, 2, reduce="mean", bias=False, head_dim=3, out_dim=5, out_bias=True)
    assert module(torch.randn(1, 12, 12), size=(4, 3)).shape == (1, 12, 5)
    assert module.attention.q.bias is None and module.attention.out.bias is not None
    assert MultiHeadAttention(12, 3, bias=True, out_bias=False).out.bias is None
    assert MultiHeadAttention(12, 3, bias=True).out.bias is not None
    assert MultiHeadAttention(12, 3).out.bias is None


@pytest.mark.parametrize("options", [{"ratio": 0}, {"reduce": "max"}, {"padding": "cut"}], ids=str)
def test_bad_options(options: dict) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}="):
        GlobalSubsampledAttention(12, 3, **options)
