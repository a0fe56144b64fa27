"""WAU: pixel by pixel, at its limits, inside its windows, on odd sides, and as the upsampling of a small U-Net."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn import WindowAttention, WindowAttentionDecoder, WindowAttentionUpsample
from tests.support.tensors import assert_near, gradients

LOW, SKIP, DIM, HEADS = 5, 3, 8, 2
#: Sides of the fine map: windows divide them, do not, are larger than the map, and one that is a single pixel.
SIZES = [(8, 12), (10, 14), (7, 9), (4, 2), (3, 1), (1, 1)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(window: int = 2, **options: Any) -> WindowAttentionUpsample:
    """Make a layer in which biases and norms have an effect."""
    torch.manual_seed(0)
    layer = WindowAttentionUpsample(LOW, SKIP, DIM, HEADS, window, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def maps(size: tuple[int, int], batch: int = 2, *, up: bool = True) -> tuple[Tensor, Tensor]:
    """Make a coarse and a fine map; odd sides are halved up, or down."""
    coarse = [-(-side // 2) if up else side // 2 for side in size]
    return randn(batch, LOW, *coarse, seed=1), randn(batch, SKIP, *size, seed=2)


def norm(x: Tensor, by: nn.LayerNorm) -> Tensor:
    out = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + by.eps).sqrt() * by.weight
    return out if by.bias is None else out + by.bias


def linear(x: Tensor, by: nn.Linear) -> Tensor:
    out = x @ by.weight.mT
    return out if by.bias is None else out + by.bias


def bilinear(y: Tensor, row: int, column: int) -> Tensor:
    """Read a map `(h, w, C)` at a fine pixel's centre, continued by its borders."""
    out = torch.zeros_like(y[0, 0])
    at = [(row + 0.5) / 2 - 0.5, (column + 0.5) / 2 - 0.5]
    for i in range(-1, y.shape[0] + 1):
        for j in range(-1, y.shape[1] + 1):
            share = max(0.0, 1 - abs(at[0] - i)) * max(0.0, 1 - abs(at[1] - j))
            out = out + share * y[min(max(i, 0), y.shape[0] - 1), min(max(j, 0), y.shape[1] - 1)]
    return out


def by_hand(layer: WindowAttentionUpsample, low: Tensor, skip: Tensor) -> Tensor:
    """Compute one pixel of one head at a time; low is `(C1, h, w)` of halved sides, skip `(C2, H, W)`."""
    y, s = linear(low.movedim(0, -1), layer.low), linear(skip.movedim(0, -1), layer.skip)
    part, m, depth = layer.decoder, layer.decoder.window, DIM // HEADS
    if part.self_attn is not None:
        within = part.self_attn(norm(s, part.self_norm).flatten(0, 1)[None], size=s.shape[:2])
        s = s + within[0].unflatten(0, s.shape[:2])
    q = linear(norm(s, part.query_norm), part.q)
    k, v = linear(norm(y, part.key_norm), part.kv).chunk(2, -1)
    out = torch.zeros(*s.shape[:2], DIM, dtype=torch.float64)
    for row in range(s.shape[0]):
        for column in range(s.shape[1]):
            heads = []
            for head in range(HEADS):
                at, logits, values = slice(head * depth, (head + 1) * depth), [], []
                for i in range(y.shape[0]):
                    for j in range(y.shape[1]):
                        if i // m != row // (2 * m) or j // m != column // (2 * m):
                            continue
                        bias = part.bias.table[row - 2 * i + 2 * m - 2, column - 2 * j + 2 * m - 2, head]
                        logits.append(q[row, column, at] @ k[i, j, at] / depth**0.5 + bias)
                        values.append(v[i, j, at])
                heads.append(torch.stack(logits).softmax(0) @ torch.stack(values))
            read = linear(torch.cat(heads), part.out)
            hidden = linear(norm(read, part.mlp_norm), part.mlp[0])
            read = read + linear(hidden * torch.special.ndtr(hidden), part.mlp[2])
            out[row, column] = read + bilinear(y, row, column)
    return out.movedim(-1, 0)


@pytest.mark.parametrize("self_attn", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_layer_pixel_by_pixel(size: tuple[int, int], self_attn: bool) -> None:
    layer, (low, skip) = make(self_attn=self_attn), maps(size)
    expected = torch.stack([by_hand(layer, *each) for each in zip(low, skip, strict=True)])
    assert_near(layer(low, skip), expected, 1e-10)


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (8, 3)])
def test_a_coarse_map_that_was_rounded_down_goes_on_with_its_border(size: tuple[int, int]) -> None:
    layer, (low, skip) = make(), maps(size, up=False)
    low = low[..., : size[0] // 2, : size[1] // 2]
    rows, columns = (torch.arange(-(-side // 2)).clamp(max=side // 2 - 1) for side in size)
    whole = low[:, :, rows][:, :, :, columns]
    assert layer(low, skip).shape == (2, DIM, *size)
    assert_near(layer(low, skip), layer(whole, skip), 1e-12)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_output_projection_of_zeros_leaves_the_bilinear_upsampling(size: tuple[int, int]) -> None:
    """Whatever the weights of the MLP are."""
    layer, (low, skip) = make(self_attn=True), maps(size)
    nn.init.zeros_(layer.decoder.out.weight)
    nn.init.zeros_(layer.decoder.out.bias)
    coarse = layer.low(low.movedim(1, -1)).movedim(-1, 1)
    expected = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    assert_near(layer(low, skip), expected[:, :, : size[0], : size[1]], 1e-12)


@pytest.mark.parametrize("window", [4, 5, 9])
def test_one_window_over_the_map_is_global_attention(window: int) -> None:
    """Every fine pixel sees every coarse one; a window of another side has another table, and the same form."""
    layer, size = make(window), (8, 6)
    part, (low, skip) = layer.decoder, maps(size)
    y, s = layer.low(low.flatten(2).mT), layer.skip(skip.flatten(2).mT)
    q, k, v = part.q(part.query_norm(s)), *part.kv(part.key_norm(y)).chunk(2, -1)
    q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    fine, coarse = (torch.cartesian_prod(torch.arange(a), torch.arange(b)) for a, b in (size, (4, 3)))
    apart = fine[:, None] - 2 * coarse + 2 * (window - 1)
    bias = part.bias.table[apart[..., 0], apart[..., 1]].permute(2, 0, 1)
    read = part.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
    read = read + part.mlp(part.mlp_norm(read))
    up = F.interpolate(y.mT.unflatten(2, (4, 3)), scale_factor=2, mode="bilinear")
    assert_near(layer(low, skip), up + read.mT.unflatten(2, size), 1e-12)


def test_a_coarse_window_reaches_its_fine_window_alone() -> None:
    """Besides the bilinear residual, which reaches one fine pixel further."""
    layer, (low, skip) = make(), maps((8, 12))
    low.requires_grad_(), skip.requires_grad_()
    y = layer.low(low.flatten(2).mT)
    out = layer.decoder(layer.skip(skip.flatten(2).mT), y, (8, 12)).unflatten(1, (8, 12))
    by_low, by_skip = torch.autograd.grad(out[:, 5, 6].sum(), (low, skip))
    coarse, fine = torch.zeros(4, 6), torch.zeros(8, 12)
    coarse[2:4, 2:4], fine[5, 6] = 1, 1
    assert torch.equal((by_low.abs().sum((0, 1)) > 0).float(), coarse)
    assert torch.equal((by_skip.abs().sum((0, 1)) > 0).float(), fine)
    changed = low.detach().clone()
    changed[:, :, 2:4, 2:4] += 1
    moved = (layer(changed, skip) - layer(low, skip)).abs().amax((0, 1)) > 1e-9
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[3:8, 3:9] = True
    assert torch.equal(moved, expected & moved) and moved[4:8, 4:8].all() and not moved[:3].any()


def test_self_attention_reaches_the_fine_window() -> None:
    layer, (low, skip) = make(self_attn=True), maps((8, 12))
    (by_skip,) = torch.autograd.grad(layer(low, skip.requires_grad_())[:, :, 5, 6].sum(), skip)
    fine = torch.zeros(8, 12)
    fine[4:8, 4:8] = 1
    assert torch.equal((by_skip.abs().sum((0, 1)) > 0).float(), fine)
    assert isinstance(layer.decoder.self_attn, WindowAttention) and layer.decoder.self_attn.window == (4, 4)


def test_only_pairs_inside_windows_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine pixel costs m² scores, whatever the size of the map; small maps cost no more than they have."""
    layer, seen = make(2), list[tuple[int, ...]]()
    plain = layer.decoder.op.forward
    monkeypatch.setattr(
        layer.decoder.op, "forward",
        lambda q, k, v, **call: seen.append((len(q), q.shape[2], k.shape[2])) or plain(q, k, v, **call),
    )  # fmt: skip
    for size in ((8, 12), (2, 12), (1, 1)):
        layer(*maps(size, 1))
    assert seen == [(6, 16, 4), (3, 8, 2), (1, 4, 1)]


# -- numbers and state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_gradients(size: tuple[int, int]) -> None:
    layer, (low, skip) = make(self_attn=True), maps(size)
    assert torch.autograd.gradcheck(layer, (low[:1, :, :2, :3].requires_grad_(), skip[:1, :, :4, :5].requires_grad_()))
    assert all(grad.any() for grad in gradients(layer(low, skip), list(layer.parameters())))


@pytest.mark.parametrize("size", SIZES)
def test_examples_are_independent(size: tuple[int, int]) -> None:
    layer, (low, skip) = make(), maps(size, 3)
    for index, each in enumerate(layer(low, skip)):
        assert_near(layer(low[index : index + 1], skip[index : index + 1])[0], each, 1e-12)


def test_dtypes_layouts_devices_and_twins() -> None:
    layer, (low, skip) = make(self_attn=True), maps((7, 10))
    expected = layer(low, skip)
    last = torch.channels_last
    assert_near(layer(low.contiguous(memory_format=last), skip.contiguous(memory_format=last)), expected, 1e-12)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        out = copy.deepcopy(layer).to(dtype)(low.to(dtype), skip.to(dtype))
        assert out.dtype == dtype
        assert (out.double() - expected).norm() < tolerance * expected.norm()
    assert copy.deepcopy(layer).to("meta")(low.to("meta"), skip.to("meta")).shape == (2, DIM, 7, 10)
    twin = WindowAttentionUpsample(LOW, SKIP, DIM, HEADS, 2, True).double()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(low, skip), expected)


def test_sizes_of_parameters() -> None:
    layer = WindowAttentionUpsample(64, 32, 48, 6)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if "norm" not in name} == {
        "low.weight": (48, 64), "low.bias": (48,), "skip.weight": (48, 32), "skip.bias": (48,),
        "decoder.q.weight": (48, 48), "decoder.q.bias": (48,), "decoder.kv.weight": (96, 48), "decoder.kv.bias": (96,),
        "decoder.out.weight": (48, 48), "decoder.out.bias": (48,), "decoder.bias.table": (26, 26, 6),
        "decoder.mlp.0.weight": (192, 48), "decoder.mlp.2.weight": (48, 192),
    }  # fmt: skip
    assert abs(layer.decoder.bias.table.std().item() - 0.02) < 0.002


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 3}, "heads=3 must divide dim=8"), ({"heads": 0}, "heads=0"), ({"window": 0}, "window=0"),
     ({"low_dim": 0}, "low_dim=0"), ({"skip_dim": 0}, "skip_dim=0"), ({"dim": 0}, "dim=0"),
     ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"), ({"window": 2.5}, "window=2.5 must be a whole number"),
     ({"self_attn": 1}, "self_attn=1 must be True or False"), ({"windows": 2}, 'did you mean "window"')],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        WindowAttentionUpsample(**{"low_dim": LOW, "skip_dim": SKIP, "dim": DIM, **options})
    assert "\n" not in str(caught.value)
    if options.keys() & {"window", "heads", "self_attn", "mlp_ratio"}:
        with pytest.raises(OptionError, match=message):
            WindowAttentionDecoder(DIM, **options)


def test_bad_maps() -> None:
    layer, (low, skip) = make(), maps((8, 6))
    for bad, message in (
        ((low[0], skip), r"low must be a map \(B, 5, H, W\)"), ((low[:, :4], skip), r"low must be a map \(B, 5"),
        ((low, skip.long()), r"skip must be a map \(B, 3, H, W\) of real numbers; got Tensor"),
        ((low, skip.tolist()), r"skip must be a map"), ((low, skip[..., :0]), r"skip must be a map"),
        ((skip, low), r"low must be a map"),
        ((low[:1], skip), r"low must have the batch of skip and half its sides.*got \(1, 5, 4, 3\) beside \(2, 3, 8,"),
        ((low[:, :, :3], skip), r"got \(2, 5, 3, 3\) beside \(2, 3, 8, 6\)"),
        ((low, skip[..., :4]), r"got \(2, 5, 4, 3\) beside \(2, 3, 8, 4\)"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=message) as caught:
            layer(*bad)
        assert "\n" not in str(caught.value)


# -- what the paper claims ---------------------------------------------------------------------------------------------


def shapes(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make noisy images of 32 x 32 with two rings and their pixels' classes: background, inside, border of a pixel."""
    at = torch.arange(32.0)
    label = torch.zeros(count, 32, 32, dtype=torch.long)
    for _ in range(2):
        centre = 6 + 20 * torch.rand(count, 2, 1, 1, generator=random)
        radius = 3 + 5 * torch.rand(count, 2, 1, 1, generator=random)
        far = (((at[:, None] - centre[:, 0]) / radius[:, 0]) ** 2 + ((at - centre[:, 1]) / radius[:, 1]) ** 2).sqrt()
        edge = ((far - 1).abs() * radius.mean(1)) < 0.6
        label = torch.where(edge, 2, torch.where(far < 1, 1, label))
    shade = torch.tensor([0.0, 0.6, 1.2])[label]
    return (shade + 0.4 * torch.randn(shade.shape, generator=random))[:, None], label


class Bilinear(nn.Module):
    """The map enlarged and projected, with two 1x1 convolutions of as many parameters as the attention has."""

    def __init__(self, low: int, skip: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(low, dim, 1)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        up = self.enlarged(low)
        return up + self.mlp(up)

    def enlarged(self, low: Tensor) -> Tensor:
        return F.interpolate(self.project(low), scale_factor=2, mode="bilinear")


class Transposed(Bilinear):
    """A transposed convolution in place of the interpolation."""

    def __init__(self, low: int, skip: int, dim: int, hidden: int) -> None:
        super().__init__(low, skip, dim, hidden)
        self.project = nn.ConvTranspose2d(low, dim, 2, 2)

    def enlarged(self, low: Tensor) -> Tensor:
        return self.project(low)


UPSAMPLINGS = {
    "wau": lambda low, skip, dim: WindowAttentionUpsample(low, skip, dim, 2, 4, mlp_ratio=2.0),
    "bilinear": lambda low, skip, dim: Bilinear(low, skip, dim, 6 * dim),
    "transposed": lambda low, skip, dim: Transposed(low, skip, dim, 4 * dim),
}


def convs(channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU())


class UNet(nn.Module):
    """Three levels; a decoder stage enlarges, joins the skip connection or does without, and convolves."""

    def __init__(self, how: str, joined: bool, dims: tuple[int, int, int] = (8, 16, 24)) -> None:
        super().__init__()
        self.joined = joined
        self.down = nn.ModuleList(convs(a, b) for a, b in zip((1, *dims), dims, strict=False))
        pairs = [(dims[2], dims[1]), (dims[1], dims[0])]
        self.up = nn.ModuleList(UPSAMPLINGS[how](low, skip, skip) for low, skip in pairs)
        self.after = nn.ModuleList(convs((1 + joined) * skip, skip) for _, skip in pairs)
        self.head = nn.Conv2d(dims[0], 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        found, x = [], images
        for level, conv in enumerate(self.down):
            x = conv(x if level == 0 else F.max_pool2d(x, 2))
            found.append(x)
        for up, after, skip in zip(self.up, self.after, found[-2::-1], strict=True):
            x = up(x, skip)
            x = after(torch.cat([x, skip], 1) if self.joined else x)
        return self.head(x)


@cache
def dice(how: str, joined: bool, seeds: int = 3, steps: int = 300) -> tuple[float, float]:
    """Return the mean Dice of inside and border, and that of the border alone, after training."""
    found = torch.zeros(2)
    for seed in range(seeds):
        torch.manual_seed(seed)
        net, random = UNet(how, joined), torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
        for _ in range(steps):
            images, label = shapes(8, random)
            optimiser.zero_grad()
            F.cross_entropy(net(images), label).backward()
            optimiser.step()
            schedule.step()
        images, label = shapes(200, torch.Generator().manual_seed(99))
        with torch.no_grad():
            said = net.eval()(images).argmax(1)
        each = [2 * ((said == c) & (label == c)).sum() / ((said == c).sum() + (label == c).sum()) for c in (1, 2)]
        found += torch.stack([torch.stack(each).mean(), each[1]])
    return tuple((found / seeds).tolist())


def test_the_networks_are_of_one_size() -> None:
    sizes = {how: sum(p.numel() for p in UNet(how, False).parameters()) for how in UPSAMPLINGS}
    assert sizes["wau"] <= min(sizes["bilinear"], sizes["transposed"]) <= 1.03 * sizes["wau"]


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["bilinear", "transposed"])
def test_fine_pixels_bring_detail_into_the_upsampling(claim, baseline: str) -> None:
    names = {"bilinear": "bilinear upsampling", "transposed": "a transposed convolution"}
    name = f"{names[baseline]} and two 1x1 convolutions, as many parameters"
    for index, what in enumerate(("inside and border", "the borders of one pixel")):
        claim(
            f"a small U-Net without concatenation segments {what} of noisy rings: Dice, 3 seeds, 300 steps",
            ours=dice("wau", False)[index], baseline=dice(baseline, False)[index], better="higher",
            margin=(0.03, 0.05)[index], baseline_name=name, seed=0,
        )  # fmt: skip


@pytest.mark.slow
def test_beside_a_concatenation_it_changes_little() -> None:
    """The paper's gain does not show where the skip connection is concatenated too, as in its U-Net: no more, no less.

    Convolutions behind the concatenation see the same detail. Measured Dice: 0.920, bilinear 0.922, transposed 0.921.
    """
    found = [dice(how, True)[0] for how in UPSAMPLINGS]
    assert max(found) - min(found) < 0.01 and min(found) > 0.9
