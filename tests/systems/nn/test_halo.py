"""Halo attention: token by token, at its limits, under shifts, with strides, and over the edges of the grid."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn import Block, HaloAttention, WindowAttention
from tests.support.tensors import assert_near, gradients
from tests.systems.nn.digits import accuracy, fit

DIM, HEADS, WIDTH = 12, 3, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(block: int, halo: int, **options) -> HaloAttention:
    torch.manual_seed(0)
    return HaloAttention(DIM, HEADS, block, halo, WIDTH, **options).double()


def by_hand(module: HaloAttention, x: Tensor, size: tuple[int, int], seen: bool, stride: int = 1) -> Tensor:
    """Compute one query of one head of one image at a time; x is `(N, C)`."""
    (rows, columns), b, h = size, module.block, module.halo
    q = F.linear(x, module.q.weight, module.q.bias).reshape(rows, columns, HEADS, WIDTH)
    kv = F.linear(x, module.kv.weight, module.kv.bias).unflatten(0, size)
    k, v = kv[..., : HEADS * WIDTH].unflatten(-1, (HEADS, -1)), kv[..., HEADS * WIDTH :].unflatten(-1, (HEADS, -1))
    zero, out, centre = torch.zeros(WIDTH, dtype=x.dtype), [], b + 2 * h - 1
    for row in range(0, rows, stride):
        for column in range(0, columns, stride):
            top, left = row // b * b - h, column // b * b - h
            for head in range(HEADS):
                query, logits, values = q[row, column, head], [], []
                for i in range(top, top + b + 2 * h):
                    for j in range(left, left + b + 2 * h):
                        on = 0 <= i < rows and 0 <= j < columns
                        if not on and not seen:
                            continue
                        logit = query @ (k[i, j, head] if on else zero) / WIDTH**0.5
                        if module.rows is not None:
                            logit = logit + query @ module.rows[i - row + centre]
                            logit = logit + query @ module.columns[j - column + centre]
                        logits.append(logit)
                        values.append(v[i, j, head] if on else torch.zeros(DIM // HEADS, dtype=x.dtype))
                out.append(torch.stack(logits).softmax(0) @ torch.stack(values))
    return torch.cat(out).reshape(-1, DIM)


@pytest.mark.parametrize("padding", ["hidden", "seen"])
@pytest.mark.parametrize(
    ("size", "block", "halo"), [((4, 6), 2, 1), ((5, 3), 2, 2), ((3, 2), 4, 1), ((4, 4), 2, 0), ((2, 3), 1, 1)]
)
def test_the_layer_token_by_token(size: tuple[int, int], block: int, halo: int, padding: str) -> None:
    """Also on grids that blocks do not divide, and smaller than one block."""
    module, x = layer(block, halo, padding=padding, bias=True), randn(2, size[0] * size[1], DIM)
    expected = torch.stack([by_hand(module, image, size, padding == "seen") for image in x])
    assert_near(module(x, size=size), expected, 1e-12)


def test_positions_are_left_out_on_request() -> None:
    module, x = layer(2, 1, relative=False), randn(1, 20, DIM)
    assert_near(module(x, size=(4, 5))[0], by_hand(module, x[0], (4, 5), False), 1e-12)
    assert len(list(module.parameters())) == 2


def test_sizes_of_parameters() -> None:
    module = HaloAttention(64, 4)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "rows": (27, 16), "columns": (27, 16), "q.weight": (64, 64), "kv.weight": (128, 64),
    }  # fmt: skip
    assert (module.block, module.halo, module.padding) == (8, 3, "hidden")
    torch.manual_seed(0)
    fresh = HaloAttention(256, 4, 8, 3, 64)
    assert abs(fresh.rows.std().item() - 64**-0.5) < 0.01
    assert abs(fresh.q.weight.std().item() - 256**-0.5) < 0.01


# -- limits ------------------------------------------------------------------------------------------------------------


def projected(module: HaloAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv = module.kv(x)
    parts = module.q(x), kv[..., : HEADS * WIDTH], kv[..., HEADS * WIDTH :]
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
    return q, k, v


@pytest.mark.parametrize("size", [(4, 4), (3, 4), (2, 2)])
def test_one_block_without_a_halo_is_global_attention(size: tuple[int, int]) -> None:
    """Also where the block is larger than the grid."""
    module, x = layer(4, 0, relative=False), randn(2, size[0] * size[1], DIM)
    expected = F.scaled_dot_product_attention(*projected(module, x)).transpose(1, 2).flatten(2)
    assert_near(module(x, size=size), expected, 1e-12)


@pytest.mark.parametrize("padding", ["hidden", "seen"])
def test_without_a_halo_it_is_window_attention(padding: str) -> None:
    module, x = layer(2, 0, relative=False, padding=padding), randn(2, 15, DIM)
    windows = WindowAttention(DIM, HEADS, 2, head_dim=WIDTH, bias=False, padding=padding).double()
    other = windows.attention
    other.v = nn.Linear(DIM, DIM, bias=False).double()
    other.value_dim, other.out = DIM // HEADS, nn.Identity()
    k, v = module.kv.weight.split([HEADS * WIDTH, DIM])
    with torch.no_grad():
        for part, weight in ((other.q, module.q.weight), (other.k, k), (other.v, v)):
            part.weight.copy_(weight)
    assert_near(module(x, size=(5, 3)), windows(x, size=(5, 3)), 1e-12)


def test_blocks_of_one_token_attend_to_the_square_around_it() -> None:
    module, x, size = layer(1, 1, relative=False), randn(2, 20, DIM), (4, 5)
    row, column = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    at = torch.stack([row.flatten(), column.flatten()])
    near = ((at[:, :, None] - at[:, None]).abs() <= 1).all(0)
    expected = F.scaled_dot_product_attention(*projected(module, x), attn_mask=near).transpose(1, 2).flatten(2)
    assert_near(module(x, size=size), expected, 1e-12)


# -- shifts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_shifts_by_a_block_shift_the_output(axis: int) -> None:
    """Inside, away from edges; shifts by one token do not, unless blocks have one token."""

    def differs(block: int, shift: int) -> float:
        module, size = layer(block, 1), (12, 12)
        wide = randn(1, 16, 16, DIM)
        moved = wide[:, shift : shift + 12, :12] if axis == 0 else wide[:, :12, shift : shift + 12]
        out = [module(x[:, :12, :12].flatten(1, 2), size=size).unflatten(1, size) for x in (wide, moved)]
        inside = slice(6, 10)
        first = out[0][:, inside, inside]
        second = out[1].roll(shift, 1 + axis)[:, inside, inside]
        return (first - second).abs().max().item()

    assert differs(2, 2) < 1e-12 and differs(2, 4) < 1e-12 and differs(1, 1) < 1e-12
    assert differs(2, 1) > 1e-2


# -- strides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["hidden", "seen"])
@pytest.mark.parametrize(("size", "block", "stride"), [((4, 8), 4, 2), ((5, 7), 2, 2), ((7, 4), 3, 3), ((3, 2), 4, 4)])
def test_a_stride_takes_fewer_queries(size: tuple[int, int], block: int, stride: int, padding: str) -> None:
    module, x = layer(block, 1, stride=stride, padding=padding), randn(2, size[0] * size[1], DIM)
    expected = torch.stack([by_hand(module, image, size, padding == "seen", stride) for image in x])
    assert_near(module(x, size=size), expected, 1e-12)
    whole = layer(block, 1, padding=padding)
    whole.load_state_dict(module.state_dict())
    every = whole(x, size=size).unflatten(1, size)[:, ::stride, ::stride].flatten(1, 2)
    assert_near(module(x, size=size), every, 1e-12)
    assert all(grad.any() for grad in gradients(module(x, size=size), list(module.parameters())))


@pytest.mark.parametrize(("size", "block", "stride"), [((4, 6), 3, 2), ((5, 7), 2, 2), ((2, 2), 2, 3)])
def test_pooling_averages_all_outputs(size: tuple[int, int], block: int, stride: int) -> None:
    module, x = layer(block, 1, stride=stride, pool=True), randn(2, size[0] * size[1], DIM)
    whole = layer(block, 1)
    whole.load_state_dict(module.state_dict())
    grid = whole(x, size=size).unflatten(1, size)
    expected = [
        grid[:, row : row + stride, column : column + stride].mean((1, 2))
        for row in range(0, size[0], stride)
        for column in range(0, size[1], stride)
    ]
    assert_near(module(x, size=size), torch.stack(expected, 1), 1e-12)


def test_gradients_reach_tokens_over_the_halo_only() -> None:
    module, x = layer(2, 1), randn(1, 48, DIM).requires_grad_()
    out = module(x, size=(6, 8)).unflatten(1, (6, 8))
    (grad,) = torch.autograd.grad(out[:, 2, 2].sum(), x)
    reached = grad.unflatten(1, (6, 8)).abs().sum(-1)[0] > 0
    expected = torch.zeros_like(reached)
    expected[1:5, 1:5] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5 must divide dim=12"), ({"block": 0}, "block=0"), ({"halo": -1}, "halo=-1"),
        ({"head_dim": 0}, "head_dim=0"), ({"stride": 0}, "stride=0"), ({"padding": "cut"}, "padding='cut'"),
        ({"block": 3, "stride": 2}, "stride=2 must divide block=3, unless pool=True"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HaloAttention(**{"dim": DIM, "heads": HEADS, **options})


# -- what the paper claims ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Digits at 16 x 16 pixels, one token each 2 x 2; strokes cross the borders of blocks of 4 x 4 tokens."""

    def __init__(self, halo: int, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 2, 2)
        self.blocks = nn.ModuleList(
            Block(HaloAttention(dim, 4, 4, halo, 8), nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim)))
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(F.interpolate(images[:, None], scale_factor=2.0, mode="bilinear")).flatten(2).mT
        for block in self.blocks:
            x = block(x, size=(8, 8))
        return self.head(self.norm(x).mean(1))


@cache
def read(halo: int, seeds: int = 3) -> float:
    """Return the mean accuracy after 300 steps."""
    found = 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        found += accuracy(fit(Net(halo), seed, epochs=7, batch=32))
    return found / seeds


@pytest.mark.slow
def test_a_halo_reads_across_the_borders_of_blocks(claim) -> None:
    claim(
        "a halo of 2 reads digits whose strokes cross blocks better than none: accuracy, 3 seeds, 300 steps",
        ours=read(2), baseline=read(0), better="higher", baseline_name="halo=0, window attention", seed=0,
    )  # fmt: skip
