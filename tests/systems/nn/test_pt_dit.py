"""PT-DiT: proxies of windows, what they bring to all tokens, windows and shifted windows, the block."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.parts.boxes import Boxes
from foveate.nn.parts.cost import cost
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.vision.proxy_tokens import ProxyTokenAttention, proxy_tokens
from foveate.nn.vision.pt_dit import PTDiTBlock, TimeSlots
from tests.support.tensors import assert_near

DIM, HEADS = 12, 3
Grid = tuple[int, int, int]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(module: nn.Module) -> Any:
    """Move every parameter, so that each has an effect, in float64."""
    module, draw = module.double().eval(), seeded()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return module


def layer(window: Grid, **options: Any) -> ProxyTokenAttention:
    torch.manual_seed(0)
    return shaken(ProxyTokenAttention(DIM, HEADS, window, **options))


def block(window: Grid = (1, 2, 2), **options: Any) -> PTDiTBlock:
    torch.manual_seed(0)
    return shaken(PTDiTBlock(DIM, HEADS, window, **options))


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(part: MultiHeadAttention, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (
        (given @ each.weight.mT + each.bias).unflatten(2, (HEADS, -1)).transpose(1, 2)
        for each, given in ((part.q, x), (part.k, source), (part.v, source))
    )
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ part.out.weight.mT + part.out.bias


def cells(grid: Grid, window: Grid) -> list[tuple[slice, ...]]:
    starts = [range(0, long, side) for long, side in zip(grid, window, strict=True)]
    return [tuple(slice(at, at + side) for at, side in zip(corner, window, strict=True)) for corner in product(*starts)]


GRIDS = [(1, 4, 4), (1, 5, 7), (4, 4, 6), (3, 5, 2), (1, 1, 1), (2, 3, 9)]
WINDOWS = [(1, 2, 2), (2, 2, 3), (1, 4, 1), (1, 1, 1), (4, 8, 8)]


# -- proxies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_proxy_is_the_mean_of_its_window(grid: Grid, window: Grid) -> None:
    z = randn(2, *grid, 3)
    expected = torch.stack([z[:, f, h, w].flatten(1, 3).mean(1) for f, h, w in cells(grid, window)], 1)
    assert_near(proxy_tokens(z, window), expected, 1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_random_proxy_is_a_token_of_its_window(grid: Grid, window: Grid) -> None:
    z = torch.arange(1.0, 1 + math.prod(grid)).view(1, *grid, 1).repeat(3, 1, 1, 1, 1)
    found = proxy_tokens(z, window, "random", seeded())
    for number, (f, h, w) in enumerate(cells(grid, window)):
        for item in range(3):
            assert found[item, number, 0] in z[item, f, h, w]


@pytest.mark.parametrize(("grid", "places"), [((1, 2, 3), 6), ((1, 1, 2), 2)])
def test_every_token_of_a_window_is_drawn_as_often(grid: Grid, places: int) -> None:
    """The second window holds what is left of the grid: zeros that fill it up are never drawn."""
    draws = 4000
    z = torch.arange(1.0, 1 + places).view(1, *grid, 1).expand(draws, *grid, 1)
    found = proxy_tokens(z, (1, 2, 3), "random", seeded())[:, 0, 0]
    for value in range(1, 1 + places):
        share, chance = (found == value).double().mean().item(), 1 / places
        assert abs(share - chance) < 3 * math.sqrt(chance * (1 - chance) / draws)


def test_draws_are_those_of_the_generator() -> None:
    z = randn(2, 1, 8, 8, 3)
    one, same, other = (proxy_tokens(z, (1, 4, 4), "random", seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    generator = seeded()
    assert not torch.equal(*(proxy_tokens(z, (1, 4, 4), "random", generator) for _ in range(2)))
    twice = proxy_tokens(z[:1].expand(2, -1, -1, -1, -1), (1, 4, 4), "random", seeded())
    assert not torch.equal(twice[0], twice[1]), "examples draw for themselves"


def test_both_modes_agree_where_windows_are_flat() -> None:
    z = randn(2, 2, 2, 3, 5).repeat_interleave(2, 1).repeat_interleave(3, 2).repeat_interleave(2, 3)
    random = proxy_tokens(z, (2, 3, 2), "random", seeded())
    assert_near(random, proxy_tokens(z, (2, 3, 2)), 1e-12)
    layers = layer((2, 3, 2)), layer((2, 3, 2), proxy="random", generator=seeded()).train()
    x = F.pad(z, (0, DIM - 5)).flatten(1, 3)
    assert_near(layers[0].over(x, (4, 6, 6)), layers[1].over(x, (4, 6, 6)), 1e-10)


# -- attention through proxies -----------------------------------------------------------------------------------------


def test_windows_of_one_token_are_full_attention() -> None:
    net, x = layer((1, 1, 1)), randn(2, 12, DIM)
    assert torch.equal(net.proxies(x, (1, 3, 4)), x)
    p = x + attend(net.among, norm(x), norm(x))
    assert_near(net(x, size=(3, 4)), attend(net.reading, norm(x), norm(p)), 1e-10)


@pytest.mark.parametrize(("grid", "window"), [((1, 4, 6), (1, 2, 3)), ((1, 5, 7), (1, 2, 3)), ((4, 3, 5), (2, 2, 2))])
def test_all_tokens_read_all_proxies(grid: Grid, window: Grid) -> None:
    net, x = layer(window), randn(2, math.prod(grid), DIM)
    image = x.unflatten(1, grid)
    p = torch.stack([image[:, f, h, w].flatten(1, 3).mean(1) for f, h, w in cells(grid, window)], 1)
    p = p + attend(net.among, norm(p), norm(p))
    expected = attend(net.reading, norm(x), norm(p))
    assert_near(net.over(x, grid), expected, 1e-10)
    if grid[0] == 1:
        assert_near(net(x, size=grid[1:]), expected, 1e-10)


def test_random_proxies_are_drawn_in_training_only() -> None:
    net, x = layer((1, 2, 2), proxy="random", generator=seeded()), randn(2, 16, DIM)
    assert_near(net(x, size=(4, 4)), layer((1, 2, 2))(x, size=(4, 4)), 0)
    one, two = (net.train()(x, size=(4, 4)) for _ in range(2))
    assert (one - two).abs().max() > 1e-3


def attention_macs(net: nn.Module, n: int, linear: int) -> int:
    side = math.isqrt(n)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, size=(side, side))

    return cost(Called(), torch.empty(1, n, 16, device="meta")).macs - linear


def test_fewer_pairs_than_full_attention() -> None:
    """Of 1024 tokens with windows of 16: 64 proxies among each other, and all tokens to them."""
    n, m, d = 1024, 64, 16
    net = ProxyTokenAttention(d, 2, (1, 4, 4))
    pairs = attention_macs(net, n, (4 * m + 2 * n + 2 * m) * d * d) / (2 * d)
    assert pairs == m * m + n * m
    assert pairs + 2 * n * 16 < 0.3 * n * n, "with windows and shifted windows"


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_boxes_are_put_together_again(grid: Grid, window: Grid, shifted: bool) -> None:
    boxes, x = Boxes.fitting(grid, window, shifted=shifted), randn(2, math.prod(grid), 3)
    cut = boxes.partition(x)
    assert cut.shape == (2 * math.prod(boxes.counts), math.prod(boxes.box), 3)
    assert torch.equal(boxes.merge(cut), x)
    assert boxes.real().sum() == math.prod(grid)


def together(grid: Grid, window: Grid, shifted: bool) -> Tensor:
    """Return which tokens share a window: `(N, N)`; a shifted window that wraps around falls into parts."""
    rows = torch.cartesian_prod(*(torch.arange(long) for long in grid)).view(-1, 3)
    marks = []
    for axis in range(3):
        side = min(window[axis], grid[axis])
        by = side // 2 if shifted else 0
        at = rows[:, axis]
        marks.append(torch.where(at < by, -1, (at - by) // side))
    where = torch.stack(marks, 1)
    return (where[:, None] == where).all(-1)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_attention_under_a_mask(grid: Grid, window: Grid, shifted: bool) -> None:
    net, z = block(window), randn(2, math.prod(grid), DIM)
    shift, scale, gate = randn(3, 2, DIM, seed=1)
    boxes = Boxes.fitting(grid, window, shifted=shifted)
    given = norm(z) * (1 + scale[:, None]) + shift[:, None]
    expected = gate[:, None] * attend(net.shifted, given, given, together(grid, window, shifted))
    assert_near(net._in_windows(z, boxes, net.shifted, (shift, scale, gate)), expected, 1e-10)


def test_plain_windows_that_fit_need_no_mask() -> None:
    assert Boxes.fitting((1, 4, 4), (1, 2, 2)).mask() is None
    assert Boxes.fitting((1, 4, 4), (1, 1, 1), shifted=True).mask() is None
    assert Boxes.fitting((1, 4, 5), (1, 2, 2)).mask() is not None


# -- the block ---------------------------------------------------------------------------------------------------------


def by_hand(net: PTDiTBlock, z: Tensor, grid: Grid, times: Tensor, text: Tensor) -> Tensor:
    slots = net.slots + times.unflatten(1, (6, DIM))
    shifted = net.shifted_slots + times.unflatten(1, (6, DIM))[:, :3]

    def modulated(x: Tensor, both: Tensor) -> Tensor:
        return norm(x) * (1 + both[:, 1, None]) + both[:, 0, None]

    def linear(part: nn.Linear, x: Tensor) -> Tensor:
        return x @ part.weight.mT + part.bias

    z = z + linear(net.from_proxies, net.proxies.over(z, grid))
    given = modulated(z, slots[:, :2])
    z = z + slots[:, 2, None] * attend(net.windows, given, given, together(grid, net.window, False))
    given = modulated(z, shifted[:, :2])
    found = attend(net.shifted, given, given, together(grid, net.window, True))
    z = z + linear(net.from_shifted, shifted[:, 2, None] * found)
    text = text if isinstance(net.text_in, nn.Identity) else linear(net.text_in, text)
    z = z + attend(net.text, z, text)
    hidden = F.gelu(linear(net.mlp[0], modulated(z, slots[:, 3:5])), approximate="tanh")
    return z + slots[:, 5, None] * linear(net.mlp[2], hidden)


@pytest.mark.parametrize("text_dim", [DIM, 7])
@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 5, 4)])
def test_the_block_by_hand(grid: Grid, text_dim: int) -> None:
    net, z = block((2, 2, 3), text_dim=text_dim), randn(2, math.prod(grid), DIM)
    times, text = randn(2, 6 * DIM, seed=1), randn(2, 5, text_dim, seed=2)
    assert_near(net(z, grid, times, text), by_hand(net, z, grid, times, text), 1e-10)


def test_a_new_block_has_plain_windows_text_and_mlp_alone() -> None:
    torch.manual_seed(0)
    net, z = PTDiTBlock(DIM, HEADS, (1, 2, 2), text_dim=DIM).double(), randn(2, 16, DIM)
    times, text = randn(2, 6 * DIM, seed=1), randn(2, 5, DIM, seed=2)
    before = net(z, (1, 4, 4), times, text)
    for part in (net.proxies.reading, net.shifted):
        nn.init.normal_(part.v.weight)
    assert torch.equal(net(z, (1, 4, 4), times, text), before)
    nn.init.normal_(net.windows.v.weight)
    assert (net(z, (1, 4, 4), times, text) - before).abs().max() > 1e-3


def test_examples_with_different_times_are_independent() -> None:
    net, z, times, text = block(text_dim=DIM), randn(3, 20, DIM), randn(3, 6 * DIM, seed=1), randn(3, 5, DIM, seed=2)
    out = net(z, (1, 4, 5), times, text)
    for i in range(3):
        assert_near(net(z[i : i + 1], (1, 4, 5), times[i : i + 1], text[i : i + 1]), out[i : i + 1], 1e-10)


def test_padded_text_has_no_effect() -> None:
    net, z, times = block(text_dim=7), randn(2, 16, DIM), randn(2, 6 * DIM, seed=1)
    text, mask = randn(2, 5, 7, seed=2), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = net(z, (1, 4, 4), times, text, mask)
    text[1, 3:] = 100.0
    assert_near(net(z, (1, 4, 4), times, text, mask), out, 1e-10)
    assert_near(net(z[1:], (1, 4, 4), times[1:], text[1:, :3]), out[1:], 1e-10)


def test_gradients_reach_every_parameter() -> None:
    net, z = block(text_dim=7, proxy="random", generator=seeded()).train(), randn(2, 16, DIM)
    net(z, (1, 4, 4), randn(2, 6 * DIM), randn(2, 5, 7)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for name, p in net.named_parameters() if ".k.bias" not in name
    )


def test_time_slots_by_hand() -> None:
    torch.manual_seed(0)
    net, times = TimeSlots(DIM, 8).double(), torch.tensor([0.0, 10.0, 999.0]).double()
    rates = torch.tensor([10_000 ** (-i / 4) for i in range(4)])
    waves = torch.cat([(times[:, None] * rates).cos(), (times[:, None] * rates).sin()], 1)
    expected = net.slots[1](F.silu(net.embed[2](F.silu(net.embed[0](waves.double())))))
    assert_near(net(times), expected, 1e-4)
    assert net(times).shape == (3, 6 * DIM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (2, 2)}, r"window=\(2, 2\) must be \(frames, rows, columns\)"), ({"window": (1, 0, 2)}, "window=0"),
        ({"proxy": "first"}, "proxy='first'"), ({"heads": 5}, "heads=5 must divide dim=12"),
        ({"proxy": "random"}, 'generator must come with proxy="random"'),
        ({"generator": seeded()}, 'generator must come with proxy="random", and only with it'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [ProxyTokenAttention, PTDiTBlock])
def test_bad_options(cls: Any, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cls(**{"dim": DIM, "heads": HEADS, **options})


def test_malformed_calls() -> None:
    net, z, times, text = block(text_dim=7), randn(2, 16, DIM), randn(2, 6 * DIM), randn(2, 5, 7)
    grid = (1, 4, 4)
    for given, message in (
        ((z[..., 1:], grid, times, text), "z must be"), ((z, (1, 4, 5), times, text), "grid="),
        ((z, grid, times[:, 1:], text), "times must be"), ((z, grid, times), "text must be"),
        ((z, grid, times, text[..., 1:]), "text must be"), ((z, grid, times, text, torch.ones(2, 4) > 0), "text_mask"),
    ):  # fmt: skip
        with pytest.raises((ShapeError, OptionError), match=message) as caught:
            net(*given)
        assert "\n" not in str(caught.value)
    with pytest.raises(ShapeError, match="text must be left out"):
        block()(z, grid, times, text)
    with pytest.raises(ShapeError, match="z must be"):
        proxy_tokens(z, (1, 2, 2))
    with pytest.raises(OptionError, match="generator=None"):
        proxy_tokens(randn(1, 1, 2, 2, 3), (1, 2, 2), "random")
    with pytest.raises(OptionError, match="frequencies=7 must be even"):
        TimeSlots(4, 7)


# -- what the paper claims ---------------------------------------------------------------------------------------------

SIDE, WINDOW, CODES = 16, 4, 4


def tasks(batch: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens with a tone, a code and a value, and two targets of each.

    The global one is the mean of all windows' tones, times 4; the fine one is the mean value of the tokens of the same
    code in the token's window, times 2. Both have a variance of about 1.
    """
    many, t = (SIDE // WINDOW) ** 2, WINDOW**2
    tones = torch.randn(batch, many, 1, generator=random)
    values = torch.randn(batch, many, t, generator=random)
    codes = F.one_hot(torch.randint(CODES, (batch, many, t), generator=random), CODES).float()
    alike = codes @ codes.mT
    fine = 2 * (alike @ values[..., None])[..., 0] / alike.sum(-1)
    mean = 4 * tones.mean(1, keepdim=True).expand(-1, many, t)
    x = torch.cat([tones.expand(-1, -1, t)[..., None], codes, values[..., None]], -1)
    boxes = Boxes((1, SIDE, SIDE), (1, WINDOW, WINDOW))
    return boxes.merge(x.flatten(0, 1)), boxes.merge(torch.stack([mean, fine], -1).flatten(0, 1))


class Painter(nn.Module):
    """One block without text; `parts` are "both", "windows" or "proxies"."""

    def __init__(self, parts: str, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CODES + 2, dim), nn.Linear(dim, 2)
        self.block = PTDiTBlock(dim, 2, (1, WINDOW, WINDOW))
        if parts == "windows":
            self.block.from_proxies.requires_grad_(False)
        if parts == "proxies":
            self.block._in_windows = lambda z, *rest: torch.zeros_like(z)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        times = x.new_zeros(len(x), 6 * self.embed.out_features)
        return self.head(self.block(self.embed(x), (1, SIDE, SIDE), times))


@cache
def errors(parts: str, seed: int, steps: int = 300) -> tuple[float, float]:
    """Train; return the mean squared errors of both targets on new images."""
    torch.manual_seed(seed)
    net, random = Painter(parts), seeded(seed)
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, y = tasks(4, random)
        optimiser.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x, y = tasks(64, seeded(99))
        found = (net(x) - y).square().mean((0, 1))
        return found[0].item(), found[1].item()


@pytest.mark.slow
def test_proxies_and_windows_together_carry_what_each_alone_misses(claim) -> None:
    found = {
        parts: [sum(each) / 3 for each in zip(*(errors(parts, seed) for seed in range(3)), strict=True)]
        for parts in ("both", "windows", "proxies")
    }
    for place, (parts, what) in enumerate((("windows", "the whole image"), ("proxies", "a token's window"))):
        claim(
            f"proxies with windows bring every token what it needs of {what}: squared error, 3 seeds",
            ours=found["both"][place], baseline=found[parts][place], better="lower", margin=0.3,
            baseline_name=f"{parts} alone", seed=0,
        )  # fmt: skip
    both, *alone = (sum(found[parts]) for parts in ("both", "windows", "proxies"))
    claim(
        "proxies with windows do both: sum of squared errors, 3 seeds", ours=both, baseline=min(alone), better="lower",
        margin=0.3, baseline_name="the better of windows alone and proxies alone", seed=0,
    )  # fmt: skip
