"""Retrieval heads: the score of heads that are known, and what ablation of those heads takes away."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import foveate
from foveate.core.errors import FoveateError
from foveate.lens import NeedleCase, ablate, needle_span, retrieval_scores, top_heads
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support.constructed import accuracy, induction_lm, recall

SIZE = dict(layers=3, heads=4, kv_heads=4)


def cases(count: int = 6, seed: int = 0, answer: int = 3) -> tuple[Tensor, Tensor, list[NeedleCase]]:
    """Prompts whose needle is a key's values, which the model writes on from the key."""
    ids, answers = recall(count, length=64, answer=answer, away=8, distractors=2, seed=seed)
    return ids, answers, [NeedleCase(row, *needle_span(row, own)) for row, own in zip(ids, answers, strict=True)]


def copier() -> LlamaForCausalLM:
    return induction_lm(**SIZE, matching=[(1, 2)])


def test_the_head_that_copies_scores_one_and_all_others_nothing() -> None:
    _, _, some = cases(20)
    scores = retrieval_scores(copier(), some, new=3)
    assert scores[1, 2] == 1.0
    scores[1, 2] = 0.0
    assert not scores.any()
    assert top_heads(retrieval_scores(copier(), some, new=3)) == [(1, 2)]


def test_two_heads_that_copy() -> None:
    scores = retrieval_scores(induction_lm(**SIZE, matching=[(1, 0), (2, 3)]), cases()[2], new=3)
    assert top_heads(scores) == [(1, 0), (2, 3)] and scores[1, 0] == scores[2, 3] == 1.0
    assert top_heads(scores, count=1) == [(1, 0)]


def test_a_head_that_looks_and_writes_another_token_gets_nothing() -> None:
    """The model writes each value plus one: the heads look at the right place, and nothing is copied."""
    model = copier()
    model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0)
    with pytest.raises(FoveateError, match="repeats none of the 6 needles"):
        retrieval_scores(model, cases()[2], new=3)


def test_runs_that_fail_change_nothing() -> None:
    model, some = copier(), cases()[2]
    ids = some[0].ids.clone()
    ids[-1] = ids[1]  # the last token is filler: the model writes no needle
    wrong = NeedleCase(ids, some[0].start, some[0].stop)
    assert torch.equal(retrieval_scores(model, [*some, wrong], new=3), retrieval_scores(model, some, new=3))


def test_hits_are_counted_once_for_each_token_if_distinct() -> None:
    """The needle stands before the last key, so that the model writes it again and again."""
    ids = torch.randint(1, 16, (64,), generator=torch.Generator().manual_seed(0))
    ids[0], ids[-4:] = 0, torch.tensor([20, 40, 41, 20])
    case = NeedleCase(ids, 61, 63)
    every = retrieval_scores(copier(), [case], new=6, top=3)[1, 2].item()
    once = retrieval_scores(copier(), [case], new=6, top=3, distinct=True)[1, 2].item()
    assert (every, once) == (2.0, 1.0)


def test_the_needle_is_found_in_its_order_only() -> None:
    prompt = torch.tensor([9, 3, 2, 1, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 7])
    needle = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 5])
    assert needle_span(prompt, needle) == (5, 15)
    with pytest.raises(FoveateError, match="needle: no place"):
        needle_span(prompt, needle.flip(0))
    with pytest.raises(FoveateError, match="needle: no place"):
        needle_span(prompt[:4], needle)


def test_ablating_the_heads_ends_retrieval_and_others_do_not(claim: ClaimFixture) -> None:
    """The paper masks the heads with the largest scores, and as many random ones, and asks for the needle again."""
    model = induction_lm(**SIZE, matching=[(1, 2)])
    heads = top_heads(retrieval_scores(model, cases()[2], new=3))
    ids, answers, _ = cases(12, seed=1)
    others = [(2, head) for head in range(4)] + [(1, head) for head in range(4) if (1, head) not in heads]
    with foveate.apply(model, ablate(heads)):
        without = accuracy(model, ids, answers)
    kept = []
    for other in others:
        with foveate.apply(model, ablate([other])):
            kept.append(accuracy(model, ids, answers))
    claim(
        "Accuracy that is lost without the retrieval heads", ours=1.0 - without, baseline=1.0 - fmean(kept),
        better="higher", baseline_name="as many other heads, mean over each", margin=0.8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleCase(torch.arange(5), 3, 3), "start=3"),
        (lambda: NeedleCase(torch.zeros(1, 5), 0, 1), "ids must be"),
        (lambda: retrieval_scores(copier(), cases()[2], top=0), "top"),
        (lambda: retrieval_scores(copier(), cases()[2], success=2.0), "success"),
        (lambda: retrieval_scores(tiny("bert"), cases()[2]), "BertModel writes no text"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value) and "\n" not in str(caught.value)
