"""HiLo: heads inside windows and heads for the windows' means, by hand, at their limits, and what they cost."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn import (
    Block,
    DepthwiseConv,
    GlobalSubsampledAttention,
    HiLoAttention,
    Layer,
    MultiHeadAttention,
    WindowAttention,
    cost,
)
from tests.support.tensors import assert_near
from tests.systems.nn.digits import accuracy, fit

DIM, HEADS, WIDTH = 24, 6, 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options) -> HiLoAttention:
    torch.manual_seed(0)
    return HiLoAttention(DIM, HEADS, **options).double()


def attend(part: MultiHeadAttention, x: Tensor, keys: Tensor) -> Tensor:
    """Attend with a part's projections to the tokens of `keys`, head by head, for one image."""
    q, k, v = (F.linear(t, p.weight, p.bias) for t, p in ((x, part.q), (keys, part.k), (keys, part.v)))
    heads = [slice(at, at + WIDTH) for at in range(0, q.shape[-1], WIDTH)]
    out = [(q[:, at] @ k[:, at].mT * WIDTH**-0.5).softmax(-1) @ v[:, at] for at in heads]
    return F.linear(torch.cat(out, -1), part.out.weight, part.out.bias)


def by_hand(module: HiLoAttention, x: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """Compute one image window by window."""
    high, means = torch.zeros(len(x), module.high_heads * WIDTH, dtype=x.dtype), []
    index = torch.arange(len(x)).reshape(size)
    for row in range(0, size[0], window):
        for column in range(0, size[1], window):
            inside = index[row : row + window, column : column + window].flatten()
            means.append(x[inside].mean(0))
            high[inside] = attend(module.high.attention, x[inside], x[inside])
    return torch.cat([high, attend(module.low.attention, x, torch.stack(means))], -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "alpha"),
    [((4, 6), 2, 0.5), ((5, 7), 2, 0.34), ((6, 9), 3, 0.9), ((3, 2), 4, 0.5), ((1, 5), 2, 0.5)],
)
def test_the_layer_by_hand(size: tuple[int, int], window: int, alpha: float, bias: bool) -> None:
    """Also on grids that windows do not divide, and smaller than one window: padding is neither seen nor counted."""
    module, x = layer(window=window, alpha=alpha, bias=bias), randn(2, size[0] * size[1], DIM)
    expected = torch.stack([by_hand(module, image, size, window) for image in x])
    assert_near(module(x, size=size), expected, 1e-12)


def test_padding_that_is_seen() -> None:
    """The layer's output is then that on the grid with its zeros, cut out."""
    module, x = layer(padding="seen", bias=True), randn(2, 15, DIM)
    filled = F.pad(x.unflatten(1, (5, 3)), (0, 0, 0, 1, 0, 1))
    expected = module(filled.flatten(1, 2), size=(6, 4)).unflatten(1, (6, 4))[:, :5, :3].flatten(1, 2)
    assert_near(module(x, size=(5, 3)), expected, 1e-12)
    hidden = layer(bias=True)
    assert (hidden(x, size=(5, 3)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("heads", "alpha", "low"), [(6, 0.5, 3), (6, 0.9, 5), (6, 0.1, 0), (12, 0.9, 10), (100, 0.29, 29), (6, 1, 6)]
)
def test_heads_of_each_kind(heads: int, alpha: float, low: int) -> None:
    module = HiLoAttention(2 * heads, heads, alpha=alpha)
    assert (module.low_heads, module.high_heads) == (low, heads - low)
    assert (module.low is None, module.high is None) == (low == 0, low == heads)


# -- limits ------------------------------------------------------------------------------------------------------------


def with_weights_of(part: Layer, other: Layer) -> Layer:
    other.load_state_dict(part.state_dict())
    return other.double()


def test_windows_of_one_token_make_it_multi_head_attention() -> None:
    module, x = layer(window=1, bias=True), randn(2, 15, DIM)
    plain = with_weights_of(module.low.attention, MultiHeadAttention(DIM, HEADS, bias=True))
    assert module.high is None
    assert_near(module(x, size=(5, 3)), plain(x), 1e-12)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_without_low_heads_it_is_window_attention(size: tuple[int, int]) -> None:
    module, x = layer(alpha=0, bias=True), randn(2, size[0] * size[1], DIM)
    windows = with_weights_of(module.high, WindowAttention(DIM, HEADS, 2, padding="hidden"))
    assert module.low is None and module.capabilities.growth == "N"
    assert_near(module(x, size=size), windows(x, size=size), 1e-12)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_without_high_heads_it_is_attention_to_averages(size: tuple[int, int]) -> None:
    module, x = layer(alpha=1, bias=True), randn(2, size[0] * size[1], DIM)
    pooled = with_weights_of(module.low, GlobalSubsampledAttention(DIM, HEADS, 2, reduce="mean"))
    assert module.high is None and module.capabilities.growth == "N²"
    assert_near(module(x, size=size), pooled(x, size=size), 1e-12)


# -- frequencies -------------------------------------------------------------------------------------------------------


def test_low_heads_do_not_see_what_a_window_averages_out() -> None:
    """A checkerboard has the mean 0 in every window: Lo-Fi's output is constant, and Hi-Fi's is not."""
    module = layer()
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = (1 - 2 * ((row + column) % 2)).double().flatten()
    x = board[None, :, None] * randn(1, 1, DIM)
    high, low = module(x, size=(8, 8)).split([12, 12], -1)
    assert low.var(1).mean() < 1e-20
    assert high.var(1).mean() > 1e-3
    assert low.var(1).mean() < 0.05 * high.var(1).mean(), "the promise, in its words"


def test_high_heads_do_not_see_what_is_constant_in_a_window() -> None:
    """With one value in each window, Hi-Fi returns one value in each window."""
    module, blocks = layer(), randn(1, 4, 4, DIM)
    x = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    high, _ = module(x, size=(8, 8)).split([12, 12], -1)
    inside = high.unflatten(1, (4, 2, 4, 2)).transpose(2, 3)
    assert (inside - inside[:, :, :, :1, :1]).abs().max() < 1e-12
    assert inside[:, :, :, 0, 0].var() > 1e-4


# -- cost --------------------------------------------------------------------------------------------------------------


class Called(nn.Module):
    def __init__(self, layer: Layer, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, size=self.size)


def macs(layer: Layer, size: tuple[int, int]) -> int:
    return cost(Called(layer, size), torch.empty(1, size[0] * size[1], layer.dim)).macs


@pytest.mark.parametrize(("heads", "window", "alpha"), [(8, 2, 0.5), (8, 4, 0.25), (4, 2, 0.9), (8, 1, 0.5)])
def test_its_multiply_adds_are_those_of_the_paper(heads: int, window: int, alpha: float) -> None:
    dim, n, squared = 32, 64, window**2
    module = HiLoAttention(dim, heads, window, alpha)
    high, low = module.high_heads * dim // heads, module.low_heads * dim // heads
    high_macs = 4 * n * high * dim - n * high * (dim - high) + 2 * squared * n * high
    low_macs = n * low * dim + 2 * (n // squared) * low * dim + n * low**2 + 2 * n * (n // squared) * low
    assert macs(module, (8, 8)) == high_macs + low_macs


def test_it_costs_less_than_full_attention(claim) -> None:
    size = (28, 28)
    claim(
        "HiLo costs at least 30 % less than full attention: multiply-adds on 28 x 28 tokens of width 192",
        ours=macs(HiLoAttention(192, 6), size), baseline=0.7 * macs(HiLoAttention(192, 6, 1), size), better="lower",
        baseline_name="multi-head attention, less 30 %", seed=0,
    )  # fmt: skip


# -- the release's parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_of_the_release_load(bias: bool) -> None:
    """A layer with random parameters of the release's names and shapes gives what its formula gives."""
    module, width = layer(alpha=0.34, bias=bias), 16
    shapes = {"l_q": (8, DIM), "l_kv": (16, DIM), "l_proj": (8, 8), "h_qkv": (48, DIM), "h_proj": (width, width)}
    released = {f"{name}.weight": randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    released |= {
        f"{name}.bias": randn(shape[0], seed=9 + i) for i, (name, shape) in enumerate(shapes.items())
        if bias or "proj" in name
    }  # fmt: skip
    module.load_released(released)
    x = randn(1, 24, DIM)

    def linear(name: str, t: Tensor) -> Tensor:
        return F.linear(t, released[f"{name}.weight"], released.get(f"{name}.bias"))

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, WIDTH)).movedim(-2, -3)

    cells = x.reshape(1, 2, 2, 3, 2, DIM).transpose(2, 3).flatten(3, 4)  # windows of 4 tokens: (1, 2, 3, 4, C)
    high = F.scaled_dot_product_attention(*(heads(t) for t in linear("h_qkv", cells).chunk(3, -1)))
    high = linear("h_proj", high.movedim(-3, -2).flatten(-2)).unflatten(3, (2, 2)).transpose(2, 3).reshape(1, 24, width)
    low = F.scaled_dot_product_attention(
        heads(linear("l_q", x)), *(heads(t) for t in linear("l_kv", cells.mean(3).flatten(1, 2)).chunk(2, -1))
    )
    low = linear("l_proj", low.movedim(-3, -2).flatten(-2))
    assert_near(module(x, size=(4, 6)), torch.cat([high, low], -1), 1e-12)
    with pytest.raises(OptionError, match=r"do not fit this HiLoAttention: 1 missing \(low.attention.q.weight\)"):
        module.load_released({name: p for name, p in released.items() if name != "l_q.weight"})
    with pytest.raises(OptionError, match=r"'high.attention.qkv.weight' must have 3 equal parts"):
        module.load_released({**released, "h_qkv.weight": randn(47, DIM)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5 must divide dim=24"), ({"window": 0}, "window=0"), ({"alpha": 1.1}, "alpha=1.1"),
        ({"alpha": -0.1}, "alpha=-0.1"), ({"padding": "cut"}, "padding='cut'"), ({"heads": 0}, "heads=0"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HiLoAttention(**{"dim": DIM, "heads": HEADS, **options})


# -- what the paper claims ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Digits at 16 x 16 pixels, one token each 2 x 2, two blocks; the MLPs make all kinds of layers equally large."""

    def __init__(self, alpha: float, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(1, dim, 2, 2), DepthwiseConv(dim)
        layers = [HiLoAttention(dim, 4, 2, alpha) for _ in range(2)]
        self.blocks = nn.ModuleList(
            Block(layer, nn.Sequential(nn.Linear(dim, h := self.hidden(layer)), nn.GELU(), nn.Linear(h, dim)))
            for layer in layers
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    @staticmethod
    def hidden(layer: HiLoAttention) -> int:
        """Return the MLP's width at which a block has as many parameters as one of `alpha=0` and 64."""
        spare = 4 * layer.dim**2 - sum(p.numel() for name, p in layer.named_parameters() if "weight" in name)
        return 64 + spare // (2 * layer.dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(F.interpolate(images[:, None], scale_factor=2.0, mode="nearest")).flatten(2).mT
        x = x + self.place(x, (8, 8))
        for block in self.blocks:
            x = block(x, size=(8, 8))
        return self.head(self.norm(x).mean(1))


@cache
def read(alpha: float, seeds: int = 3) -> float:
    """Return the mean accuracy after 300 steps."""
    found = 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        found += accuracy(fit(Net(alpha), seed, epochs=14))
    return found / seeds


def test_the_networks_compared_are_equally_large() -> None:
    sizes = [cost(Net(alpha), torch.empty(1, 8, 8)) for alpha in (0.0, 0.5, 1.0)]
    assert max(size.parameters for size in sizes) < 1.01 * min(size.parameters for size in sizes)


@pytest.mark.slow
def test_both_kinds_of_heads_are_as_good_as_the_worse_one(claim) -> None:
    claim(
        "HiLo reads digits at least as well as the worse of its halves alone: accuracy, 3 seeds, 300 steps",
        ours=read(0.5), baseline=min(read(0.0), read(1.0)), better="higher",
        baseline_name="the worse of windows only and averages only, at equal parameters", seed=0,
    )  # fmt: skip
