"""Residual attention: exact limits, the mask branch by hand, the published networks, deep stacks and wrong labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnknownKey
from foveate.models import ResidualAttentionNet
from foveate.nn import ResidualAttentionModule, ResidualUnit, cost
from foveate.nn.parts.spatial import halve, resize
from tests.support.tensors import assert_near
from tests.systems.nn import digits


def with_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms random statistics and parameters, so that none of them is an identity."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                for tensor in (part.weight, part.bias, part.running_mean):
                    tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=random))
    return module.double().eval()


def made(channels: int = 8, seed: int = 0, **options) -> ResidualAttentionModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ResidualAttentionModule(channels, **options)
    return with_statistics(module, seed)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Constant(nn.Module):
    """A mask of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


def trunk_of(module: ResidualAttentionModule, x: Tensor) -> Tensor:
    return module.after(module.trunk(module.before(x)))


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9,), (7, 5), (1, 3), (3, 4, 2)])
def test_exact_limits(size: tuple[int, ...]) -> None:
    x = noise(2, 8, *size)
    residual, naive = made(dims=len(size)), made(dims=len(size), mode="nal")
    residual.mask, naive.mask = Constant(0.0), Constant(1.0)
    assert_near(residual(x), trunk_of(residual, x), 1e-12)
    assert_near(naive(x), trunk_of(naive, x), 1e-12)
    residual.mask, naive.mask = Constant(1.0), Constant(0.0)
    assert_near(residual(x), residual.after(2 * residual.trunk(residual.before(x))), 1e-12)
    assert_near(naive(x), naive.after(torch.zeros_like(x)), 1e-12)


@pytest.mark.parametrize("size", [(13,), (7, 5), (11, 16), (2, 1), (5, 3, 2)])
def test_the_mask_weighs_the_trunk(size: tuple[int, ...]) -> None:
    module, x = made(dims=len(size), p=2, t=3, r=2), noise(2, 8, *size)
    mask = module.weights(x)
    assert mask.shape == x.shape
    assert 0 < mask.min() < mask.max() < 1
    assert_near(module(x), module.after((1 + mask) * module.trunk(module.before(x))), 1e-12)
    assert [len(part) for part in (module.before, module.trunk, module.after)] == [2, 3, 2]


def test_a_unit_by_hand() -> None:
    unit, x = with_statistics(ResidualUnit(8)), noise(2, 8, 5, 4)
    active = x
    for norm, conv, padding in ((unit.norm1, unit.conv1, 0), (unit.norm2, unit.conv2, 1), (unit.norm3, unit.conv3, 0)):
        active = F.conv2d(norm(active).clamp(min=0), conv.weight, padding=padding)
    assert_near(unit(x), x + active, 1e-12)
    assert [conv.weight.shape[:2] for conv in (unit.conv1, unit.conv2, unit.conv3)] == [(2, 8), (2, 2), (8, 2)]


def test_a_unit_that_changes_the_size_shortcuts_what_is_active() -> None:
    unit, x = with_statistics(ResidualUnit(8, 12, 2)), noise(2, 8, 5, 4)
    for conv in (unit.conv1, unit.conv2, unit.conv3):
        nn.init.zeros_(conv.weight)
    active = unit.norm1(x).clamp(min=0)[:, :, ::2, ::2]
    assert_near(unit(x), torch.einsum("oc,bchw->bohw", unit.shortcut.weight[:, :, 0, 0], active), 1e-12)


def test_the_mask_branch_by_hand() -> None:
    """Follow the blobs of the release's AttentionA: three pools, skips at two sizes, an interpolation at the end."""
    module, x = made(), noise(2, 8, 17, 12)
    mask = module.mask
    pool1 = halve(x)
    down1 = mask.down[0](pool1)
    down2 = mask.down[1](halve(down1))
    down3 = mask.down[2](halve(down2))
    assert [tuple(blob.shape[2:]) for blob in (down1, down2, down3)] == [(8, 6), (4, 3), (2, 1)]
    up2 = mask.up[1](mask.skip[1](down2) + resize(down3, (4, 3)))
    up1 = mask.up[0](mask.skip[0](down1) + resize(up2, (8, 6)))
    out = resize(up1, (17, 12))
    for norm, conv in ((mask.out[0], mask.out[2]), (mask.out[3], mask.out[5])):
        out = F.conv2d(norm(out).clamp(min=0), conv.weight)
    assert_near(mask(x), 1 / (1 + (-out).exp()), 1e-12)
    units = [len(part) for part in (*mask.down, *mask.up)]
    assert units == [1, 1, 2, 1, 1]
    assert all(isinstance(part, ResidualUnit) for part in mask.skip)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 56])
def test_pools_have_caffes_windows(size: int) -> None:
    """Windows of 3 begin at every second entry from the first, and the last one may reach past the end."""
    x, count = noise(1, 1, size), max(1, math.ceil((size - 3) / 2) + 1)
    expected = torch.stack([x[..., 2 * i : 2 * i + 3].amax(-1) for i in range(count)], -1)
    assert_near(halve(x), expected, 0)
    assert halve(x).shape[-1] == max(1, size // 2)


def test_interpolation_keeps_corners() -> None:
    x = noise(1, 1, 4)
    places = torch.arange(7) * 3 / 6
    low = places.floor().long().clamp(max=2)
    expected = x[..., low] + (places - low) * (x[..., low + 1] - x[..., low])
    assert_near(resize(x, (7,)), expected, 1e-12)
    square = resize(noise(1, 1, 3, 2), (5, 7))
    assert_near(square[..., [0, 0, -1, -1], [0, -1, 0, -1]], noise(1, 1, 3, 2).flatten(2)[..., [0, 1, 4, 5]], 1e-12)


def test_activations_by_hand() -> None:
    x, scores = noise(2, 8, 5, 4), []
    for gate in ("mixed", "channel", "spatial"):
        mask = made(gate=gate).mask
        mask.out.register_forward_hook(lambda _, args, out: scores.append(out))
        found, score = mask(x), scores.pop()
        if gate == "mixed":
            expected = 1 / (1 + (-score).exp())
        elif gate == "channel":
            expected = score / score.square().sum(1, keepdim=True).sqrt()
        else:
            flat = score.flatten(2)
            deviation = flat.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()
            expected = torch.sigmoid((flat - flat.mean(-1, keepdim=True)) / deviation).view_as(score)
        assert_near(found, expected, 1e-12)


def test_a_mask_filters_the_trunks_gradient() -> None:
    """With `M T`, what the mask hides teaches the trunk nothing; with `(1 + M) T` it still does."""
    hidden = torch.zeros(2, 8, 6, 5, dtype=torch.float64)
    hidden[:, :, :3] = 1

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hidden

    for mode, least in (("nal", 0.0), ("arl", 1.0)):
        module, seen = made(mode=mode), []
        module.mask, module.after = Half(), nn.Identity()
        module.trunk.register_full_backward_hook(lambda _, into, out, seen=seen: seen.append(out[0]))
        module(noise(2, 8, 6, 5).requires_grad_()).sum().backward()
        assert_near(seen[0], hidden + least, 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=3), "channels=3 must be at least 4"),
        (dict(channels=8, down=0), "down=0"),
        (dict(channels=8, p=0), "p=0"),
        (dict(channels=8, t=0), "t=0"),
        (dict(channels=8, r=0), "r=0"),
        (dict(channels=8, mode="none"), "mode='none' must be one of 'arl', 'nal'"),
        (dict(channels=8, gate="f1"), "gate='f1' must be one of 'mixed', 'channel', 'spatial'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ResidualAttentionModule(**options)


# -- the network -------------------------------------------------------------------------------------------------------

#: Numbers of parameters and multiply-adds of the release's Caffe networks at 224 x 224, counted layer by layer from
#: their descriptions.
RELEASED = {"attention56": (31_810_728, 6_270_836_736), "attention92": (52_466_344, 10_533_789_696)}


def on_meta(name: str, **options) -> ResidualAttentionNet:
    with torch.device("meta"):
        return ResidualAttentionNet.of_size(name, **options)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_networks_have_as_many_parameters_and_products(name: str) -> None:
    net = on_meta(name)
    assert cost(net, torch.empty(1, 3, 224, 224, device="meta")) == RELEASED[name]
    assert net.trunk_depth == int(name.removeprefix("attention"))
    kinds = [type(part) for part in net.modules()]
    units, modules = kinds.count(ResidualUnit), kinds.count(ResidualAttentionModule)
    assert (units, modules) == {"attention56": (33, 3), "attention92": (54, 6)}[name]


def test_depths_on_cifar() -> None:
    for m, options, depth in ((0, {}, 20), (1, {}, 56), (2, {}, 92), (1, dict(p=2, t=4, r=3), 20 + 72)):
        with torch.device("meta"):
            net = ResidualAttentionNet((m, m, m), 10, form="cifar", **options)
        assert net.trunk_depth == depth
    assert 20 + 6 * 72 == 452, "Attention-452 has six such modules a stage"


@pytest.mark.parametrize(
    ("form", "sides"),
    [("imagenet", [(9, 12), (5, 6), (3, 3)]), ("cifar", [(35, 48), (18, 24), (9, 12)])],
)
def test_stages(form: str, sides: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    net = ResidualAttentionNet((1, 2, 1), 7, form=form, width=4, channels=2)
    seen = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    assert net(torch.randn(2, 2, 35, 48)).shape == (2, 7)
    assert seen == [(2, channels, *side) for channels, side in zip((16, 32, 64), sides, strict=True)]
    modules = [[part for part in stage if isinstance(part, ResidualAttentionModule)] for stage in net.stages]
    downs = [[len(part.mask.down) for part in stage] for stage in modules]
    assert downs == [[3], [2, 2], [1]]


def test_bad_networks() -> None:
    for options, message in (
        (dict(modules=(1, 1)), "modules=(1, 1) must be three whole numbers"),
        (dict(modules=(1, -1, 1)), "modules=-1"),
        (dict(form="mnist"), "form='mnist' must be one of 'imagenet', 'cifar'"),
        (dict(classes=0), "classes=0"),
        (dict(width=0), "width=0"),
    ):
        with pytest.raises(OptionError) as caught:
            ResidualAttentionNet(**options)
        assert message in str(caught.value)
    with pytest.raises(UnknownKey, match='did you mean "attention56"'):
        ResidualAttentionNet.of_size("attention-56")
    with pytest.raises(ShapeError, match=r"images must be \(B, 3, H, W\)"):
        on_meta("attention56")(torch.zeros(1, 1, 32, 32))


# -- deep stacks, wrong labels -----------------------------------------------------------------------------------------


def strength(mode: str, modules: int = 8) -> float:
    """Return the norm of a map behind so many modules at their start, over that of the map before."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(ResidualAttentionModule(16, down=1, mode=mode) for _ in range(modules))).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        return (stack(x).norm() / x.norm()).item()


def test_a_deep_stack_keeps_its_signal(claim) -> None:
    claim(
        "behind 8 modules the signal of M T is at most 1/20 of that of (1 + M) T: norm over that of the input",
        ours=strength("arl") / 20, baseline=strength("nal"), better="higher",
        baseline_name="naive attention learning, M T; ours divided by 20", seed=0,
    )  # fmt: skip


def read_despite_wrong_labels(mode: str, *, masked: bool = True, seeds: int = 2) -> float:
    """Train three modules on digits, 30 % of them with another digit's label; return the accuracy on right labels."""
    images, labels, _, _ = digits.data()
    found = []
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = three_modules(mode, masked)
        random = torch.Generator().manual_seed(seed)
        wrong = labels + torch.randint(1, digits.CLASSES, labels.shape, generator=random)
        given = torch.where(torch.rand(labels.shape, generator=random) < 0.3, wrong % digits.CLASSES, labels)
        fit(net, images, given, random)
        found.append(digits.accuracy(net))
    return sum(found) / seeds


def three_modules(mode: str, masked: bool, channels: int = 16) -> nn.Sequential:
    modules = [ResidualAttentionModule(channels, down=1, t=1, mode=mode) for _ in range(3)]
    for module in modules:
        module.mask = module.mask if masked else Constant(0.0)
    return nn.Sequential(
        nn.Unflatten(1, (1, digits.PIXELS)), nn.Conv2d(1, channels, 3, padding=1, bias=False), *modules,
        nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, digits.CLASSES),
    )  # fmt: skip


def fit(net: nn.Module, images: Tensor, labels: Tensor, random: torch.Generator, epochs: int = 5) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.05)
    batches = math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=random).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    net.eval()


@pytest.mark.slow
def test_masks_help_against_wrong_labels(claim) -> None:
    ours = read_despite_wrong_labels("arl")
    claim(
        "three modules read digits after training with 30 % wrong labels better than naive attention: accuracy",
        ours=ours, baseline=read_despite_wrong_labels("nal"), better="higher", margin=0.1,
        baseline_name="naive attention learning, M T", seed=0,
    )  # fmt: skip
    claim(
        "the same modules read them better than their trunks do: accuracy after training with 30 % wrong labels",
        ours=ours, baseline=read_despite_wrong_labels("arl", masked=False), better="higher", margin=0.02,
        baseline_name="the trunk alone, of equal depth", seed=0,
    )  # fmt: skip
