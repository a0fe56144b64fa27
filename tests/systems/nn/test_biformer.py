"""BiFormer: the choice of regions, attention to them alone, the network, and what routing finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import OptionError, ShapeError
from foveate.models.vision.biformer import BiFormer
from foveate.nn import MultiHeadAttention, WindowAttention, Windows
from foveate.nn.vision.biformer import BiLevelRoutingAttention, bi_level_route, regions
from tests.support.tensors import assert_near, gradients

SIZES = [(8, 8), (7, 9), (3, 10), (1, 5), (5, 5)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(n_win: int = 2, topk: int | None = 2, *, dim: int = 12, heads: int = 3, seed: int = 0, **options: Any):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BiLevelRoutingAttention(dim, heads, n_win, topk, **options).double()


def region_of(size: tuple[int, int], n_win: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Return the region of each pixel of the filled-up map, that map's size, and the numbers of regions."""
    sides = [max(1, side // n_win) for side in size]
    counts = [math.ceil(side / each) for side, each in zip(size, sides, strict=True)]
    tall, wide = (count * each for count, each in zip(counts, sides, strict=True))
    row, column = torch.arange(tall)[:, None] // sides[0], torch.arange(wide) // sides[1]
    return row * counts[1] + column, (tall, wide), (counts[0], counts[1])


def by_hand(layer: BiLevelRoutingAttention, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute the layer with a mask over the whole filled-up map; return its output and the routes."""
    batch, _, dim = x.shape
    where, (tall, wide), counts = region_of(size, layer.n_win)
    real = torch.zeros(tall, wide, dtype=torch.bool)
    real[: size[0], : size[1]] = True
    q, k, v = (
        F.pad((x @ w.mT + b).unflatten(1, size), (0, 0, 0, wide - size[1], 0, tall - size[0]))
        for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    count, heads = counts[0] * counts[1], layer.heads
    inside = [real & (where == region) for region in range(count)]
    means_q, means_k = (torch.stack([y[:, each].mean(1) for each in inside], 1) for y in (q, k))
    affinity = torch.einsum("brc,bsc->brs", means_q, means_k)
    routes = affinity.argsort(-1, descending=True)[..., : count if layer.topk is None else layer.topk]
    chosen = torch.zeros(batch, count, count, dtype=torch.bool).scatter_(2, routes, True)
    pairs = chosen[:, where.flatten()][:, :, where.flatten()]
    if layer.padding == "hidden":
        pairs = pairs & real.flatten()
    q, k, v = (y.reshape(batch, tall * wide, heads, dim // heads).transpose(1, 2) for y in (q, k, v))
    logits = (q @ k.mT * layer.scale).masked_fill(~pairs[:, None], -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, tall, wide, dim)[:, : size[0], : size[1]]
    if layer.local is not None:
        image = (x @ layer.qkv.weight.chunk(3)[2].mT + layer.qkv.bias.chunk(3)[2]).mT.unflatten(2, size)
        conv = layer.local.conv
        around = F.conv2d(image, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=dim)
        out = out + around.movedim(1, -1)
    return out.flatten(1, 2) @ layer.out.weight.mT + layer.out.bias, routes


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["hidden", "seen"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("n_win", "topk"), [(2, 1), (2, 3), (3, 2), (7, 4)])
def test_it_is_attention_under_the_mask_of_its_routes(
    padding: str, size: tuple[int, int], n_win: int, topk: int
) -> None:
    layer, x = make(n_win, topk, padding=padding), randn(2, size[0] * size[1], 12)
    expected, routes = by_hand(layer, x, size)
    assert_near(layer(x, size=size), expected, 1e-10)
    assert torch.equal(layer.routes(x, size), routes)
    assert layer.local is not None and layer.local.conv.kernel_size == (5, 5)


def test_padding_has_an_effect_only_where_it_is_seen() -> None:
    x = randn(2, 63, 12)
    hidden, seen = make(4, 2)(x, size=(7, 9)), make(4, 2, padding="seen")(x, size=(7, 9))
    assert (hidden - seen).abs().max() > 1e-3
    even = x[:, :48]
    assert_near(make(4, 2)(even, size=(4, 12)), make(4, 2, padding="seen")(even, size=(4, 12)), 1e-12)


def global_attention(layer: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    q, k, v = (y.unflatten(2, (layer.heads, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v, scale=layer.scale)
    return layer.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("size", "n_win", "count"), [((8, 8), 2, 4), ((30, 30), 7, 64), ((3, 10), 4, 15)])
def test_all_regions_are_global_attention(size: tuple[int, int], n_win: int, count: int) -> None:
    x = randn(1, size[0] * size[1], 12)
    for topk in (None, count, count + 5):
        layer = make(n_win, topk, side_dwconv=0)
        assert layer.routes(x, size).shape == (1, count, count)
        assert_near(layer(x, size=size), global_attention(layer, x), 1e-10)
    fewer = make(n_win, count - 1, side_dwconv=0)
    assert (fewer(x, size=size) - global_attention(fewer, x)).abs().max() > 1e-6


def test_the_way_over_routes_is_also_exact_for_all_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global attention is computed without copies of regions; the copies give the same."""
    monkeypatch.setattr(BiLevelRoutingAttention, "_sees_all", lambda self, windows: False)
    for size in ((6, 8), (7, 9)):
        layer, x = make(3, None, side_dwconv=0), randn(2, size[0] * size[1], 12)
        assert_near(layer(x, size=size), global_attention(layer, x), 1e-10)


def test_seen_padding_is_no_global_attention() -> None:
    layer, x = make(4, None, side_dwconv=0, padding="seen"), randn(1, 63, 12)
    assert (layer(x, size=(7, 9)) - global_attention(layer, x)).abs().max() > 1e-4
    assert_near(layer(x, size=(7, 9)), by_hand(layer, x, (7, 9))[0], 1e-10)


def test_one_route_to_itself_is_window_attention() -> None:
    """Regions whose tokens share a direction of their own find themselves."""
    layer, size = make(2, 1, dim=16, heads=4, side_dwconv=0), (6, 8)
    where, _, _ = region_of(size, 2)
    x = randn(2, 48, 16) * 0.1 + 3 * torch.eye(16, dtype=torch.float64)[where.flatten()]
    windows = WindowAttention(16, 4, (3, 4)).double()
    with torch.no_grad():
        layer.qkv.weight[:16] = layer.qkv.weight[16:32] = torch.eye(16)
        for part, w, b in zip("qkv", layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True):
            getattr(windows.attention, part).weight.copy_(w)
            getattr(windows.attention, part).bias.copy_(b)
    windows.attention.out.load_state_dict(layer.out.state_dict())
    assert layer.routes(x, size)[..., 0].tolist() == [[0, 1, 2, 3]] * 2
    assert_near(layer(x, size=size), windows(x, size=size), 1e-10)


def test_the_default_scale_is_that_of_a_head() -> None:
    assert make().scale == pytest.approx(4**-0.5)
    assert make(scale=12**-0.5).scale == pytest.approx(12**-0.5)
    x = randn(1, 16, 12)
    assert (make()(x, size=(4, 4)) - make(scale=0.1)(x, size=(4, 4))).abs().max() > 1e-4


# -- the choice --------------------------------------------------------------------------------------------------------


def test_routes_by_hand() -> None:
    """Two regions of two tokens: the means of q are (1, 0) and (0, 1), those of k are (0, 2) and (1, 1)."""
    q = torch.tensor([[[2.0, 0], [0, 0], [0, 3], [0, -1]]])
    k = torch.tensor([[[0.0, 4], [0, 0], [1, 1], [1, 1]]])
    assert bi_level_route(q, k, (2, 2), n_win=2, topk=4).shape == (1, 4, 4)
    assert bi_level_route(q, k, (1, 4), n_win=2, topk=None).tolist() == [[[1, 0], [0, 1]]]
    assert bi_level_route(q, k, (1, 4), n_win=2, topk=1).tolist() == [[[1], [0]]]
    assert bi_level_route(q, -k, (1, 4), n_win=2, topk=1).tolist() == [[[0], [1]]]


def test_added_tokens_are_no_part_of_a_mean() -> None:
    """The last region has one real token; averaged with zeros, its key would lose against the first region's."""
    q, k = torch.ones(1, 5, 1), torch.tensor([1.0, 1, 1, 1, 1.5]).reshape(1, 5, 1)
    assert bi_level_route(q, k, (5, 1), n_win=2, topk=1).flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("size", "n_win", "window", "counts"),
    [((56, 56), 7, (8, 8), (7, 7)), ((30, 30), 7, (4, 4), (8, 8)), ((13, 5), 7, (1, 1), (13, 5)),
     ((28, 14), 7, (4, 2), (7, 7))],
)  # fmt: skip
def test_regions(size: tuple[int, int], n_win: int, window: tuple[int, int], counts: tuple[int, int]) -> None:
    assert regions(size, n_win).window == window
    assert regions(size, n_win).counts == counts


def test_the_choice_carries_no_gradient_and_attention_does() -> None:
    size, layer = (7, 9), make(4, 2)
    x = randn(2, 63, 12).requires_grad_()
    assert not layer.routes(x, size).dtype.is_floating_point
    leaves = [x, *layer.parameters()]
    ours = gradients(layer(x, size=size), leaves)
    expected = gradients(by_hand(layer, x, size)[0], leaves)  # argsort has no gradient
    for mine, theirs in zip(ours, expected, strict=True):
        assert_near(mine, theirs, 1e-9)
    for part in ours[1].chunk(3):
        assert part.abs().max() > 1e-6, "q, k and v learn"


def test_what_is_not_routed_is_not_read() -> None:
    """NaN in the values of regions that nobody routes to stays where it is; elsewhere it spreads along the routes."""
    size, layer = (8, 8), make(4, 3, side_dwconv=0)
    x = randn(1, 64, 12)
    routes = layer.routes(x, size)[0]
    where, _, _ = region_of(size, 4)
    target = int(routes.flatten().bincount(minlength=16).argsort()[8])

    def spoil(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        out = out.clone()
        out[:, where.flatten() == target, 24:] = torch.nan
        return out

    layer.qkv.register_forward_hook(spoil)
    bad = layer(x, size=size)[0].isnan().any(-1)
    reads = (routes == target).any(-1)
    assert 0 < reads.sum() < 16
    assert torch.equal(bad, reads[where.flatten()])


def test_multiply_adds_are_those_of_the_routes() -> None:
    """Four projections, R² products of means, and two products for each token and each token it reads."""
    size, n, dim, n_win, topk = (28, 28), 784, 12, 7, 3
    layer, x = make(n_win, topk, side_dwconv=0).float(), torch.randn(1, n, dim)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        layer(x, size=size)
    assert counter.get_total_flops() // 2 == 4 * n * dim**2 + 49**2 * dim + 2 * n * topk * 16 * dim


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads=5 must divide dim=12"), ({"n_win": 0}, "n_win=0"), ({"topk": 0}, "topk=0"),
     ({"topk": 2.5}, "topk=2.5"), ({"side_dwconv": 4}, "kernel=4 must be odd"), ({"side_dwconv": -1}, "side_dwconv=-1"),
     ({"padding": "zeros"}, "padding='zeros'"), ({"scale": math.inf}, "scale=inf")],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BiLevelRoutingAttention(12, **{"heads": 3, **options})


def test_bad_calls_of_the_choice() -> None:
    q = torch.zeros(1, 6, 4)
    with pytest.raises(ShapeError, match=r"N = H \* W of size=\(2, 4\); got \(1, 6, 4\)"):
        bi_level_route(q, q, (2, 4))
    with pytest.raises(ShapeError, match="q and k must be"):
        bi_level_route(q, q[:, :4], (2, 3))
    with pytest.raises(OptionError, match="topk=0"):
        bi_level_route(q, q, (2, 3), topk=0)


# -- the network -------------------------------------------------------------------------------------------------------


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias


def conv(module: nn.Conv2d, x: Tensor, size: tuple[int, int]) -> Tensor:
    reach = module.weight.shape[-1] // 2
    out = F.conv2d(x.mT.unflatten(2, size), module.weight, module.bias, padding=reach, groups=x.shape[2])
    return out.flatten(2).mT


def test_a_block_by_hand() -> None:
    torch.manual_seed(0)
    net = BiFormer((1, 1), (8, 16), topk=(2, None), n_win=2, head_dim=4, side_dwconv=3, mlp_ratio=1.5).double()
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter += 0.1 * randn(*parameter.shape, seed=index)
    for index, (dim, size) in enumerate(((8, (5, 6)), (16, (3, 3)))):
        (block,), x = net.stages[index], randn(2, size[0] * size[1], dim)
        y = x + conv(block.position.conv, x, size)
        z = norm(block.norm, y)
        if index:
            assert block.attention.qkv.bias is None
            made = (z @ block.attention.qkv.weight.mT).chunk(3, -1)
            q, k, v = (part.unflatten(2, (8, -1)).transpose(1, 2) for part in made)
            out = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            y = y + block.attention.out(out + conv(block.attention.local.conv, z, size))
        else:
            assert block.attention.heads == 2 and block.attention.scale == pytest.approx(8**-0.5)
            y = y + by_hand(block.attention, z, size)[0]
        hidden = norm(block.mlp_norm, y) @ block.mlp[0].weight.mT + block.mlp[0].bias
        assert hidden.shape[2] == 1.5 * dim
        y = y + (hidden * torch.special.ndtr(hidden)) @ block.mlp[2].weight.mT + block.mlp[2].bias
        assert_near(block(x, size=size), y, 1e-10)


def test_stages_follow_each_other() -> None:
    net = BiFormer.example().double().eval()
    images = randn(2, 2, 21, 24)
    first = net.downs[0](images)
    assert first.shape == (2, 8, 6, 6)
    x = net.stages[0](first.flatten(2).mT, (6, 6)).mT.unflatten(2, (6, 6))
    second = net.downs[1](x)
    assert second.shape == (2, 16, 3, 3)
    x = second.flatten(2).mT
    for block in net.stages[1]:
        x = block(x, size=(3, 3))
    means = net.norm(x.mT.unflatten(2, (3, 3))).mean((2, 3))
    assert_near(net(images), means @ net.head.weight.mT + net.head.bias, 1e-12)


def test_options_of_the_network() -> None:
    net = BiFormer((1,), (64,), topk=(49,), n_win=5, scale="head", padding="seen")
    (layer,) = (part for part in net.modules() if isinstance(part, BiLevelRoutingAttention))
    assert (layer.heads, layer.topk, layer.n_win, layer.padding) == (2, 49, 5, "seen")
    assert layer.scale == pytest.approx(32**-0.5)
    default = [m for m in BiFormer((1, 1, 1, 1)).modules() if isinstance(m, BiLevelRoutingAttention)]
    assert [(each.topk, each.heads, each.dim) for each in default] == [(1, 2, 64), (4, 4, 128), (16, 8, 256)]
    assert {each.n_win for each in default} == {7}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"depths": (1, 2)}, "depths, dims and topk must be as long"), ({"dims": (64, 128, 250, 512)}, "head_dim=32"),
     ({"dims": (64, 128, 256, 500)}, "dims=500 must be a multiple of 8 where topk is None"),
     ({"scale": "full"}, "scale='full'"), ({"classes": 0}, "classes=0"), ({"mlp_ratio": 0.0}, "mlp_ratio=0.0")],
)  # fmt: skip
def test_bad_networks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BiFormer(**options)


# -- what routing finds ------------------------------------------------------------------------------------------------

SIDE, REGIONS, TOKENS, CODES, ANSWERS = 28, 49, 16, 8, 4
MAP = Windows((SIDE, SIDE), (4, 4))


def partners(batch: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make maps of 7 x 7 regions in pairs: tokens carry the code of their pair and an answer of their region.

    The target of each token is the answer of the partner of its region, which may lie anywhere.
    """
    one, other = torch.rand(batch, REGIONS, generator=random).argsort(1)[:, :48].unflatten(1, (24, 2)).unbind(2)
    partner, code = torch.arange(REGIONS).repeat(batch, 1), torch.zeros(batch, REGIONS, CODES)
    shared = torch.randn(batch, 24, CODES, generator=random)
    for mine, theirs in ((one, other), (other, one)):
        partner.scatter_(1, mine, theirs)
        code.scatter_(1, mine[..., None].expand_as(shared), shared)
    answer = torch.randn(batch, REGIONS, ANSWERS, generator=random)
    tokens = torch.cat([code, answer], -1)[:, :, None].expand(-1, -1, TOKENS, -1)
    tokens = tokens + 0.3 * torch.randn(tokens.shape, generator=random)
    target = answer.gather(1, partner[..., None].expand_as(answer))[:, :, None].expand(-1, -1, TOKENS, -1)
    return MAP.merge(tokens.flatten(0, 1)), MAP.merge(target.flatten(0, 1))


class Dilated(nn.Module):
    """Attention in windows of 4 x 8 tokens that are spread over the map."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, heads, bias=True)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        windows = Windows(size, (4, 8), (7, 4))
        seen = windows.real().repeat(len(x), 1)[:, None, None]
        return windows.merge(self.attention(windows.partition(x), mask=seen))


class AtRandom(nn.Module):
    """The routed layer, whose routes are drawn for each call."""

    def __init__(self, layer: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.layer, self.random = layer, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        def drawn(q: Tensor, k: Tensor, windows: Windows, topk: int) -> Tensor:
            return torch.rand(len(q), REGIONS, REGIONS, generator=self.random).topk(topk).indices

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("foveate.nn.vision.biformer._routes", drawn)
            return self.layer(x, size=size)


class Answering(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.mixer = nn.Linear(CODES + ANSWERS, 32), mixer
        self.head = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, ANSWERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(torch.cat([x, self.mixer(x, size=(SIDE, SIDE))], -1))


def error(make_mixer: Callable[[], nn.Module], seed: int, steps: int = 300) -> float:
    """Train on maps of partners; return the mean squared error on new ones, where the answers' variance is 1."""
    torch.manual_seed(seed)
    net, random = Answering(make_mixer()), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, y = partners(4, random)
        optimiser.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x, y = partners(16, torch.Generator().manual_seed(99))
        return F.mse_loss(net(x), y).item()


@pytest.mark.slow
def test_routing_finds_the_region_that_matches(claim) -> None:
    """Every mixer reads 32 keys for a query."""

    def routed() -> BiLevelRoutingAttention:
        return BiLevelRoutingAttention(32, 2, 7, 2, side_dwconv=0)

    mixers = {
        "routed": routed, "windows": lambda: WindowAttention(32, 2, (4, 8)), "dilated": lambda: Dilated(32, 2),
        "random": lambda: AtRandom(routed()),
    }  # fmt: skip
    seeds = {"routed": 3, "windows": 1, "dilated": 1, "random": 3}
    errors = {name: [error(make_mixer, seed) for seed in range(seeds[name])] for name, make_mixer in mixers.items()}
    best = min(min(errors[name]) for name in ("windows", "dilated", "random"))
    claim(
        "two routed regions hold the answer that fixed ones miss: worst error of 3 seeds",
        ours=max(errors["routed"]), baseline=best, better="lower", margin=0.2,
        baseline_name="best seed of windows, dilated windows and random routes with as many keys", seed=0,
    )  # fmt: skip
