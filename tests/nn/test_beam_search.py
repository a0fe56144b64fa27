"""Beam search over tables of logits, beside a search of all sequences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from foveate.nn.parts.beam_search import BeamSearch

VOCAB, BATCH = 3, 4


def logits_of(prefixes: Tensor, example: Tensor, seed: int = 0) -> Tensor:
    """Return logits that depend on all of a prefix and on the example, by a hash."""
    code = example.clone()
    for token in prefixes.clamp(min=-1).unbind(1):
        code = (code * 31 + token + 2) % 10007
    table = torch.randn(10007, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 * table[code]


def searched(beams: int, steps: int, stop: int | None = None, seed: int = 0, dead: int | None = None):
    """Search, with the prefix of each sequence as its state; after the token `dead`, nothing is possible."""
    search = BeamSearch(BATCH, beams, torch.device("cpu"), stop)
    example = torch.arange(BATCH).repeat_interleave(beams)
    prefix = torch.zeros(BATCH * beams, 0, dtype=torch.long)
    for _ in range(steps):
        logits = logits_of(prefix, example, seed)
        if dead is not None:
            logits = logits.masked_fill((prefix == dead).any(1, keepdim=True), -math.inf)
        token, row = search.extend(logits)
        prefix = torch.cat([prefix[row], token[:, None]], 1)
        if search.is_over():
            break
    return search.best(steps)


def every(steps: int, end: int | None) -> list[tuple[int, ...]]:
    rows = itertools.product(range(VOCAB), repeat=steps)
    return sorted({row[: row.index(end) + 1] if end is not None and end in row else row for row in rows})


def total(sequence: tuple[int, ...], example: int, seed: int) -> float:
    found = 0.0
    for t, token in enumerate(sequence):
        prefix = torch.tensor([sequence[:t]], dtype=torch.long).view(1, t)
        found += logits_of(prefix, torch.tensor([example]), seed).log_softmax(-1)[0, token].item()
    return found


@pytest.mark.parametrize("end", ["none", "stop", "dead"])
def test_a_beam_as_wide_as_the_tree_is_exhaustive(end: str) -> None:
    better = 0
    for seed in range(5):
        options = {"stop": {"stop": 1}, "dead": {"dead": 1}}.get(end, {})
        tokens, log_prob = searched(VOCAB**4, 4, seed=seed, **options)
        _, greedy = searched(1, 4, seed=seed, **options)
        better += int((log_prob > greedy + 1e-9).sum())
        for b in range(BATCH):
            best = max(every(4, None if end == "none" else 1), key=lambda s, b=b, seed=seed: total(s, b, seed))
            assert tokens[b].tolist() == [*best, *[-1] * (4 - len(best))]
            assert log_prob[b].item() == pytest.approx(total(best, b, seed), abs=1e-9)
    assert better > 0, "greedy search is not enough"


def test_wider_beams_are_no_worse_here() -> None:
    found = torch.stack([searched(beams, 4)[1] for beams in (1, 3, 81)])
    assert (found.diff(dim=0) >= -1e-9).all()


def test_more_beams_than_sequences() -> None:
    """Only as many sequences as there are count; the others have probability 0."""
    tokens, log_prob = searched(50, 2)
    exhaustive = searched(9, 2)
    assert torch.equal(tokens, exhaustive[0])
    assert torch.equal(log_prob, exhaustive[1])


def test_all_that_stop_stop_early() -> None:
    search = BeamSearch(2, 1, torch.device("cpu"), stop=2)
    assert not search.is_over()
    token, row = search.extend(torch.tensor([[0.0, 0.0, 9.0]] * 2))
    assert token.tolist() == [2, 2]
    assert row.tolist() == [0, 1]
    assert search.is_over()
    assert search.best(4)[0].tolist() == [[2, -1, -1, -1]] * 2
    assert search.extend(torch.randn(2, 3))[0].tolist() == [0, 0]
    assert search.best(4)[0].tolist() == [[2, -1, -1, -1]] * 2


def test_half_precision_adds_up_in_single() -> None:
    search = BeamSearch(1, 2, torch.device("cpu"))
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    search.extend(logits)
    assert search.total.dtype == torch.float32
    assert torch.equal(search.total[0], logits[0].float().log_softmax(-1).topk(2).values)
