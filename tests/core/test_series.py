"""Runs of a sliding window: one call of the kernel serves them all, and gives what each alone gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.call import AttentionCall
from foveate.core.engines import runs, slices
from foveate.core.selection import Blocks
from foveate.core.window_selection import window
from foveate.ops import FNA, GNA, SlidingWindow

N = 1024
CPU = torch.device("cpu")


def inputs(groups: int = 1, batch: int = 2, n: int = N, contiguous: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, 2 * groups, 8), (batch, n, 2, 8), (batch, n, 2, 8)]
    found = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    return [x.contiguous() for x in found] if contiguous else found


def count(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note the shape of the keys of each call of the kernel."""
    shapes, attend = [], F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        shapes.append(tuple(k.shape))
        return attend(q, k, v, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return shapes


def of_window(size: int) -> Blocks:
    return window(N, N, size, 0, CPU)


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "window": lambda: (SlidingWindow(200, sinks=0), {"causal": True}),
    "neighbourhood": lambda: (FNA((N,), 129), {}),
    "stride": lambda: (GNA((N,), 192, 64), {}),
    "causal neighbourhood": lambda: (FNA((N,), 100, causal=True), {}),
}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_series_is_attention_under_the_mask(
    case: str, groups: int, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, options = CASES[case]()
    q, k, v = inputs(groups, contiguous=contiguous)
    expected = op(q, k, v, engine="reference", **options)
    shapes = count(monkeypatch)
    with torch.inference_mode():
        found = op(q, k, v, engine="slices", **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert max(shape[1] for shape in shapes) >= runs.LEAST, "no series"
    assert len(shapes) < N // runs.TALL


def test_a_series_reads_fewer_keys_than_joined_tiles() -> None:
    op = FNA((N,), 128)
    q, k, v = inputs()
    chosen = op.select(q, k, False, 1.0)
    alone = sum(run.pairs for run in runs.joined(chosen, runs.TALL))
    assert slices.pairs(chosen, False) < 0.85 * alone
    planned = sum(run.pairs for series in runs.plan(chosen) for run in series)
    assert planned <= slices.pairs(chosen, False)


def test_runs_at_uneven_distances_are_no_series() -> None:
    """Each block row sees one block, at a distance that grows."""
    blocks = torch.zeros(1, 1, 16, 200, dtype=torch.bool)
    for row in range(16):
        blocks[0, 0, row, row * (row + 1) // 2] = True
    chosen = Blocks(blocks, (64, 4), N, 800)
    assert all(len(series) == 1 for series in runs.plan(chosen))
    even = torch.eye(16, dtype=torch.bool)[None, None]
    assert [len(series) for series in runs.plan(Blocks(even, (64, 50), N, 800))] == [16]


def test_runs_with_different_masks_are_no_series() -> None:
    blocks = torch.eye(16, dtype=torch.bool)[None, None]
    chosen = Blocks(blocks, (64, 64), N, N, lambda b, h, q, k: (q + k) % (2 + q // 64) == 0, torch.zeros_like(blocks))
    assert all(len(series) == 1 for series in runs.plan(chosen))
    q, k, v = inputs()
    call = AttentionCall(q, k, v, 1.0, selected=chosen)
    torch.testing.assert_close(slices.attend(call), reference(q, k, v, chosen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)])
def test_heads_or_sequences_of_their_own_are_no_series(shape: tuple[int, int]) -> None:
    """All see the same pairs, but a selection with a head or a sequence each has a mask for each."""
    blocks = torch.eye(8, dtype=torch.bool).expand(*shape, 8, 8)
    chosen = Blocks(blocks, (128, 128), N, N, lambda b, h, q, k: (q + k + h + b) % 3 > 0, torch.zeros_like(blocks))
    assert all(len(series) == 1 for series in runs.plan(chosen) + runs.untrimmed(chosen))
    q, k, v = inputs(groups=2) if shape[1] == 1 else inputs()
    found = slices.attend(AttentionCall(q, k, v, 1.0, selected=chosen))
    torch.testing.assert_close(found, reference(q, k, v, chosen), atol=1e-5, rtol=1e-5)


def test_queries_that_see_nothing_in_a_series_get_zeros() -> None:
    blocks = torch.eye(16, dtype=torch.bool)[None, None]
    chosen = Blocks(blocks, (64, 64), N, N, lambda b, h, q, k: (q % 64 > 5) & (k == k), torch.zeros_like(blocks))
    assert [len(series) for series in runs.plan(chosen)] == [16]
    q, k, v = inputs(groups=2)
    found = slices.attend(AttentionCall(q, k, v, 1.0, selected=chosen))
    torch.testing.assert_close(found, reference(q, k, v, chosen), atol=1e-5, rtol=1e-5)
    assert not found[:, :, ::64].any() and found[:, :, 6::64].abs().amin() > 0


def test_gradients_and_masks_take_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    op, mask = FNA((N,), 129), torch.rand(2, 1, 1, N, generator=torch.Generator().manual_seed(1)) > 0.1
    expected = op(q, k, v, mask=mask, engine="reference")
    shapes = count(monkeypatch)
    torch.testing.assert_close(op(q, k, v, mask=mask, engine="slices"), expected, atol=1e-5, rtol=1e-5)
    q.requires_grad_()
    op(q, k, v, engine="slices").sum().backward()
    assert {shape[:2] for shape in shapes} == {(2, 2)}


def reference(q: Tensor, k: Tensor, v: Tensor, chosen: Blocks) -> Tensor:
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = chosen.dense().expand(*q.shape[:3], k.shape[2])
    logits = (q @ keys[0].mT).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ keys[1]
