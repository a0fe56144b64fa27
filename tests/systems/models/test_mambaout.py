"""MambaOut: the gated CNN block, the networks, and the sequence length at which attention is most of the cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnknownKey
from foveate.models.vision.mambaout import GatedCNNBlock, MambaOut, block_flops, is_long_sequence, with_token_mixer
from foveate.nn import Layer, MultiHeadAttention
from foveate.nn.vision.inline_attention import InLineAttention
from tests.support.tensors import assert_near
from tests.systems.nn.digits import accuracy, fit


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(module: nn.Module) -> nn.Module:
    """Convert a module to float64 and change every parameter, so that each affects the output."""
    module = module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.2 * randn(*parameter.shape, seed=index))
    return module


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias


def gelu(x: Tensor) -> Tensor:
    return x * torch.special.ndtr(x)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.mT + layer.bias


def neighbourhood(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute a depthwise convolution of `(B, H, W, C)`, one kernel offset at a time."""
    reach = conv.weight.shape[-1] // 2
    wide, out = F.pad(x, (0, 0, reach, reach, reach, reach)), conv.bias.expand_as(x).clone()
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            out += conv.weight[:, 0, dy, dx] * wide[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
    return out


# -- the block ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "hidden", "convolved"),
    [
        ({}, 26, 10),
        ({"conv_ratio": 0.55, "kernel": 3}, 26, 5),
        ({"expansion": 1.5, "conv_ratio": 1.5, "kernel": 5}, 15, 15),
        ({"conv_ratio": 0.0}, 26, 0),
    ],
)
def test_the_block_by_hand(options: dict, hidden: int, convolved: int) -> None:
    block, x = perturbed(GatedCNNBlock(10, **options)), randn(2, 5, 6, 10)
    inside = linear(block.fc1, norm(block.norm, x))
    gate, kept, mixed = inside[..., :hidden], inside[..., hidden : 2 * hidden - convolved], inside[..., -convolved:]
    values = torch.cat([kept, neighbourhood(block.conv, mixed)], -1) if convolved else inside[..., hidden:]
    assert_near(block(x), x + linear(block.fc2, gelu(gate) * values), 1e-12)
    assert (block.conv is None) == (convolved == 0)


def changed_by_a_pixel(block: GatedCNNBlock, at: tuple[int, int] = (8, 6)) -> Tensor:
    """Return a mask `(H, W)` of the output pixels that change with one input pixel."""
    x = randn(1, 17, 15, 10)
    other = x.clone()
    other[:, at[0], at[1]] = randn(10, seed=1)
    return (block(x) - block(other)).abs().amax((0, 3)) > 0


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_pixel_reaches_as_far_as_the_kernel(kernel: int) -> None:
    changed = changed_by_a_pixel(perturbed(GatedCNNBlock(10, kernel=kernel)))
    expected, reach = torch.zeros_like(changed), kernel // 2
    expected[8 - reach : 9 + reach, 6 - reach : 7 + reach] = True
    assert torch.equal(changed, expected)
    assert changed_by_a_pixel(perturbed(GatedCNNBlock(10, conv_ratio=0.0))).sum() == 1


# -- a mixer after the convolution -------------------------------------------------------------------------------------


class Same(Layer):
    def _mix(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return x


def test_a_mixer_that_does_nothing_leaves_mambaout_s_block() -> None:
    block, x = perturbed(GatedCNNBlock(10)), randn(2, 5, 6, 10)
    for mixer in (None, Same(10)):
        assert_near(with_token_mixer(block, mixer, causal=mixer is not None)(x), block(x), 0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_mixer_works_behind_the_convolution(causal: bool) -> None:
    torch.manual_seed(0)
    block, mixer, x = perturbed(GatedCNNBlock(10)), MultiHeadAttention(10, 2).double(), randn(2, 5, 6, 10)
    mixed = with_token_mixer(block, mixer, causal=causal)
    gate, kept, convolved = linear(block.fc1, norm(block.norm, x)).split((26, 16, 10), -1)
    tokens = neighbourhood(block.conv, convolved).reshape(2, 30, 10)
    tokens = mixer(tokens, causal=causal).reshape(2, 5, 6, 10)
    assert_near(mixed(x), x + linear(block.fc2, gelu(gate) * torch.cat([kept, tokens], -1)), 1e-12)
    assert block.mixer is None, "the block itself is left as it is"
    assert (mixed.conv.weight == block.conv.weight).all()
    assert mixed.conv.weight is not block.conv.weight


def test_a_mixer_for_grids_gets_the_grid_size() -> None:
    torch.manual_seed(0)
    block, x = perturbed(GatedCNNBlock(10)), randn(2, 5, 6, 10)
    mixer = InLineAttention(10, 2).double()
    seen = []
    mixer.register_forward_hook(lambda *given: seen.append(given[2]["size"]), with_kwargs=True)
    assert with_token_mixer(block, mixer)(x).shape == x.shape
    assert seen == [(5, 6)]


def test_mixers_of_another_width_are_refused() -> None:
    with pytest.raises(OptionError, match=r"mixer must be as wide as the convolution \(10\); got dim=12"):
        with_token_mixer(GatedCNNBlock(10), Same(12))
    with pytest.raises(OptionError, match=r"mixer must be as wide as the convolution \(0\)"):
        with_token_mixer(GatedCNNBlock(10, conv_ratio=0.0), Same(10))


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("femto", 7.3), ("kobe", 9.1), ("tiny", 26.5), ("small", 48.5), ("base", 84.8)]
)
def test_the_paper_s_networks(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = MambaOut(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def small(**options) -> MambaOut:
    torch.manual_seed(0)
    return MambaOut(**{"depths": (1, 2), "dims": (6, 10), "channels": 2, "classes": 5, **options})


def test_the_network_by_hand() -> None:
    net, images = perturbed(small(kernel=3, expansion=2.0, conv_ratio=0.5)), randn(2, 2, 13, 16)

    def halved(conv: nn.Conv2d, x: Tensor) -> Tensor:
        out = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2, padding=1)
        return out.permute(0, 2, 3, 1)

    x = gelu(norm(net.stem.norm1, halved(net.stem.conv1, images.permute(0, 2, 3, 1))))
    x = norm(net.stem.norm2, halved(net.stem.conv2, x))
    assert x.shape == (2, 4, 4, 6)
    x = net.stages[0].blocks(x)
    down = net.stages[1].downsample
    x = net.stages[1].blocks(norm(down.norm, halved(down.conv, x)))
    assert x.shape == (2, 2, 2, 10)
    hidden = gelu(linear(net.head.pre_logits["fc"], norm(net.head.norm, x.mean((1, 2)))))
    assert_near(net(images), linear(net.head.fc, norm(net.head.pre_logits["norm"], hidden)), 1e-12)
    blocks = [*net.stages[0].blocks, *net.stages[1].blocks]
    assert [block.split for block in blocks] == [(12, 9, 3), (20, 15, 5), (20, 15, 5)]
    assert blocks[0].conv.kernel_size == (3, 3)


def test_names_are_those_of_timm() -> None:
    names = set(small().state_dict())
    for part in ("stem.conv1", "stem.norm1", "stem.conv2", "stem.norm2", "stages.1.downsample.conv",
                 "stages.1.downsample.norm", "stages.1.blocks.1.norm", "stages.1.blocks.1.fc1",
                 "stages.1.blocks.1.conv", "stages.1.blocks.1.fc2", "head.norm", "head.pre_logits.fc",
                 "head.pre_logits.norm", "head.fc"):  # fmt: skip
        assert {f"{part}.weight", f"{part}.bias"} <= names


def test_initial_weights() -> None:
    net = small()
    assert abs(net.stages[1].blocks[0].fc1.weight.std().item() - 0.02) < 0.002
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    assert MambaOut(depths=(1,), dims=(6,)).head.fc.out_features == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, "depths and dims must be as long as each other; got 1, 2"), ({"depths": (1, 0)}, "depths=0"),
        ({"dims": (6, 0)}, "dims=0"), ({"channels": 0}, "channels=0"), ({"classes": 0}, "classes=0"),
        ({"kernel": 4}, "kernel=4 must be odd"),
    ],
)  # fmt: skip
def test_bad_networks(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small(**options)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(UnknownKey, match='unknown size of MambaOut "huge"; known: base, femto, kobe, small, tiny'):
        MambaOut("huge")
    with pytest.raises(ShapeError, match=r"images must be \(B, 2, H, W\); got Tensor \(1, 3, 8, 8\) float32"):
        small()(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "options", [{"dim": 0}, {"expansion": 0.0}, {"kernel": 0}, {"conv_ratio": -0.1}, {"conv_ratio": 3.0}], ids=str
)
def test_bad_blocks(options: dict) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}="):
        GatedCNNBlock(**{"dim": 10, **options})


# -- long sequences ----------------------------------------------------------------------------------------------------


def test_attention_is_most_of_the_cost_beyond_six_widths() -> None:
    assert not is_long_sequence(196, 384)
    assert is_long_sequence(4096, 384)
    assert is_long_sequence(4000, 384)
    for dim in (1, 48, 384):
        flops = block_flops(6 * dim, dim)
        assert flops.linear == flops.attention
        assert not is_long_sequence(6 * dim, dim)
        assert is_long_sequence(6 * dim + 1, dim)
    assert block_flops(196, 384) == (24 * 384**2 * 196, 4 * 384 * 196**2)
    for tokens, dim, message in ((0, 384, "tokens=0"), (196, 0, "dim=0")):
        with pytest.raises(OptionError, match=message):
            is_long_sequence(tokens, dim)


def test_the_criterion_counts_a_real_block() -> None:
    """The formula equals a block's operations, with two for each multiply-add."""
    tokens, dim = 30, 8
    block = nn.ModuleList([MultiHeadAttention(dim, 2), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)])
    maps = [part for part in block.modules() if isinstance(part, nn.Linear)]
    assert block_flops(tokens, dim).linear == sum(2 * tokens * part.in_features * part.out_features for part in maps)
    q = torch.zeros(1, 2, tokens, dim // 2)
    assert block_flops(tokens, dim).attention == block[0].op.plan(q, q, q).flops


# -- what the paper claims ---------------------------------------------------------------------------------------------


class Digits(nn.Module):
    """A network with two blocks on four by four tokens of two by two pixels."""

    def __init__(self, make) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(4, 32), nn.Parameter(0.02 * torch.randn(4, 4, 32))
        self.blocks, self.norm, self.head = nn.Sequential(make(), make()), nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.places)).mean((1, 2)))


def read(make, seeds: int = 2) -> float:
    found = 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        found += accuracy(fit(Digits(make), seed, epochs=8))
    return found / seeds


@pytest.mark.slow
def test_images_need_no_recurrence(claim) -> None:
    def recurrent() -> GatedCNNBlock:
        return with_token_mixer(GatedCNNBlock(32), MultiHeadAttention(32, 4, op="lightning_attention_2"), causal=True)

    claim(
        "a recurrence behind the convolution adds nothing to the classification of images: accuracy on digits",
        ours=read(lambda: GatedCNNBlock(32)), baseline=read(recurrent) - 0.005, better="higher",
        baseline_name="the same blocks with a causal linear recurrence (Lightning Attention-2), less half a point",
        seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_the_convolution_is_needed(claim) -> None:
    claim(
        "a 7x7 convolution is token mixer enough: accuracy on held-out digits",
        ours=read(lambda: GatedCNNBlock(32)), baseline=read(lambda: GatedCNNBlock(32, conv_ratio=0.0)),
        better="higher", margin=0.05, baseline_name="the same blocks without it, gated MLPs", seed=0,
    )  # fmt: skip
