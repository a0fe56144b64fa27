"""ECAPA-TDNN: its blocks, the pooling and its weights, the margin, and what attentive pooling adds."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import FoveateError, OptionError
from foveate.models import ECAPATDNN
from foveate.nn import AttentiveStatsPool, SERes2Block1d
from foveate.nn.parts.tdnn import TDNN, Res2Conv
from foveate.train import AAMSoftmax
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module: nn.Module) -> Any:
    """Return a module in float64 and eval mode, in which every number has an effect, those of BatchNorm too."""
    module = module.double().eval()
    with torch.no_grad():
        for index, (name, x) in enumerate(module.state_dict().items()):
            if x.is_floating_point():
                noise = 0.3 * randn(*x.shape, seed=index)
                x.add_(noise.abs() if name.endswith("var") else noise)
    return module


def normed(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    shape = (-1, 1) if x.dim() == 3 else (-1,)
    centred = (x - norm.running_mean.view(shape)) / (norm.running_var + norm.eps).sqrt().view(shape)
    return centred * norm.weight.view(shape) + norm.bias.view(shape)


def single(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Apply a convolution of single frames."""
    return torch.einsum("dc,bct->bdt", conv.weight[..., 0], x) + conv.bias[:, None]


def tdnn(module: TDNN, x: Tensor) -> Tensor:
    """Compute a TDNN frame by frame; frames outside are mirrored at the first and the last."""
    kernel, dilation, frames = module.conv.kernel_size[0], module.conv.dilation[0], x.shape[2]
    out = []
    for t in range(frames):
        total = module.conv.bias.expand(len(x), -1)
        for place in range(kernel):
            at = abs(t + dilation * (place - kernel // 2))
            at = at if at < frames else 2 * (frames - 1) - at
            total = total + x[:, :, at] @ module.conv.weight[:, :, place].mT
        out.append(total.relu())
    return normed(module.norm, torch.stack(out, 2))


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (5, 1), (3, 2), (3, 4)])
def test_a_tdnn_by_hand(kernel: int, dilation: int) -> None:
    module, x = shaken(TDNN(3, 4, kernel, dilation)), randn(2, 3, 9)
    assert_near(module(x), tdnn(module, x), 1e-12)
    assert module(x).shape == (2, 4, 9)


def test_groups_add_the_result_before_them() -> None:
    module, x = shaken(Res2Conv(12, 4, 3, 2)), randn(2, 12, 9)
    groups = x.split(3, 1)
    second = tdnn(module.blocks[0], groups[1])
    third = tdnn(module.blocks[1], groups[2] + second)
    fourth = tdnn(module.blocks[2], groups[3] + third)
    assert_near(module(x), torch.cat([groups[0], second, third, fourth], 1), 1e-12)


def test_later_groups_see_further() -> None:
    """A change of one frame reaches no other in the first group, and i dilations to both sides in group i."""
    module, x = shaken(Res2Conv(48, 4, 3, 3)), randn(1, 48, 41)
    other = x.clone()
    other[..., 20] += 1
    changed = (module(x) != module(other))[0].unflatten(0, (4, 12)).any(1)
    for group, frames in enumerate(changed):
        assert frames.nonzero()[:, 0].tolist() == list(range(20 - 3 * group, 21 + 3 * group, 3))


@pytest.mark.parametrize("out_channels", [None, 12])
def test_the_block_by_hand(out_channels: int | None) -> None:
    block, x = shaken(SERes2Block1d(8, 2, scale=4, se=3, out_channels=out_channels)), randn(2, 8, 9)
    y = tdnn(block.tdnn2, block.res2net_block(tdnn(block.tdnn1, x)))
    hidden = single(block.se_block.conv1, y.mean(2, keepdim=True)).relu()
    gates = torch.sigmoid(single(block.se_block.conv2, hidden))
    shortcut = x if out_channels is None else single(block.shortcut, x)
    assert_near(block(x), y * gates + shortcut, 1e-12)
    assert [each.conv.dilation for each in block.res2net_block.blocks] == [(2,)] * 3


# -- the pool ----------------------------------------------------------------------------------------------------------


def pool(**options: Any) -> AttentiveStatsPool:
    torch.manual_seed(0)
    return shaken(AttentiveStatsPool(5, 4, **options))


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("global_context", [True, False])
def test_the_pool_by_hand(variant: Any, global_context: bool) -> None:
    module, x = pool(variant=variant, global_context=global_context), 2 * randn(2, 5, 7)
    mean = x.mean(2, keepdim=True)
    deviation = (x - mean).square().mean(2, keepdim=True).sqrt()
    z = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], 1) if global_context else x
    released = variant == "release"
    hidden = normed(module.tdnn.norm, single(module.tdnn.conv, z).relu()) if released else single(module.tdnn, z)
    scores = single(module.conv, hidden.tanh()).exp()
    weights = scores / scores.sum(2, keepdim=True)
    first = torch.einsum("bct,bct->bc", weights, x)
    second = torch.einsum("bct,bct->bc", weights, (x - first[..., None]) ** 2).sqrt()
    assert_near(module.weights(x), weights, 1e-12)
    assert_near(module(x), torch.cat([first, second], 1), 1e-12)


@pytest.mark.parametrize("lengths", [None, (7, 3)])
def test_equal_weights_are_plain_statistics(lengths: tuple[int, ...] | None) -> None:
    module, x = pool(), randn(2, 5, 7)
    nn.init.zeros_(module.conv.weight)
    given = None if lengths is None else torch.tensor(lengths)
    for row, length in zip(range(2), lengths or (7, 7), strict=True):
        real = x[row, :, :length]
        expected = torch.cat([real.mean(1), real.std(1, correction=0)])
        assert_near(module(x, given)[row], expected, 1e-12)


def test_padding_gets_no_weight_and_has_no_effect() -> None:
    module, x, lengths = pool(variant="release"), randn(3, 5, 9), torch.tensor([9, 4, 1])
    weights = module.weights(x, lengths)
    assert_near(weights.sum(2), torch.ones(3, 5).double(), 1e-12)
    for row, length in enumerate(lengths):
        assert not weights[row, :, length:].any()
        padded = x.clone()
        padded[row, :, length:] = math.nan
        assert_near(module(padded, lengths)[row], module(x[row : row + 1, :, :length])[0], 1e-12)


def test_a_channel_that_stands_still_has_a_gradient() -> None:
    x = torch.ones(1, 5, 4, dtype=torch.float64, requires_grad=True)
    module = pool()
    (grad,) = torch.autograd.grad(module(x).sum(), x)
    assert grad.isfinite().all()
    assert_near(module(x)[:, 5:], torch.full((1, 5), 1e-6).double(), 1e-9)


# -- the network -------------------------------------------------------------------------------------------------------


def network(**options: Any) -> ECAPATDNN:
    torch.manual_seed(0)
    sizes = {"input_dim": 6, "channels": 16, "embed_dim": 5, "scale": 4, "se": 4, "aggregate": 12}
    return shaken(ECAPATDNN(**{**sizes, "attention_channels": 4, **options}))


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_network_by_hand(variant: Any) -> None:
    net, x = network(variant=variant), randn(2, 11, 6)
    first, *blocks = net.blocks
    outputs = [tdnn(first, x.mT)]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    frames = tdnn(net.mfa, torch.cat(outputs[1:], 1))
    assert_near(net.frames(x), frames, 1e-12)
    pooled = normed(net.asp_bn, net.asp(frames))
    embedding = pooled @ net.fc.weight[..., 0].mT + net.fc.bias
    assert_near(net(x), normed(net.fc_bn, embedding) if variant == "paper" else embedding, 1e-12)
    assert isinstance(net.asp.tdnn, TDNN) == (variant == "release")
    assert (first.conv.kernel_size, first.conv.dilation) == ((5,), (1,))
    read = [[(each.conv.kernel_size, each.conv.dilation) for each in b.res2net_block.blocks] for b in blocks]
    assert read == [[((3,), (dilation,))] * 3 for dilation in (2, 3, 4)]


def test_an_example_gives_in_a_padded_batch_what_it_gives_alone() -> None:
    """Also where it ends one frame before the batch, and with its end mirrored in the batch's own padding."""
    net, x, lengths = network(), randn(6, 17, 6), torch.tensor([17, 16, 15, 13, 9, 5])
    for row, length in enumerate(lengths):
        x[row, length:] = math.nan
    together = net(x, lengths)
    for row, length in enumerate(lengths):
        assert_near(together[row : row + 1], net(x[row : row + 1, :length]), 1e-12)


def test_defaults_are_the_paper_s() -> None:
    with torch.device("meta"):
        net = ECAPATDNN()
    assert [type(block) for block in net.blocks] == [TDNN, SERes2Block1d, SERes2Block1d, SERes2Block1d]
    assert net.blocks[1].res2net_block.scale == 8
    assert net.blocks[1].se_block.conv1.out_channels == 128
    assert net.asp.conv.weight.shape == (1536, 128, 1)
    assert net.fc.weight.shape == (192, 3072, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(channels=18), "scale=4 must divide channels=18"),
        (lambda: network(dilations=()), "dilations must be one number or more"),
        (lambda: network(dilations=(2, 0)), "dilations=0"), (lambda: network(scale=1), "scale=1"),
        (lambda: network(se=0), "se=0"), (lambda: network(aggregate=0), "aggregate=0"),
        (lambda: network(variant="both"), "variant='both' must be one of"),
        (lambda: network()(torch.zeros(2, 4, 6)), r"must be frames \(B, T, F=6\) with T >= 5; got Tensor \(2, 4"),
        (lambda: network()(torch.zeros(2, 9, 5)), r"F=6"),
        (lambda: network()(randn(2, 9, 6), torch.tensor([9, 4])), "lengths must be in 5..9; got 4..9"),
        (lambda: network()(randn(2, 9, 6), torch.tensor([9, 10])), "lengths must be in 5..9; got 9..10"),
        (lambda: network()(randn(2, 9, 6), torch.tensor([9.0, 7.0])), "lengths must be whole numbers"),
        (lambda: SERes2Block1d(8, 4, scale=2)(torch.zeros(2, 8, 4)), "T >= 5"), (lambda: TDNN(3, 3, 4), "kernel=4"),
        (lambda: pool()(torch.zeros(2, 4, 9)), "C=5"), (lambda: AttentiveStatsPool(5, 0), "attention_channels=0"),
        (lambda: AAMSoftmax(4, 1), "classes=1"), (lambda: AAMSoftmax(4, 3, margin=1.6), "margin=1.6"),
        (lambda: AAMSoftmax(4, 3, scale=0.0), "scale=0.0"),
        (lambda: AAMSoftmax(4, 3)(torch.zeros(2, 5), torch.zeros(2).long()), r"embeddings must be \(B, D=4\)"),
        (lambda: AAMSoftmax(4, 3)(torch.zeros(2, 4), torch.tensor([0, 3])), "labels must be in 0..2; got 0..3"),
        (lambda: AAMSoftmax(4, 3)(torch.zeros(2, 4), torch.zeros(2)), "labels must be whole numbers"),
    ],
)  # fmt: skip
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, OptionError) or "=" in str(caught.value) or "must" in str(caught.value)


# -- the margin --------------------------------------------------------------------------------------------------------


def margin(**options: Any) -> AAMSoftmax:
    torch.manual_seed(0)
    return AAMSoftmax(4, 6, **options).double()


def test_without_a_margin_it_is_cross_entropy_of_scaled_cosines() -> None:
    loss, x, labels = margin(margin=0.0), randn(7, 4), torch.arange(7) % 6
    cosines = F.cosine_similarity(x[:, None], loss.weight[None], dim=-1)
    assert_near(loss(x, labels), F.cross_entropy(30 * cosines, labels), 1e-10)
    assert_near(loss.cosines(x), cosines, 1e-12)


def test_the_right_angle_grows_by_the_margin() -> None:
    loss, x, labels = margin(margin=0.4, scale=8.0), randn(7, 4), torch.arange(7) % 6
    angles = F.cosine_similarity(x[:, None], loss.weight[None], dim=-1).acos()
    angles[torch.arange(7), labels] += 0.4
    assert angles.max() < math.pi
    assert_near(loss(x, labels), F.cross_entropy(8 * angles.cos(), labels), 1e-10)


def test_the_loss_grows_with_the_angle_all_the_way() -> None:
    loss = AAMSoftmax(2, 2, margin=0.5).double()
    loss.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double()
    angles = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    targets = loss._with_margin(angles.cos())
    assert (targets.diff() < 0).all()
    assert_near(targets[angles < math.pi - 0.5], (angles + 0.5).cos()[angles < math.pi - 0.5], 1e-12)
    assert targets[-1] == pytest.approx(-1 - 0.5 * math.sin(0.5))


def test_gradients_are_finite_at_both_ends() -> None:
    loss = AAMSoftmax(2, 2)
    x = torch.stack([loss.weight[0].detach(), -3 * loss.weight[1].detach()]).requires_grad_()
    loss(x, torch.tensor([0, 1])).backward()
    assert x.grad is not None and loss.weight.grad is not None
    assert x.grad.isfinite().all() and loss.weight.grad.isfinite().all()


# -- what the paper claims ---------------------------------------------------------------------------------------------

SPEAKERS, FRAMES, FEATURES, RUN = 20, 60, 8, 6


def speech(seed: int, speakers: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return frames `(B, T, F)`, speakers, and which frames are voiced: a run in each half, a fifth of them.

    Voiced frames lie around a mean of the speaker, the others are louder noise. The first feature tells them apart,
    after a level is added that differs between recordings.
    """
    means = torch.randn(SPEAKERS, FEATURES, generator=torch.Generator().manual_seed(1000 + speakers))
    draw, half = torch.Generator().manual_seed(seed), FRAMES // 2
    labels = torch.arange(SPEAKERS).repeat_interleave(each)
    starts = torch.randint(0, half - RUN + 1, (len(labels), 2), generator=draw) + torch.tensor([0, half])
    behind = torch.arange(FRAMES) - starts[..., None]
    voiced = ((behind >= 0) & (behind < RUN)).any(1)
    own, noise, cue = torch.randn(3, len(labels), FRAMES, FEATURES, generator=draw)
    x = torch.where(voiced[..., None], means[labels][:, None] + 0.5 * own, 2.0 * noise)
    level = 3.0 * torch.randn(len(labels), 1, generator=draw)
    x[..., 0] = 3.0 * voiced + level + 0.3 * cue[..., 0]
    return x, labels, voiced


def equal_error_rate(embeddings: Tensor, labels: Tensor) -> float:
    """Return the rate at which as many equal pairs are taken for different ones as the other way round."""
    unit = F.normalize(embeddings, dim=-1)
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    same = (labels[first] == labels[second])[(unit @ unit.mT)[first, second].argsort(descending=True)]
    accepted, missed = (~same).cumsum(0) / (~same).sum(), 1 - same.cumsum(0) / same.sum()
    crossing = (accepted - missed).abs().argmin()
    return float((accepted + missed)[crossing] / 2)


class Pooled(nn.Module):
    """The pool between two linear maps of frames and of vectors: nothing else can tell voiced frames from others."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.asp = TDNN(FEATURES, 32), AttentiveStatsPool(32, 16, **options)
        self.norm, self.last = nn.BatchNorm1d(64), nn.Linear(64, 16)

    def frames(self, x: Tensor) -> Tensor:
        return self.first(x.mT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.asp(self.frames(x))))


def small(**options: Any) -> ECAPATDNN:
    return ECAPATDNN(FEATURES, 16, 16, dilations=(2,), scale=4, se=8, aggregate=32, attention_channels=16, **options)


@cache
def trained(make: Any, seed: int, steps: int, pooling: str = "attentive") -> Any:
    """Train a network; with pooling="plain" all frames have the same weight."""
    torch.manual_seed(seed)
    net = make(global_context=pooling != "without context")
    if pooling == "plain":
        nn.init.zeros_(net.asp.conv.weight)
        net.asp.conv.weight.requires_grad_(False)
    loss = AAMSoftmax(16, SPEAKERS)
    optimiser = torch.optim.Adam([p for p in (*net.parameters(), *loss.parameters()) if p.requires_grad], lr=5e-3)
    for step in range(steps):
        x, labels, _ = speech(10_000 * (seed + 1) + step, seed, 2)
        optimiser.zero_grad()
        loss(net(x), labels).backward()
        optimiser.step()
    return net.eval()


def error(make: Any, seeds: range, steps: int, pooling: str = "attentive") -> float:
    """Return the mean equal error rate of speakers that were trained on, in new recordings."""
    rates = []
    for seed in seeds:
        x, labels, _ = speech(77 + seed, seed, 10)
        embeddings = trained(make, seed, steps, pooling)(x).detach()
        rates.append(equal_error_rate(embeddings, labels))
    return sum(rates) / len(rates)


def test_attentive_pooling_tells_speakers_apart(claim: ClaimFixture) -> None:
    claim(
        "attentive statistics pooling verifies speakers whose voice is in a fifth of the frames: equal error rate",
        ours=error(Pooled, range(1), 120), baseline=error(Pooled, range(1), 120, "plain"), better="lower", margin=0.02,
        baseline_name="plain statistics pooling", seed=0,
    )  # fmt: skip


def test_channels_have_weights_of_their_own_and_find_the_voiced_frames() -> None:
    net = trained(Pooled, 0, 120)
    x, _, voiced = speech(77, 0, 10)
    weights = net.asp.weights(net.frames(x)).detach()
    unit = F.normalize(weights, dim=-1)
    channels = unit.shape[1]
    others = ((unit @ unit.mT).sum((1, 2)) - channels) / (channels * (channels - 1))
    assert others.mean() < 0.95
    assert (weights * voiced[:, None]).sum(2).mean() > 0.4, "twice their share of the frames"


@pytest.mark.slow
def test_attentive_pooling_over_seeds(claim: ClaimFixture) -> None:
    ours = error(Pooled, range(3), 150)
    claim(
        "attentive statistics pooling verifies speakers whose voice is in a fifth of the frames: equal error rate, mean"
        " of 3 seeds",
        ours=ours, baseline=error(Pooled, range(3), 150, "plain"), better="lower", margin=0.02,
        baseline_name="plain statistics pooling", seed=0,
    )  # fmt: skip
    claim(
        "the statistics of the whole recording do not harm the weights: equal error rate, mean of 3 seeds",
        ours=ours, baseline=error(Pooled, range(3), 150, "without context") + 0.01, better="lower",
        baseline_name="weights from single frames, plus a point", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_the_whole_network_gains_from_attentive_pooling(claim: ClaimFixture) -> None:
    claim(
        "a small ECAPA-TDNN gains from attentive statistics pooling: equal error rate, mean of 2 seeds",
        ours=error(small, range(2), 200), baseline=error(small, range(2), 200, "plain"), better="lower", margin=0.005,
        baseline_name="the same network with plain statistics pooling", seed=0,
    )  # fmt: skip
