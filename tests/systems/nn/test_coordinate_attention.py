"""Coordinate attention: factors of rows and columns by hand, and a value where a row and a column cross."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foveate.nn import CoordinateAttention, SqueezeExcitation, cost
from tests.support.tensors import assert_near
from tests.systems.nn import gated
from tests.systems.nn.gated import noise, normed, refused, stirred


def along(gate: CoordinateAttention, axis: int, mean: Tensor) -> Tensor:
    """Return the factors of one axis from the means along it, `(C, n)`."""

    def layer(conv: nn.Conv1d, x: Tensor) -> Tensor:
        return conv.weight[:, :, 0] @ x + (0 if conv.bias is None else conv.bias[:, None])

    hidden = normed(layer(gate.narrow, mean)[None], gate.norm)[0]
    hidden = hidden * (hidden + 3).clamp(0, 6) / 6
    return torch.sigmoid(layer(gate.widen[axis], hidden))


@pytest.mark.parametrize("bias", [True, False])
def test_by_hand_on_images(bias: bool) -> None:
    gate, x = stirred(CoordinateAttention(6, hidden=4, bias=bias)), noise(3, 6, 5, 4)
    rows, columns = gate.weights(x)
    for b in range(3):
        row_means = torch.stack([x[b, :, i].sum(-1) / 4 for i in range(5)], 1)
        column_means = torch.stack([x[b, :, :, j].sum(-1) / 5 for j in range(4)], 1)
        of_rows, of_columns = along(gate, 0, row_means), along(gate, 1, column_means)
        assert_near(rows[b], of_rows, 1e-12)
        assert_near(columns[b], of_columns, 1e-12)
        for c in range(6):
            assert_near(gate(x)[b, c], x[b, c] * torch.outer(of_rows[c], of_columns[c]), 1e-12)


def test_by_hand_on_volumes() -> None:
    gate, x = stirred(CoordinateAttention(6, hidden=4, dims=3)), noise(2, 6, 3, 2, 4)
    expected = x
    for axis, letters in enumerate(("i", "j", "k")):
        means = torch.einsum(f"bcijk->bc{letters}", x) * x.shape[2 + axis] / 24
        factors = torch.stack([along(gate, axis, mean) for mean in means])
        expected = torch.einsum(f"bcijk,bc{letters}->bcijk", expected, factors)
    assert_near(gate(x), expected, 1e-12)


def test_in_training_rows_and_columns_share_statistics() -> None:
    gate, x = CoordinateAttention(6, hidden=4).double().train(), noise(3, 6, 5, 4)
    together = torch.cat([x.mean(3), x.mean(2)], 2)
    gate(x)
    seen = gate.narrow(together).mean((0, 2))
    assert_near(gate.norm.running_mean, 0.1 * seen, 1e-12)


def test_limits() -> None:
    gate, x = stirred(CoordinateAttention(6)), noise(2, 6, 5, 3)
    for parameter in gate.widen.parameters():
        nn.init.zeros_(parameter)
    assert_near(gate(x), 0.25 * x, 1e-12)
    nn.init.constant_(gate.widen[0].bias, 50.0)
    nn.init.constant_(gate.widen[1].bias, 50.0)
    assert_near(gate(x), x, 1e-12)


def test_its_size() -> None:
    x = torch.zeros(2, 320, 6, 5)
    assert cost(CoordinateAttention(320), x) == (3 * 320 * 10 + 10 + 2 * 320 + 20, 2 * 2 * 11 * 320 * 10)
    assert cost(CoordinateAttention(320, bias=False), x).parameters == 3 * 320 * 10 + 20
    assert CoordinateAttention(64).narrow.out_channels == 8, "the width is at least 8"
    assert CoordinateAttention(64, hidden=3).narrow.out_channels == 3


def test_a_transposed_image_with_exchanged_layers() -> None:
    gate, other, x = stirred(CoordinateAttention(6)), stirred(CoordinateAttention(6)), noise(2, 6, 5, 3)
    other.widen = nn.ModuleList([gate.widen[1], gate.widen[0]])
    assert_near(other(x.mT).mT, gate(x), 1e-12)
    assert (gate(x.mT).mT - gate(x)).abs().max() > 1e-3


def test_refusals() -> None:
    assert "dims=1 must be one of 2, 3" in refused(lambda: CoordinateAttention(8, dims=1))
    assert "reduction=0" in refused(lambda: CoordinateAttention(8, 0))
    assert "hidden=0" in refused(lambda: CoordinateAttention(8, hidden=0))


# -- a place -----------------------------------------------------------------------------------------------------------


def crossing(count: int, random: torch.Generator) -> tuple[tuple[Tensor], Tensor]:
    """Draw maps with a marked row, a marked column, and a value where they cross; noise stands elsewhere."""
    value, every = torch.randn(count, 1, generator=random), torch.arange(count)
    row, column = torch.randint(0, 6, (2, count), generator=random)
    x = torch.randn(count, 3, 6, 6, generator=random)
    x[:, 1:] *= 0.3
    x[every, 0, row, column] = value[:, 0]
    x[every, 1, row, :] += 1
    x[every, 2, :, column] += 1
    return (x,), value


def left_over(make: Callable[[], nn.Module]) -> float:
    return gated.unexplained(lambda: gated.MeanOverPositions(make(), 3, 1), crossing, lr=0.1)


def test_it_finds_a_place(claim) -> None:
    claim(
        "a row and a column, each marked, point to the value where they cross: variance left over",
        ours=left_over(lambda: CoordinateAttention(3)), baseline=left_over(lambda: SqueezeExcitation(3, hidden=8)),
        better="lower", margin=0.4, baseline_name="squeeze and excitation, which knows no places", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_cnn_reads_digits(claim) -> None:
    claim(
        "a small CNN with gates behind two stages reads digits as well as without, less a point: accuracy, 2 seeds",
        ours=gated.digits_accuracy("coordinate_attention"), baseline=gated.digits_accuracy(None) - 0.01,
        better="higher", baseline_name="the CNN without gates, less a point", seed=0,
    )  # fmt: skip
