"""CrossFormer: embeddings of several scales, groups at short and long distance, the position bias, the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.models.vision.crossformer import CrossFormer
from foveate.nn.parts.blocks import Block, gelu_mlp
from foveate.nn.parts.offsets import OffsetBias, offsets
from foveate.nn.parts.window import Windows
from foveate.nn.vision.crossformer import CrossScaleEmbedding, DynamicPositionBias, LongShortAttention
from tests.support.tensors import assert_near

DIM, HEADS = 12, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module: nn.Module) -> Any:
    """Move every parameter, so that each has an effect, in float64."""
    module, draw = module.double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return module


def make(group: int, kind: str, **options: Any) -> LongShortAttention:
    torch.manual_seed(0)
    return shaken(LongShortAttention(DIM, HEADS, group, kind, bias_width=4, **options))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def bias_of(module: DynamicPositionBias, offset: Tensor) -> Tensor:
    """Compute the bias of each head for offsets `(..., 2)`."""
    y = offset.double()
    for place, layer in enumerate(module.mlp):
        if isinstance(layer, nn.LayerNorm):
            y = norm(layer, y)
            y = y * (y > 0)
        elif isinstance(layer, nn.Linear):
            y = y @ layer.weight.mT + layer.bias
        else:
            assert isinstance(layer, nn.ReLU) and isinstance(module.mlp[place - 1], nn.LayerNorm)
    return y


def by_hand(layer: LongShortAttention, x: Tensor, size: tuple[int, int], group: tuple, interval: tuple) -> Tensor:
    """Attend under a mask over the whole filled-up map, to tokens of the same area and the same remainder."""
    span = [g * i for g, i in zip(group, interval, strict=True)]
    tall, wide = (math.ceil(side / each) * each for side, each in zip(size, span, strict=True))
    at = torch.cartesian_prod(torch.arange(tall), torch.arange(wide))
    real = (at[:, 0] < size[0]) & (at[:, 1] < size[1])
    step = torch.tensor(interval)
    place = at // step % torch.tensor(group)
    mine = torch.cat([at // torch.tensor(span), at % step], 1)
    mask = (mine[:, None] == mine).all(-1)
    if layer.padding == "hidden":
        mask = mask & real
    filled = F.pad(x.unflatten(1, size), (0, 0, 0, wide - size[1], 0, tall - size[0])).flatten(1, 2)
    q, k, v = (
        (filled @ w.mT + b).unflatten(2, (HEADS, -1)).transpose(1, 2)
        for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    logits = q @ k.mT * (DIM // HEADS) ** -0.5 + bias_of(layer.bias, place[:, None] - place).permute(2, 0, 1)
    weights = logits.masked_fill(~mask, -torch.inf)[:, :, real].softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ layer.out.weight.mT + layer.out.bias


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["hidden", "seen"])
@pytest.mark.parametrize(
    ("size", "kind", "options", "group", "interval"),
    [
        ((4, 6), "short", {}, (2, 2), (1, 1)),
        ((5, 7), "short", {}, (2, 2), (1, 1)),
        ((4, 6), "long", {}, (2, 2), (2, 3)),
        ((5, 7), "long", {}, (2, 2), (3, 4)),
        ((8, 9), "long", {"interval": 2}, (2, 2), (2, 2)),
        ((3, 8), "long", {"interval": 3}, (2, 2), (2, 3)),
        ((1, 5), "long", {}, (1, 2), (1, 3)),
        ((1, 5), "short", {}, (1, 2), (1, 1)),
        ((3, 8), "long", {"interval": 3, "fit": "release"}, (2, 2), (3, 3)),
        ((3, 8), "long", {"fit": "release"}, (2, 2), (2, 2)),
        ((2, 5), "long", {"interval": 3, "fit": "release"}, (2, 2), (1, 1)),
        ((1, 5), "long", {"fit": "release"}, (1, 1), (1, 1)),
    ],
)
def test_it_is_attention_under_the_mask_of_its_groups(
    padding: str, size: tuple[int, int], kind: str, options: dict, group: tuple, interval: tuple
) -> None:
    layer, x = make(2, kind, padding=padding, **options), randn(2, size[0] * size[1], DIM)
    assert layer.groups(size) == Windows(size, group, interval)
    assert_near(layer(x, size=size), by_hand(layer, x, size, group, interval), 1e-10)


@pytest.mark.parametrize("group", [4, 7])
def test_a_group_over_the_map_is_global_attention(group: int) -> None:
    x = randn(2, 16, DIM)
    outs = [make(group, kind, fit=fit)(x, size=(4, 4)) for kind in ("short", "long") for fit in ("map", "release")]
    layer = make(group, "short")
    q, k, v = (y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=layer.bias((4, 4)))
    for out in outs:
        assert_near(out, layer.out(expected.transpose(1, 2).flatten(2)), 1e-10)


def test_long_is_short_on_the_permuted_map() -> None:
    x, order = randn(2, 6, 6, DIM), torch.tensor([0, 3, 1, 4, 2, 5])  # every third row and column together
    long, short = make(2, "long", interval=3), make(2, "short")
    there = x[:, order][:, :, order]
    out = short(there.flatten(1, 2), size=(6, 6)).unflatten(1, (6, 6))
    back = order.argsort()
    assert_near(long(x.flatten(1, 2), size=(6, 6)), out[:, back][:, :, back].flatten(1, 2), 1e-12)
    assert (long(x.flatten(1, 2), size=(6, 6)) - short(x.flatten(1, 2), size=(6, 6))).abs().max() > 1e-2


def test_without_its_last_layer_there_is_no_bias() -> None:
    layer, x = make(2, "short"), randn(1, 16, DIM)
    nn.init.zeros_(layer.bias.mlp[-1].weight)
    nn.init.zeros_(layer.bias.mlp[-1].bias)
    q, k, v = (Windows((4, 4), (2, 2)).partition(y).unflatten(2, (HEADS, -1)) for y in layer.qkv(x).chunk(3, -1))
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)
    assert_near(layer(x, size=(4, 4)), layer.out(Windows((4, 4), (2, 2)).merge(out)), 1e-12)


def reached(kinds: tuple[str, str], size: tuple[int, int], group: int) -> Tensor:
    """Return which token has an effect on which after two layers, each with a residual, from corner and middle."""
    first, second = (make(group, kind) for kind in kinds)
    x = randn(1, size[0] * size[1], DIM).requires_grad_()
    y = x + first(x, size=size)
    y = y + second(y, size=size)
    found = []
    for token in (0, x.shape[1] // 2, x.shape[1] - 2):
        (grad,) = torch.autograd.grad(y[0, token].sum(), x, retain_graph=True)
        found.append(grad[0].abs().sum(-1) > 1e-12)
    return torch.stack(found)


def test_short_and_long_connect_every_pair() -> None:
    for size, group in (((9, 9), 3), ((14, 14), 7), ((6, 9), 3)):
        assert reached(("short", "long"), size, group).all(), size
        assert not reached(("short", "short"), size, group).all()
        assert not reached(("long", "long"), size, group).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads=5 must divide dim=12"), ({"group": 0}, "group=0"), ({"kind": "wide"}, "kind='wide'"),
     ({"interval": 0}, "interval=0"), ({"fit": "none"}, "fit='none'"), ({"padding": "zeros"}, "padding='zeros'"),
     ({"bias_width": 1}, "width=1")],
)  # fmt: skip
def test_bad_options_of_attention(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LongShortAttention(DIM, **{"heads": HEADS, **options})


def test_intervals_of_windows_by_hand() -> None:
    windows = Windows((3, 5), (2, 1), (1, 3))
    assert (windows.areas, windows.counts, windows.padding) == ((2, 2), (2, 6), (1, 1))
    x = 1 + torch.arange(30.0).reshape(2, 15, 1)
    parts = windows.partition(x)[..., 0]
    assert parts[:6].tolist() == [[1, 6], [2, 7], [3, 8], [4, 9], [5, 10], [0, 0]]
    assert torch.equal(windows.merge(windows.partition(x)), x)
    assert Windows((2, 4), (1, 2), (1, 2)).partition(x[:1, :8])[..., 0].tolist() == [[1, 3], [2, 4], [5, 7], [6, 8]]


# -- the bias ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [(3, 3), (2, 4), (1, 1)])
def test_the_bias_is_the_mlp_of_every_offset(group: tuple[int, int]) -> None:
    module = shaken(DynamicPositionBias(48, 3))
    assert module.mlp[0].out_features == 3
    at = torch.cartesian_prod(torch.arange(group[0]), torch.arange(group[1]))
    expected = bias_of(module, at[:, None] - at).permute(2, 0, 1)
    assert_near(module(group), expected, 1e-12)
    found = offsets(group)
    assert torch.equal(found.values[found.place], at[:, None] - at)
    assert len(found.values) == (2 * group[0] - 1) * (2 * group[1] - 1)


def test_a_table_holds_a_number_for_each_offset() -> None:
    table = OffsetBias(3, (2, 3))
    found = offsets((2, 3))
    assert_near(table(), table.table[found.place].permute(2, 0, 1), 0)
    assert table().unique().numel() == 3 * 3 * 5


def test_widths_of_the_bias() -> None:
    assert [DynamicPositionBias(dim, 2).mlp[0].out_features for dim in (16, 64, 96, 768)] == [2, 4, 6, 48]
    assert DynamicPositionBias(16, 2, 5).mlp[9].in_features == 5


# -- the embedding -----------------------------------------------------------------------------------------------------


def test_the_embedding_by_hand() -> None:
    embed, images = CrossScaleEmbedding(2, 16, (4, 8, 16, 32)).double(), randn(1, 2, 13, 22)
    assert embed.widths == (8, 4, 2, 2)
    wide = F.pad(images, (0, 2, 0, 3))
    parts = [
        F.conv2d(F.pad(wide, (reach, reach, reach, reach)), conv.weight, conv.bias, stride=4)
        for conv, reach in zip(embed.convs, (0, 2, 6, 14), strict=True)
    ]
    assert parts[0].shape == (1, 8, 4, 6)
    assert_near(embed(images), torch.cat(parts, 1), 1e-12)
    assert [conv.kernel_size[0] for conv in embed.convs] == [4, 8, 16, 32]
    assert CrossScaleEmbedding(2, 6, (2, 4), 2).widths == (3, 3)
    assert CrossScaleEmbedding(2, 5, (3,), 3).widths == (5,)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernels": ()}, r"kernels=\(\) must hold"), ({"kernels": (2, 8)}, "kernels=2 must be a whole number, at"),
     ({"kernels": (4, 7)}, r"kernels=\(4, 7\) must differ from stride=4 by even"), ({"dim": 12}, "multiple of 8"),
     ({"stride": 0}, "stride=0"), ({"channels": 0}, "channels=0")],
)  # fmt: skip
def test_bad_options_of_the_embedding(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CrossScaleEmbedding(**{"channels": 3, "dim": 16, **options})
    with pytest.raises(ShapeError, match=r"images must be \(B, 3, H, W\)"):
        CrossScaleEmbedding(3, 16)(torch.zeros(1, 2, 8, 8))


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_network_by_hand() -> None:
    net = shaken(CrossFormer.example())
    images = randn(2, 2, 15, 22)
    x, size = norm(net.embed_norm, net.embed(images).flatten(2).mT), (8, 11)
    for index, stage in enumerate(net.stages):
        if index:
            merge = net.merges[0]
            found = merge.embed(norm(merge.norm, x).mT.unflatten(2, size))
            assert found.shape == (2, 64, 4, 6)
            x, size = found.flatten(2).mT, (4, 6)
        for block in stage:
            x = x + block.mixer(norm(block.norm, x), size=size)
            hidden = norm(block.mlp_norm, x) @ block.mlp[0].weight.mT + block.mlp[0].bias
            x = x + (hidden * torch.special.ndtr(hidden)) @ block.mlp[2].weight.mT + block.mlp[2].bias
    expected = norm(net.norm, x).mean(1) @ net.head.weight.mT + net.head.bias
    assert_near(net(images), expected, 1e-10)


def test_options_of_the_network() -> None:
    layers = [block.mixer for stage in CrossFormer.of_size("tiny").stages for block in stage]
    assert [layer.kind for layer in layers[:4]] == ["short", "short", "short", "long"]
    assert [layer.interval for layer in layers] == [8] + [4] + [2] * 8 + [1] * 6
    assert [layer.heads for layer in layers[:3]] == [2, 4, 8]
    assert {layer.group for layer in layers} == {7}
    net = CrossFormer((1, 1), (16, 32), (2, 2), group=(2, 3), intervals=None, fit="release", padding="seen")
    layers = [block.mixer for stage in net.stages for block in stage]
    assert [(layer.group, layer.interval, layer.fit, layer.padding) for layer in layers] == [
        (2, None, "release", "seen"), (3, None, "release", "seen"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dims": (96, 192)}, "dims must have a number for each stage; got 2 for 4"), ({"heads": (3,)}, "heads must"),
     ({"group": (7, 7)}, "group must have"), ({"intervals": (8,)}, "intervals must"), ({"depths": ()}, "dims must"),
     ({"kernels": ()}, "kernels="), ({"classes": 0}, "classes=0"), ({"depths": (1, 0, 1, 1)}, "depths=0")],
)  # fmt: skip
def test_bad_networks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CrossFormer(**options)


# -- what it is for ----------------------------------------------------------------------------------------------------


def trained(net: nn.Module, draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], seed: int, steps: int):
    """Train on fresh examples; return the share of new ones that are classified right."""
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        x, y = draw(16, random)
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x, y = draw(1024, torch.Generator().manual_seed(99))
        return (net(x).argmax(-1) == y).float().mean().item()


def corners(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make maps of 16 x 16 with a number in two opposite corners; the label says which one is larger."""
    x = torch.zeros(count, 16, 16, 3)
    x[..., 0] = 0.1 * torch.randn(count, 16, 16, generator=random)
    ends = 2 * torch.rand(count, 2, generator=random) - 1
    x[:, 0, 0, 0], x[:, -1, -1, 0] = ends.unbind(1)
    x[:, 0, 0, 1] = x[:, -1, -1, 2] = 1
    return x.flatten(1, 2), (ends[:, 0] > ends[:, 1]).long()


class Comparing(nn.Module):
    """Two blocks, and a linear map of the first corner's token."""

    def __init__(self, *kinds: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 2)
        self.blocks = nn.ModuleList(
            Block(LongShortAttention(16, 2, 4, kind, bias_width=8), gelu_mlp(16, 2.0), nn.LayerNorm) for kind in kinds
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, size=(16, 16))
        return self.head(x[:, 0])


@pytest.mark.slow
def test_long_distances_join_opposite_corners(claim) -> None:
    def share(*kinds: str) -> float:
        torch.manual_seed(0)
        return trained(Comparing(*kinds), corners, seed=0, steps=300)

    claim(
        "a short and a long block compare numbers in opposite corners of 16 x 16 tokens: share of right answers",
        ours=share("short", "long"), baseline=share("short", "short"), better="higher", margin=0.15,
        baseline_name="two short blocks, which see one corner", seed=0,
    )  # fmt: skip


def blobs(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make images of 32 x 32 with one tall or wide blob, small or large; the label says which of the four."""
    at, label = torch.arange(32.0), torch.randint(0, 4, (count,), generator=random)
    centre = 32 * (0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=random))
    spread = 1.2 * torch.where(label % 2 == 1, 5.0, 1.2)[:, None, None]
    tall = torch.where(label // 2 == 1, 2.0, 0.5)[:, None, None].sqrt()
    far = ((at[:, None] - centre[:, 0]) / (spread * tall)).square() + ((at - centre[:, 1]) / (spread / tall)).square()
    return ((-far / 2).exp() + 0.2 * torch.randn(far.shape, generator=random))[:, None], label


@pytest.mark.slow
def test_kernels_of_several_scales_see_blobs_of_several_scales(claim) -> None:
    def share(kernels: tuple[int, ...], seed: int) -> float:
        torch.manual_seed(seed)
        net = CrossFormer(
            (2,), (32,), (2,), channels=1, classes=4, group=4, intervals=None, kernels=kernels, mlp_ratio=2.0
        )
        return trained(net, blobs, seed, steps=300)

    ours, single = ([share(kernels, seed) for seed in range(3)] for kernels in ((4, 8, 16), (4,)))
    claim(
        "an embedding of three kernel sizes tells small and large, tall and wide blobs apart: mean of 3 seeds",
        ours=sum(ours) / 3, baseline=sum(single) / 3, better="higher", margin=0.1,
        baseline_name="one kernel of the patch's size, as many channels", seed=0,
    )  # fmt: skip
