"""CATANet: groups by content, centres that training moves, windows that overlap, the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.models.vision.catanet import CATANet, ConvMLPBlock
from foveate.nn.base.layer import Layer
from foveate.nn.parts.cost import cost
from foveate.nn.parts.overlap import OverlappingWindowAttention, OverlappingWindows
from foveate.nn.parts.window import WindowAttention
from foveate.nn.vision.token_aggregation import TokenAggregation, groups, mirrored, spherical_round
from tests.support.tensors import assert_near

DIM, HEADS = 12, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(centres: int = 3, group: int = 4, **options: Any) -> TokenAggregation:
    torch.manual_seed(0)
    return TokenAggregation(DIM, HEADS, centres, group, qk_dim=6, **options).double().eval()


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with each head: `(H, N, D)`."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def by_hand(layer: TokenAggregation, x: Tensor) -> Tensor:
    """Compute the layer in evaluation for one image `(N, C)`, token by token."""
    n, group = len(x), min(layer.group, len(x))
    near = [max(range(len(layer.centres)), key=lambda m: F.cosine_similarity(t, layer.centres[m], 0)) for t in x]
    order = sorted(range(n), key=lambda i: near[i])
    q, k, v = (heads_of(each(x)) for each in (layer.q, layer.k, layer.v))
    out = torch.zeros_like(v)
    for place, token in enumerate(order):
        start = place // group * group
        there_and_back = [*range(n), *reversed(range(n))] * 3
        seen = there_and_back[start : start + 2 * group]
        if layer.padding == "hidden":
            seen = list(range(start, min(start + 2 * group, n)))
        keys = [order[at] for at in seen]
        out[:, token] = attend(q[:, token, None], k[:, keys], v[:, keys])[:, 0]
    if layer.centre_k is not None and layer.centre_v is not None:
        out = out + attend(q, heads_of(layer.centre_k(layer.centres)), heads_of(layer.centre_v(layer.centres)))
    return layer.mix(layer.out(out.transpose(0, 1).flatten(1)))


# -- attention by content ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"padding": "hidden"}, {"across": False}])
@pytest.mark.parametrize(("n", "group"), [(12, 4), (13, 4), (9, 8), (7, 7), (5, 128), (1, 3), (10, 1)])
def test_it_is_attention_in_groups_of_the_sorted_tokens(n: int, group: int, options: dict) -> None:
    layer, x = make(group=group, **options), randn(2, n, DIM)
    assert_near(layer(x), torch.stack([by_hand(layer, each) for each in x]), 1e-10)


@pytest.mark.parametrize("padding", ["mirrored", "hidden"])
@pytest.mark.parametrize("group", [11, 12, 500])
def test_a_group_of_all_tokens_is_global_attention(group: int, padding: str) -> None:
    """Without attention to centres; the mirrored copies double every weight, which the softmax divides out."""
    layer, x = make(group=group, across=False, padding=padding), randn(2, 11, DIM)
    q, k, v = (heads_of(each(x)) for each in (layer.q, layer.k, layer.v))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_near(layer(x), layer.mix(layer.out(expected)), 1e-10)


class OwnValues(nn.Module):
    """An operator that returns the values of a group's own tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return v[:, :, : q.shape[2]]


def test_tokens_come_back_into_their_places() -> None:
    layer, v, order = make(), randn(2, HEADS, 13, 4), torch.stack([torch.randperm(13), torch.randperm(13)])
    layer.op = OwnValues()
    assert torch.equal(layer._within(v, v, v, order), v)


def test_equal_tokens_have_one_centre_wherever_they_are() -> None:
    layer, patch = make(centres=5), randn(4, DIM)
    x = torch.cat([patch, randn(20, DIM, seed=1), patch, randn(7, DIM, seed=2)])[None]
    near = layer.nearest(x)[0]
    assert torch.equal(near[:4], near[24:28])
    assert len(near.unique()) > 2
    swapped = torch.cat([x[:, 24:28], x[:, 4:24], x[:, :4], x[:, 28:]], 1)
    assert torch.equal(layer.nearest(swapped)[0], near)
    assert torch.equal(layer.nearest(3 * x), layer.nearest(x)), "lengths do not matter"


def test_places_behind_the_end_mirror() -> None:
    assert mirrored(torch.arange(9), 3).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    cut = groups(5, 2)
    assert cut.queries.tolist() == [[0, 1], [2, 3], [4, 4]]
    assert cut.keys.tolist() == [[0, 1, 2, 3], [2, 3, 4, 4], [4, 4, 3, 2]]
    assert cut.real.tolist() == [[True] * 4, [True] * 3 + [False], [True] + [False] * 3]


def test_the_cost_grows_with_the_tokens() -> None:
    layer = TokenAggregation(16, 2, 8, 32)
    one, two, four = (cost(layer, torch.empty(1, n, 16, device="meta")).macs for n in (512, 1024, 2048))
    assert four - two == 2 * (two - one)
    within, across, nearest = 64 * 16 * 2, 8 * 16 * 2, 8 * 16  # a query's keys times channels, scores and values
    assert one == 512 * (within + across + nearest + 5 * 16 * 16) + 2 * 8 * 16 * 16


# -- centres -----------------------------------------------------------------------------------------------------------


def planted(count: int = 4, each: int = 30) -> tuple[Tensor, Tensor]:
    """Return unit vectors around planted directions, and the directions."""
    directions = F.normalize(randn(count, DIM), dim=-1)
    x = directions.repeat_interleave(each, 0) + 0.2 * randn(count * each, DIM, seed=1)
    return F.normalize(x, dim=-1), directions


def test_rounds_never_lower_the_mean_cosine() -> None:
    x, directions = planted()
    centres = F.normalize(x[::37], dim=-1)[:4]
    found = [(x @ centres.mT).amax(-1).mean().item()]
    for _ in range(5):
        centres = spherical_round(x, centres)
        assert_near(centres.norm(dim=-1), torch.ones(4), 1e-12)
        found.append((x @ centres.mT).amax(-1).mean().item())
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(found))
    assert found[-1] > found[0] + 0.01
    assert (directions @ spherical_round(x, directions).mT).diagonal().min() > 0.98


def test_a_round_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    centres = torch.tensor([[0.8, 0.6], [0.0, -1.0], [-1.0, 0.0]])
    expected = torch.tensor([[2 / 5**0.5, 1 / 5**0.5], [0.0, -1.0], [-1.0, 0.0]])
    assert_near(spherical_round(x, centres), expected, 1e-6, "an empty one stays")


def moved_by_hand(x: Tensor, centres: Tensor, rounds: int) -> Tensor:
    tokens = [t / t.norm() for t in x.flatten(0, 1)]
    for _ in range(rounds):
        unit = [c / c.norm() for c in centres]
        near = [max(range(len(unit)), key=lambda m: float(t @ unit[m])) for t in tokens]
        members = [[t for t, at in zip(tokens, near, strict=True) if at == m] for m in range(len(unit))]
        sums = [sum(each) if each else unit[m] for m, each in enumerate(members)]
        centres = torch.stack([total / total.norm() for total in sums])
    return centres


@pytest.mark.parametrize("rounds", [1, 3])
def test_training_moves_the_centres_and_evaluation_does_not(rounds: int) -> None:
    layer, x, y = make(rounds=rounds, ema=0.9), randn(2, 11, DIM), randn(2, 11, DIM, seed=1)
    before = layer.centres.clone()
    layer(x)
    assert torch.equal(layer.centres, before)
    layer.train()(x)
    padded = torch.cat([x, x[:, -1:]], 1)  # 11 tokens and a copy of the last make 3 chunks of 4
    chunks = torch.stack([part.mean((0, 1)) for part in padded.chunk(3, 1)])
    first = moved_by_hand(x, chunks, rounds)
    assert_near(layer.centres, first, 1e-10, "the first step replaces")
    layer(y)
    assert_near(layer.centres, 0.9 * first + 0.1 * moved_by_hand(y, first, rounds), 1e-10)
    assert layer.started == 1
    kept = layer.centres.clone()
    layer.eval()(x)
    assert torch.equal(layer.centres, kept)


def test_training_attends_to_the_centres_of_the_batch() -> None:
    layer, x = make(rounds=2), randn(2, 11, DIM)
    layer.train()(randn(2, 11, DIM, seed=3))
    twin = make(rounds=2)
    twin.centres.copy_(moved_by_hand(x, layer.centres, 2))
    assert_near(layer(x), twin(x), 1e-10)


def test_gradients_flow_through_the_last_round_only_in_training() -> None:
    layer, x = make(), randn(1, 11, DIM).requires_grad_()
    nn.init.zeros_(layer.q.weight)  # all centres weigh the same, and so do all keys
    nn.init.zeros_(layer.v.weight)
    for training in (True, False):
        (grad,) = torch.autograd.grad(layer.train(training)(x).square().sum(), x)
        assert (grad.abs().max() > 1e-6) == training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads=5 must divide dim=12"), ({"qk_dim": 7}, "heads=3 must divide qk_dim=7"),
        ({"centres": 0}, "centres=0"), ({"group": 0}, "group=0"), ({"rounds": 0}, "rounds=0"),
        ({"ema": 1.5}, "ema=1.5"), ({"padding": "cut"}, "padding='cut'"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TokenAggregation(**{"dim": DIM, "heads": HEADS, **options})


# -- windows that overlap ----------------------------------------------------------------------------------------------


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Return where windows start: at every `side - overlap`, until one reaches the end."""
    side, found = min(side, length), [0]
    while found[-1] + side < length:
        found.append(min(found[-1] + side - overlap, length - side))
    return found


@pytest.mark.parametrize("size", [(4, 4), (7, 9), (5, 4), (1, 6), (3, 3), (10, 13)])
@pytest.mark.parametrize(("side", "overlap"), [(4, 2), (4, 0), (5, 1)])
def test_windows_cover_the_grid(size: tuple[int, int], side: int, overlap: int) -> None:
    windows, x = OverlappingWindows(size, side, overlap), randn(2, size[0] * size[1], 3)
    for axis in (0, 1):
        assert windows.places(axis)[:, 0].tolist() == starts(size[axis], side, overlap)
    assert_near(windows.merge(windows.partition(x)), x, 1e-12)


@pytest.mark.parametrize("size", [(4, 4), (7, 9), (9, 6), (2, 5)])
def test_windows_attend_one_by_one_and_are_averaged(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = OverlappingWindowAttention(DIM, HEADS, 4, 2, qk_dim=6).double()
    x, part = randn(2, size[0] * size[1], DIM), layer.attention
    image, total, counts = x.unflatten(1, size), torch.zeros(2, *size, DIM), torch.zeros(*size, 1)
    total = total.double()
    for r in starts(size[0], 4, 2):
        for s in starts(size[1], 4, 2):
            cut = image[:, r : r + 4, s : s + 4]
            q, k, v = (heads_of(each(cut.flatten(1, 2))) for each in (part.q, part.k, part.v))
            out = part.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            total[:, r : r + 4, s : s + 4] += out.view_as(cut)
            counts[r : r + 4, s : s + 4] += 1
    assert_near(layer(x, size=size), (total / counts).flatten(1, 2), 1e-10)


def test_a_row_of_three_windows_is_their_mean() -> None:
    windows = OverlappingWindows((31, 1), 16, 2)
    assert windows.places(0)[:, 0].tolist() == [0, 14, 15]
    values = torch.tensor([1.0, 2.0, 6.0]).repeat_interleave(16).view(3, 16, 1)
    assert windows.merge(values)[0, 13:17, 0].tolist() == [1.0, 1.5, 3.0, 4.0]


def test_an_overlap_is_less_than_a_window() -> None:
    with pytest.raises(OptionError, match="overlap=4 must be less than window=4"):
        OverlappingWindowAttention(DIM, HEADS, 4, 4)


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "parameters"), [(1, 419_675), (2, 477_435), (3, 549_635), (4, 535_195)])
def test_it_has_the_release_s_parameters(scale: int, parameters: int) -> None:
    with torch.device("meta"):
        net = CATANet(scale)
        assert net(torch.empty(1, 3, 40, 33)).shape == (1, 3, 40 * scale, 33 * scale)
    assert sum(p.numel() for p in net.parameters()) == parameters


def released_to_ours(scale: int) -> dict[str, str]:
    """Return the names of the upsampler's parameters in the release, and in ours."""
    names = {2: ["upconv"], 3: ["upconv"], 4: ["upconv1", "upconv2"]}.get(scale, [])
    return {f"{name}.weight": f"raises.{place}.weight" for place, name in enumerate(names)}


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_upsamplers_have_the_release_s_names(scale: int) -> None:
    net = CATANet(scale, 8, 2, channels=2, qk_dim=6, mlp_dim=12, centres=(3,), groups=(8,), windows=(4,))
    for theirs, ours in released_to_ours(scale).items():
        assert list(net.renamed({theirs: torch.zeros(1)})) == [ours]
        assert ours in net.state_dict()


def test_the_network_by_hand() -> None:
    torch.manual_seed(0)
    net, x = CATANet.example().double().eval(), randn(2, 2, 9, 7)

    def norm(part: nn.LayerNorm, t: Tensor) -> Tensor:
        return F.layer_norm(t, (8,), part.weight, part.bias)

    def block(part: ConvMLPBlock, t: Tensor) -> Tensor:
        tokens = t.flatten(2).mT
        options = {"size": (9, 7)} if isinstance(part.mixer, OverlappingWindowAttention) else {}
        tokens = tokens + part.mixer(norm(part.norm, tokens), **options)
        mlp, conv = part.mlp, part.mlp.conv.conv
        hidden = F.gelu(mlp.fc1(norm(part.mlp_norm, tokens)))
        around = F.conv2d(hidden.mT.unflatten(2, (9, 7)), conv.weight, conv.bias, padding=2, groups=12)
        tokens = tokens + mlp.fc2(hidden + F.gelu(around).flatten(2).mT)
        return tokens.mT.unflatten(2, (9, 7))

    first = F.conv2d(x, net.first_conv.weight, net.first_conv.bias, padding=1)
    deep = first
    for (like, near), conv in zip(net.blocks, net.mid_convs, strict=True):
        assert isinstance(like.mixer, TokenAggregation) and isinstance(near.mixer, OverlappingWindowAttention)
        deep = deep + F.conv2d(block(near, block(like, deep)), conv.weight, conv.bias, padding=1)
    wide = F.conv2d(first + deep, net.raises[0].weight, net.raises[0].bias, padding=1)
    wide = wide.view(2, 8, 2, 2, 9, 7).permute(0, 1, 4, 2, 5, 3).reshape(2, 8, 18, 14)
    wide = torch.where(wide > 0, wide, 0.1 * wide)
    base = F.interpolate(x, size=(18, 14), mode="bilinear", align_corners=False)
    expected = F.conv2d(wide, net.last_conv.weight, net.last_conv.bias, padding=1) + base
    assert_near(net(x), expected, 1e-10)


def test_malformed_calls() -> None:
    with pytest.raises(ShapeError, match="images must be"):
        CATANet.example()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ShapeError, match=r"x must be \(B, 12, H, W\)"):
        ConvMLPBlock(make(), 8)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(OptionError, match="centres, groups and windows must be as long as each other; got 1, 2, 1"):
        CATANet(centres=(2,), groups=(2, 2), windows=(4,))
    with pytest.raises(OptionError, match="scale=5"):
        CATANet(5)


# -- what the paper claims ---------------------------------------------------------------------------------------------

SIDE, KINDS, CHANNELS = 32, 16, 5
COLOURS = 2 * randn(KINDS, CHANNELS - 1).float()


def textures(batch: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy images, and what is behind the noise of their last channel.

    Pixels of 16 colours are strewn over an image, 4 of each in a window of 8 x 8. In each image, all pixels of a colour
    have one brightness, with a variance of 1; the noise on it has the same.
    """
    kind = torch.randint(KINDS, (batch, SIDE * SIDE), generator=random)
    bright = torch.randn(batch, KINDS, generator=random).gather(1, kind)[..., None]
    noisy = torch.cat([COLOURS[kind], bright + torch.randn(bright.shape, generator=random)], -1)
    clean, noisy = (each.mT.unflatten(2, (SIDE, SIDE)) for each in (bright, noisy))
    return noisy, clean


class Denoiser(nn.Module):
    def __init__(self, mixer: Layer, hidden: int) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(CHANNELS, 16, 1), ConvMLPBlock(mixer, hidden)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)))


@cache
def denoised(make_mixer: Callable[[], Layer], hidden: int, seed: int, steps: int = 200) -> tuple[float, int]:
    """Train; return the mean squared error on new images, and the number of parameters."""
    torch.manual_seed(seed)
    net, random = Denoiser(make_mixer(), hidden), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, y = textures(2, random)
        optimiser.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x, y = textures(16, torch.Generator().manual_seed(99))
        return F.mse_loss(net.eval()(x), y).item(), sum(p.numel() for p in net.parameters())


def aggregating() -> TokenAggregation:
    return TokenAggregation(16, 2, 16, 32, rounds=2, ema=0.9)  # 0.999 is for many more steps than 200


def windowed() -> Layer:
    return WindowAttention(16, 2, 8, bias=False)


@pytest.mark.slow
def test_tokens_of_like_content_denoise_better_than_neighbours(claim) -> None:
    ours, other = (
        [denoised(make_mixer, hidden, seed) for seed in range(3)]
        for make_mixer, hidden in ((aggregating, 32), (windowed, 46))
    )
    assert ours[0][1] <= other[0][1] <= 1.02 * ours[0][1]
    claim(
        "tokens of like content clean what is strewn over the image better than neighbours do: squared error, 3 seeds",
        ours=sum(error for error, _ in ours) / 3, baseline=sum(error for error, _ in other) / 3, better="lower",
        margin=0.05, baseline_name="windows of 8 x 8 with as many parameters", seed=0,
    )  # fmt: skip
