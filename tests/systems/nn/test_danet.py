"""Dual attention: both parts by hand, what they relate, and maps whose positions and channels repeat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import ShapeError
from foveate.nn import ChannelAttention, DualAttentionGate, PositionAttention, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, refused, stirred

SIZES = [(1,), (7,), (3, 4), (2, 3, 2)]


def positions(part: PositionAttention, x: Tensor) -> Tensor:
    """Return P(x) of one example `(C, N)`, by loops over pairs."""
    q, k, v = (layer.weight @ x + layer.bias[:, None] for layer in (part.query, part.key, part.value))
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        weights = torch.stack([(q[:, i] @ k[:, j]).exp() for j in range(x.shape[1])])
        out[:, i] = sum(w * v[:, j] for j, w in enumerate(weights / weights.sum()))
    return out


def channels(x: Tensor, scale: float) -> Tensor:
    """Return A x of one example `(C, N)`; with a scale below 0 the least similar channels weigh most."""
    out = torch.zeros_like(x)
    for c, one in enumerate(x):
        weights = torch.stack([(scale * (one * other).sum()).exp() for other in x])
        out[c] = sum(w * other for w, other in zip(weights / weights.sum(), x, strict=True))
    return out


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("size", SIZES)
def test_by_hand(variant: str, size: tuple[int, ...]) -> None:
    gate, x = stirred(DualAttentionGate(6, hidden=3, variant=variant, scale=0.3)), noise(2, 6, *size)
    alpha, beta = gate.position.strength, gate.channel.strength
    for out, first, second, example in zip(
        gate(x), gate.position(x), gate.channel(x), x.flatten(2), strict=True
    ):  # fmt: skip
        of_positions = alpha * positions(gate.position, example)
        of_channels = beta * channels(example, 0.3 if variant == "paper" else -0.3)
        assert_near(first.flatten(1), example + of_positions, 1e-12)
        assert_near(second.flatten(1), example + of_channels, 1e-12)
        assert_near(out.flatten(1), example + of_positions + of_channels, 1e-12)


def test_weights_are_those_that_are_applied() -> None:
    x = noise(2, 6, 3, 4)
    place, channel = stirred(PositionAttention(6, 2)), stirred(ChannelAttention(6))
    for weights in (place.weights(x), channel.weights(x)):
        assert_near(weights.sum(-1), torch.ones(weights.shape[:2]), 1e-12)
    values = place.value(x.flatten(2).mT)
    assert_near(place(x).flatten(2), x.flatten(2) + place.strength * (place.weights(x) @ values).mT, 1e-12)
    assert_near(channel(x).flatten(2), x.flatten(2) + channel.strength * channel.weights(x) @ x.flatten(2), 1e-12)


@pytest.mark.parametrize("cls", [DualAttentionGate, PositionAttention, ChannelAttention])
def test_it_begins_as_the_identity(cls: type) -> None:
    gate, x = cls(8).double(), noise(2, 8, 5, 3)
    assert_near(gate(x), x, 0)
    gate(x).square().sum().backward()
    for name, parameter in gate.named_parameters():
        assert (parameter.grad.abs().max() > 1e-6) == name.endswith("strength")


def test_its_size() -> None:
    x, n = torch.zeros(2, 16, 6, 5), 30
    assert cost(PositionAttention(16), x) == (2 * (16 * 2 + 2) + 16 * 16 + 16 + 1, 2 * n * (16 * 20 + n * (2 + 16)))
    assert cost(ChannelAttention(16), x) == (1, 2 * 2 * 16 * 16 * n)
    assert PositionAttention(4).query.out_features == 1
    assert DualAttentionGate(16, hidden=5).position.query.out_features == 5
    assert DualAttentionGate(16, 4).position.key.out_features == 4


def test_positions_and_channels_have_no_order() -> None:
    gate, x = stirred(DualAttentionGate(6, 2)), noise(2, 6, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_near(gate(x[..., order]), gate(x)[..., order], 1e-12)
    other, order = stirred(ChannelAttention(6)), torch.tensor([3, 1, 5, 0, 2, 4])
    assert_near(other(x[:, order]), other(x)[:, order], 1e-12)


def test_refusals() -> None:
    assert "variant='code' must be one of 'paper', 'release'" in refused(lambda: DualAttentionGate(8, variant="code"))
    assert "scale=inf must be a finite number" in refused(lambda: ChannelAttention(8, scale=float("inf")))
    assert "reduction=0" in refused(lambda: DualAttentionGate(8, 0))
    assert "hidden=0" in refused(lambda: PositionAttention(8, hidden=0))
    for part in (PositionAttention(8), ChannelAttention(8)):
        with pytest.raises(ShapeError, match="C=8 channels"):
            part.weights(torch.zeros(2, 7, 3))


# -- what repeats ------------------------------------------------------------------------------------------------------


def repeating(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw maps of 12 channels and 12 positions, of three kinds each, with noise; the target is the clean map.

    The kinds differ by map. An entry depends on the kind of its channel and that of its position alone.
    """
    table = torch.randn(count, 3, 3, generator=random)
    channel, place = torch.randint(0, 3, (2, count, 12), generator=random)
    every = torch.arange(count)[:, None, None]
    clean = 0.5 * table[every, channel[:, :, None], place[:, None]]
    return (clean + 0.4 * torch.randn(clean.shape, generator=random),), clean.mT


def left_over(make: Callable[[], nn.Module]) -> float:
    return gated.unexplained(lambda: gated.EachPosition(make(), 12, 12), repeating, steps=400)


def test_both_parts_clean_what_repeats(claim) -> None:
    ours = left_over(lambda: DualAttentionGate(12, 1))
    alone = {cls.__name__: left_over(lambda cls=cls: cls(12)) for cls in (PositionAttention, ChannelAttention)}
    name = min(alone, key=alone.__getitem__)
    claim(
        "both parts clean maps whose positions and channels repeat better than each alone: variance left over",
        ours=ours, baseline=alone[name], better="lower", margin=0.02, baseline_name=f"{name}, the better of the two",
        seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("danet", reduction=2), baseline=gated.digits_accuracy(None) - 0.01, better="higher",
        baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
