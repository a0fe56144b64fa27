"""Twins: the blocks and networks by hand, their published costs, sizes of images, and information across windows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnknownKey
from foveate.models import TwinsPCPVT, TwinsSVT
from foveate.nn import Block, GlobalSubsampledAttention, MultiHeadAttention, WindowAttention, cost
from tests.support.tensors import assert_near

NETWORKS = (TwinsSVT, TwinsPCPVT)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(make: type, **options: Any) -> Any:
    """Make a network of two stages in float64, every parameter of which has an effect."""
    torch.manual_seed(0)
    if make is TwinsSVT:
        options = {"window": 3, **options}
    net = make((2, 3), (8, 12), (2, 3), (2, 1), (2, 3), channels=2, classes=5, patch=2, **options).double()
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=index))
    return net


def norm(module: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias


def mlp(module: nn.Sequential, x: Tensor) -> Tensor:
    x = x @ module[0].weight.mT + module[0].bias
    return x * torch.special.ndtr(x) @ module[2].weight.mT + module[2].bias


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("make", NETWORKS)
def test_the_network_by_hand(make: type, variant: str) -> None:
    net, x = small(make, variant=variant), randn(2, 2, 12, 16)
    for stage, side in enumerate((2, 2)):
        embed = net.embeds[stage]
        x = F.conv2d(x, embed.conv.weight, embed.conv.bias, stride=side)
        size = (x.shape[2], x.shape[3])
        x = norm(embed.norm, x.flatten(2).mT, 1e-5)
        for place, block in enumerate(net.blocks[stage]):
            x = x + block.mixer(norm(block.norm, x, 1e-6), size=size)
            x = x + mlp(block.mlp, norm(block.mlp_norm, x, 1e-6))
            if place == 0:
                conv = net.positions[stage].conv
                image = F.conv2d(x.mT.unflatten(2, size), conv.weight, conv.bias, padding=1, groups=len(conv.weight))
                x = x + image.flatten(2).mT
        x = x.mT.unflatten(2, size)
    expected = norm(net.norm, x.flatten(2).mT, 1e-6).mean(1) @ net.head.weight.mT + net.head.bias
    images = randn(2, 2, 12, 16)
    assert_near(net(images), expected, 1e-12)
    assert [tuple(each.shape) for each in net.features(images)] == [(2, 8, 6, 8), (2, 12, 3, 4)]
    assert_near(net.features(images)[-1], x, 1e-12)


def kinds(net: nn.Module) -> list[list[str]]:
    short = {WindowAttention: "window", GlobalSubsampledAttention: "global"}
    return [[short[type(block.mixer)] for block in stage] for stage in net.blocks]


def test_attention_of_each_block() -> None:
    assert kinds(small(TwinsSVT)) == [["window", "global"], ["global"] * 3]
    assert kinds(small(TwinsSVT, variant="release")) == [["window", "global"], ["window", "global", "window"]]
    for variant in ("paper", "release"):
        assert kinds(small(TwinsPCPVT, variant=variant)) == [["global"] * 2, ["global"] * 3]
    net = small(TwinsSVT)
    first, second = net.blocks[0]
    assert first.mixer.window == (3, 3) and first.mixer.padding == "hidden" and first.mixer.heads == 2
    assert second.mixer.ratio == 2 and second.mixer.padding == "hidden" and net.blocks[1][0].mixer.ratio == 1
    assert [block.mlp[0].out_features for stage in net.blocks for block in stage] == [16, 16, 36, 36, 36]
    released = small(TwinsSVT, variant="release")
    assert released.blocks[0][0].mixer.padding == "seen" and released.blocks[0][1].mixer.padding == "dropped"
    assert all(block.mixer.attention.q.bias is not None for stage in net.blocks for block in stage)


def test_the_paper_s_defaults() -> None:
    with torch.device("meta"):
        svt, pcpvt = TwinsSVT.of_size("large"), TwinsPCPVT.of_size("large")
    assert [len(stage) for stage in svt.blocks] == [2, 2, 18, 2]
    assert [block.mixer.heads for stage in svt.blocks for block in stage[:1]] == [4, 8, 16, 32]
    assert [stage[1].mixer.ratio for stage in svt.blocks] == [8, 4, 2, 1]
    assert svt.blocks[0][0].mixer.window == (7, 7)
    assert [len(stage) for stage in pcpvt.blocks] == [3, 8, 27, 3]
    assert [stage[0].mlp[0].out_features for stage in pcpvt.blocks] == [512, 1024, 1280, 2048]
    assert [stage[0].mixer.heads for stage in pcpvt.blocks] == [1, 2, 5, 8]


@pytest.mark.parametrize(
    ("make", "size", "billions"),
    [
        (TwinsSVT, "small", 2.82), (TwinsSVT, "base", 8.35), (TwinsSVT, "large", 14.82), (TwinsPCPVT, "small", 3.67),
        (TwinsPCPVT, "base", 6.45), (TwinsPCPVT, "large", 9.51),
    ],
)  # fmt: skip
def test_the_release_s_counter_leaves_the_products_of_attention_out(make: type, size: str, billions: float) -> None:
    """The release's table counts modules: convolutions and linear maps, but neither `q kᵀ` nor the weights' product.

    Its numbers have one decimal; those with two are a port's, counted in the same way.
    """
    with torch.device("meta"):
        net = make.of_size(size)
    found = 0

    def count(module: nn.Module, inputs: Any, out: Tensor) -> None:
        nonlocal found
        found += out.numel() * module.weight[0].numel()

    images = torch.empty(1, 3, 224, 224, device="meta")
    whole = cost(net, images).macs
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    net(images)
    assert found / 1e9 == pytest.approx(billions, rel=0.01)
    products = 0
    for side, stage in zip((56, 28, 14, 7), net.blocks, strict=True):
        for block in stage:
            keys = 49 if isinstance(block.mixer, WindowAttention) else (side // block.mixer.ratio) ** 2
            products += 2 * side**2 * keys * block.mixer.dim
    assert whole == found + products


def test_initial_weights() -> None:
    net = TwinsSVT((1, 1), (64, 96), (2, 3), (2, 1), (4, 4))
    assert abs(net.blocks[0][0].mlp[0].weight.std().item() - 0.02) < 0.002
    assert abs(net.embeds[1].conv.weight.std().item() - (2 / (4 * 96)) ** 0.5) < 0.01
    assert abs(net.positions[1].conv.weight.std().item() - (2 / 9) ** 0.5) < 0.05
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


# -- sizes of images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", NETWORKS)
def test_an_image_is_filled_up_with_zeros(make: type) -> None:
    """Each stage fills its input up; the last pixels have an effect, and an image less than a patch goes in."""
    net, images = small(make), randn(2, 2, 11, 13).requires_grad_()
    out = net(images)
    assert_near(out, net(F.pad(images, (0, 1, 0, 1))), 1e-12)
    (grad,) = torch.autograd.grad(out.square().sum(), images)
    assert grad[:, :, -1].any() and grad[..., -1].any()
    assert [tuple(each.shape[2:]) for each in net.features(images)] == [(6, 7), (3, 4)]
    assert net(images[..., :1, :1]).isfinite().all()


@pytest.mark.parametrize("make", NETWORKS)
def test_the_release_drops_what_a_patch_does_not_divide(make: type) -> None:
    net, images = small(make, variant="release"), randn(2, 2, 13, 11)
    assert_near(net(images), net(images[..., :12, :10]), 1e-12)
    with pytest.raises(ShapeError, match='1 x 11 is less than a patch of 2; variant="paper" fills it up'):
        net(images[..., :1, :])
    with pytest.raises(ShapeError, match=r"size=\(1, 5\) must be at least ratio=2"):
        net(images[..., :2, :])


def test_variants_agree_where_all_divides() -> None:
    """With 12 x 12 tokens, then 3 x 3 in one window, both are the same function of the same parameters."""

    def make(variant: str) -> nn.Module:
        net = TwinsSVT((2, 2), (8, 12), (2, 3), (2, 1), (2, 2), window=3, channels=2, patch=2, variant=variant)
        return net.double()

    paper, release = make("paper"), make("release")
    release.load_state_dict(paper.state_dict())
    assert_near(release(randn(2, 2, 12, 12)), paper(randn(2, 2, 12, 12)), 1e-12)
    assert (release(randn(2, 2, 16, 16)) - paper(randn(2, 2, 16, 16))).abs().max() > 1e-6


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 5), (3, 4), (5, 2)])
def test_windows_over_the_grid_are_global_attention(size: tuple[int, int]) -> None:
    """Also where a window is larger than the grid, since padding is hidden; with seen padding only at equal sides."""
    torch.manual_seed(0)
    layer = WindowAttention(12, 3, 5, padding="hidden").double()
    plain = MultiHeadAttention(12, 3, bias=True).double()
    plain.load_state_dict({name.removeprefix("attention."): p for name, p in layer.state_dict().items()})
    x = randn(2, size[0] * size[1], 12)
    assert_near(layer(x, size=size), plain(x), 1e-12)
    layer.padding = "seen"
    assert ((layer(x, size=size) - plain(x)).abs().max() < 1e-12) == (size == (5, 5))


def shuffled(net: nn.Module) -> float:
    """Return how much logits change if the patches change places."""
    images = randn(1, 2, 8, 8)
    patches = images.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = patches[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(1, 2, 8, 8)
    return (net(images) - net(moved)).abs().max().item()


def test_only_the_conditional_positions_tell_places_apart() -> None:
    """A network that attends globally does not notice a new order of patches without them."""
    torch.manual_seed(0)
    net = TwinsPCPVT((2,), (12,), (3,), (1,), (2,), channels=2, classes=5, patch=2).double()
    assert shuffled(net) > 1e-3
    with torch.no_grad():
        for parameter in net.positions.parameters():
            parameter.zero_()
    assert shuffled(net) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, "depths, dims, heads, ratios, mlp_ratios must have one number for each stage; got"),
        ({"depths": (1, 0)}, "depths=0"), ({"dims": (8, 0)}, "dims=0"), ({"channels": 0}, "channels=0"),
        ({"classes": 0}, "classes=0"), ({"patch": 0}, "patch=0"), ({"ratios": (2, 0)}, "ratios=0"),
        ({"heads": (3, 2)}, "heads=3 must divide dim=8"), ({"mlp_ratios": (2, 0)}, "mlp_ratios=0"),
        ({"variant": "port"}, "variant='port'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", NETWORKS)
def test_bad_networks(make: type, options: dict, message: str) -> None:
    given = {"depths": (1, 1), "dims": (8, 8), "heads": (2, 2), "ratios": (2, 1), "mlp_ratios": (2, 2), **options}
    with pytest.raises(OptionError, match=message):
        make(**given)


def test_bad_windows_images_and_sizes() -> None:
    with pytest.raises(OptionError, match="window=0"):
        small(TwinsSVT, window=0)
    with pytest.raises(OptionError, match='no option "window"'):
        TwinsPCPVT(window=7)
    for make in NETWORKS:
        with pytest.raises(ShapeError, match=r"images must be \(B, 2, H, W\); got Tensor \(1, 3, 8, 8\) float32"):
            small(make)(torch.zeros(1, 3, 8, 8))
        with pytest.raises(UnknownKey, match='did you mean "small"'):
            make.of_size("smal")


# -- what the paper claims ---------------------------------------------------------------------------------------------


class Corners(nn.Module):
    """Two blocks on a 16 x 16 grid with windows of 4 x 4 that say whether two opposite corners show the same.

    The first token has to know; without sub-sampled attention it sees its own window only.
    """

    def __init__(self, ratio: int | None, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(2, dim), nn.Parameter(0.5 * torch.randn(256, dim))

        def mixer(place: int) -> nn.Module:
            return GlobalSubsampledAttention(dim, 2, ratio) if ratio and place % 2 else WindowAttention(dim, 2, 4)

        self.blocks = nn.ModuleList(
            Block(mixer(place), nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim)), nn.LayerNorm)
            for place in range(2)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.places
        for block in self.blocks:
            x = block(x, size=(16, 16))
        return self.head(self.norm(x[:, 0]))


def corners(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw grids with one of two symbols in the 8 x 8 tokens of two opposite corners, and whether they are the same."""
    symbols = torch.randint(0, 2, (count, 2), generator=random)
    x = torch.zeros(count, 16, 16, 2)
    x[torch.arange(count), :8, :8, symbols[:, 0]] = 1.0
    x[torch.arange(count), 8:, 8:, symbols[:, 1]] = 1.0
    return x.flatten(1, 2), (symbols[:, 0] == symbols[:, 1]).long()


@cache
def compares(ratio: int | None) -> float:
    """Return the accuracy after 300 steps."""
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Corners(ratio)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        x, same = corners(16, random)
        optimiser.zero_grad()
        F.cross_entropy(net(x), same).backward()
        optimiser.step()
    x, same = corners(256, random)
    with torch.no_grad():
        return (net(x).argmax(-1) == same).float().mean().item()


@pytest.mark.slow
def test_sub_sampled_attention_carries_information_across_windows(claim) -> None:
    claim(
        "windows and sub-sampled attention in turns compare opposite corners of 16 x 16 tokens: accuracy, 300 steps",
        ours=compares(4), baseline=compares(None), better="higher", margin=0.15,
        baseline_name="windows of 4 x 4 in all blocks", seed=0,
    )  # fmt: skip
