"""Merged partial softmax attentions, in any order and grouping, equal attention to all keys at once."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from foveate.core import online_softmax
from tests.support.tensors import assert_near


def tiles(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 12, generator=random, dtype=torch.float64) * 30
    logits[:, 0, :4] = float("-inf")  # this row sees nothing in this tile
    logits[:, 1] = float("-inf")  # this row sees nothing at all
    return logits, torch.randn(2, 12, 3, generator=random, dtype=torch.float64)


def parts() -> list[online_softmax.Partial]:
    logits, values = tiles()
    return [online_softmax.partial(logits[..., i : i + 4], values[:, i : i + 4]) for i in (0, 4, 8)]


def test_merging_is_commutative_and_associative() -> None:
    whole = online_softmax.partial(*tiles())
    for a, b, c in itertools.permutations(parts()):
        for merged in (
            online_softmax.merge(online_softmax.merge(a, b), c),
            online_softmax.merge(a, online_softmax.merge(b, c)),
        ):
            assert torch.equal(merged.top, whole.top)
            assert_near(merged.total, whole.total, 1e-10)
            assert_near(online_softmax.finish(merged), online_softmax.finish(whole), 1e-10)
            assert_near(online_softmax.log_sum_exp(merged)[:, 2:], torch.logsumexp(tiles()[0], -1)[:, 2:], 1e-10)


def test_it_is_a_softmax() -> None:
    logits, values = tiles()
    expected = torch.softmax(logits, -1).nan_to_num(0.0) @ values
    assert_near(online_softmax.finish(online_softmax.partial(logits, values)), expected, 1e-12)


def test_rows_that_saw_nothing_are_zeros_also_in_the_gradient() -> None:
    logits, values = (x.requires_grad_() for x in tiles())
    pieces = [online_softmax.partial(logits[..., i : i + 4], values[:, i : i + 4]) for i in (0, 4, 8)]
    out = online_softmax.finish(online_softmax.merge(online_softmax.merge(*pieces[:2]), pieces[2]))
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    assert (online_softmax.log_sum_exp(pieces[0])[:, 0] == float("-inf")).all()
    for grad in torch.autograd.grad(out.square().sum(), (logits, values)):
        assert grad.isfinite().all()


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.zeros(1, 1, 4096, dtype=torch.bfloat16)
    values = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    part = None
    for i in range(0, 4096, 8):
        new = online_softmax.partial(logits[..., i : i + 8], values[:, i : i + 8])
        part = new if part is None else online_softmax.merge(part, new)
    assert part.total.item() == 4096, "bfloat16 itself stops counting at 256"
    assert online_softmax.finish(part).item() == 1.0
