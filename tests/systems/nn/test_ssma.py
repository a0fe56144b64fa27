"""SSMA: weights by hand, the limit of plain concatenation, the decoder's gate, and digits seen twice, once spoiled."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import ShapeError
from foveate.nn import SkipGate, SSMAFusion, cost
from tests.support.tensors import assert_near
from tests.systems.nn import digits
from tests.systems.nn.gated import noise, normed, refused, stirred


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve one map `(C, H, W)` by loops over the kernel, with zeros outside."""
    reach = conv.kernel_size[0] // 2
    padded = F.pad(x, [reach] * 4)
    out = torch.zeros(conv.out_channels, *x.shape[1:], dtype=x.dtype)
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            window = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
            out = out + torch.einsum("dc,chw->dhw", conv.weight[:, :, i, j], window)
    return out if conv.bias is None else out + conv.bias[:, None, None]


@pytest.mark.parametrize("out", ["conv1x1_bn", "conv3x3"])
@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
def test_by_hand(out: str, size: tuple[int, int]) -> None:
    fusion = stirred(SSMAFusion(3, 2, out=out))
    a, b = noise(2, *size, 3), noise(2, *size, 3, seed=2)
    fused, (of_a, of_b) = fusion(a, b)["fused"], fusion.weights(a, b)
    for i in range(2):
        both = torch.cat([a[i], b[i]], -1).movedim(-1, 0)
        weights = torch.sigmoid(convolved(fusion.widen, convolved(fusion.narrow, both).clamp(min=0)))
        assert_near(torch.cat([of_a[i], of_b[i]], -1).movedim(-1, 0), weights, 1e-12)
        if out == "conv3x3":
            expected = convolved(fusion.out, weights * both)
        else:
            expected = normed(convolved(fusion.out[0], weights * both)[None], fusion.out[1])[0]
        assert_near(fused[i].movedim(-1, 0), expected, 1e-12)


@pytest.mark.parametrize("out", ["conv1x1_bn", "conv3x3"])
def test_with_weights_of_one_it_is_concatenation(out: str) -> None:
    fusion, a, b = stirred(SSMAFusion(3, 2, out=out)), noise(2, 5, 4, 3), noise(2, 5, 4, 3, seed=2)
    nn.init.zeros_(fusion.widen.weight)
    nn.init.constant_(fusion.widen.bias, 50.0)
    expected = fusion.out(torch.cat([a, b], -1).movedim(-1, 1)).movedim(1, -1)
    assert_near(fusion(a, b)["fused"], expected, 1e-12)


def test_its_size() -> None:
    """The release's sizes: 32 channels inside 512, and 8 inside 48."""
    deep, skip = SSMAFusion(256), SSMAFusion(24, 6, out="conv3x3")
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())  # noqa: E731
    assert count(deep.narrow, deep.widen) == 512 * 32 * 9 + 32 + 32 * 512 * 9 + 512
    assert count(skip.narrow, skip.widen) == 48 * 8 * 9 + 8 + 8 * 48 * 9 + 48
    assert count(deep.out) == 512 * 256 + 2 * 256 and count(skip.out) == 48 * 24 * 9 + 24


def test_the_decoder_weighs_a_skip_connection() -> None:
    gate, skip, deep = stirred(SkipGate(4, 6)), noise(3, 4, 6, 5), noise(3, 6, 3, 2, seed=2)
    for i in range(3):
        mean = torch.stack([channel.sum() / 6 for channel in deep[i]])
        factors = normed((gate.weigh.weight @ mean)[None], gate.norm)[0].clamp(min=0)
        assert_near(gate(skip, deep)[i], factors[:, None, None] * skip[i], 1e-12)
    assert_near(gate(skip.flatten(2), deep), gate(skip, deep).flatten(2), 1e-12)
    assert cost(gate, skip, deep) == (4 * 6 + 2 * 4, 3 * 4 * 6)


def test_refusals() -> None:
    assert "out='sum' must be one of 'conv1x1_bn', 'conv3x3'" in refused(lambda: SSMAFusion(4, out="sum"))
    assert "reduction=0" in refused(lambda: SSMAFusion(4, 0))
    assert "signal_channels=0" in refused(lambda: SkipGate(4, 0))
    with pytest.raises(ShapeError, match=r"b must be real numbers \(B, H, W, 4\)"):
        SSMAFusion(4).weights(torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3, 5))
    for skip, deep, name in (
        (torch.zeros(2, 5, 3), torch.zeros(2, 6, 3), "x"), (torch.zeros(2, 4, 3), torch.zeros(2, 5, 3), "signal"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 6, 3), "signal"), (torch.zeros(2, 4), torch.zeros(2, 6, 3), "x"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=f"{name} must be "):
            SkipGate(4, 6)(skip, deep)


# -- digits seen twice -------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A convolution for each stream, a fusion, and a logit for each pixel."""

    def __init__(self, fusion: SSMAFusion, width: int = 8) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(1, width, 3, padding=1) for _ in range(2))
        self.fusion, self.head = fusion, nn.Linear(width, 1)

    def streams(self, x: Tensor) -> list[Tensor]:
        parts = zip(self.stems, x.split(1, 1), strict=True)
        return [F.relu(stem(part)).movedim(1, -1) for stem, part in parts]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fusion(*self.streams(x))["fused"]))[..., 0]


def spoiled(images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two copies `(B, 2, 8, 8)`, with noise in a half of one of them, and a mask of the spoiled pixels."""
    count = len(images)
    side, which = torch.randint(0, 4, (count,), generator=random), torch.randint(0, 2, (count,), generator=random)
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    halves = torch.stack([row < 4, row >= 4, column < 4, column >= 4])
    mask = torch.zeros(count, 2, 8, 8, dtype=torch.bool)
    mask[torch.arange(count), which] = halves[side]
    return torch.where(mask, 2 * torch.rand(count, 2, 8, 8, generator=random) - 1, images[:, None]), mask


class Open(nn.Module):
    """Weights of 1: the limit of plain concatenation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 50.0)


@cache
@torch.enable_grad()
def trained(plain: bool, seed: int, steps: int = 200) -> Segmenter:
    images, _, _, _ = digits.data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Segmenter(SSMAFusion(8, 2))
        if plain:
            net.fusion.narrow, net.fusion.widen = nn.Identity(), Open()
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(steps):
        chosen = images[torch.randint(0, len(images), (64,), generator=random)]
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(net(spoiled(chosen, random)[0]), (chosen > 0).float()).backward()
        optimiser.step()
    return net.eval()


@torch.no_grad()
def mean_iou(plain: bool, seeds: int = 3) -> float:
    images, found = digits.data()[2], []
    for seed in range(seeds):
        x, _ = spoiled(images, torch.Generator().manual_seed(100 + seed))
        said, true = trained(plain, seed)(x) > 0, images > 0
        for a, b in ((said, true), (~said, ~true)):
            found.append(((a & b).sum() / (a | b).sum()).item())
    return sum(found) / len(found)


def test_it_replaces_a_spoiled_stream(claim) -> None:
    claim(
        "digits seen twice, one copy half spoiled by noise, are cut out better: mean IoU, 3 seeds",
        ours=mean_iou(False), baseline=mean_iou(True), better="higher", margin=0.01,
        baseline_name="plain concatenation with the same last convolution", seed=0,
    )  # fmt: skip


@torch.no_grad()
def test_weights_fall_where_a_stream_is_spoiled(claim) -> None:
    images, inside, outside = digits.data()[2], [], []
    for seed in range(3):
        net = trained(False, seed)
        x, mask = spoiled(images, torch.Generator().manual_seed(100 + seed))
        for weights, bad in zip(net.fusion.weights(*net.streams(x)), mask.unbind(1), strict=True):
            hit = bad.any((1, 2))
            inside.append(weights[hit][bad[hit]].mean().item())
            outside.append(weights[hit][~bad[hit]].mean().item())
    claim(
        "weights of a spoiled stream are smaller in the spoiled half: mean, 3 seeds",
        ours=sum(inside) / 6, baseline=sum(outside) / 6, better="lower", margin=0.1,
        baseline_name="weights of the same stream in its other half", seed=0,
    )  # fmt: skip
