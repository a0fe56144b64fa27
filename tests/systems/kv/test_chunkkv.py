"""ChunkKV: the chunks that are kept by hand, the limits, and the spans that it keeps whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import H2O, TOVA, ChunkKV, ScorePolicy, SnapKV
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import model, padded, tokens
from tests.systems.kv.test_score_policies import kept, seen

N = 40


def snap(**options: Any) -> SnapKV:
    return SnapKV(**{"share": 0.5, "recent": 4, "pool": 1, **options})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [3, 5, 7, 11])
def test_the_best_chunks_are_kept_whole_by_all_heads(chunk: int, seed: int) -> None:
    llama, ids = model("llama"), tokens(1, N, seed)
    _, weights = seen(llama, ids)
    scores = weights[0, :, :, -4:, : N - 4].mean((1, 2)).sum(0)
    spans = [range(start, min(start + chunk, N - 4)) for start in range(0, N - 4, chunk)]
    ranked = sorted(spans, key=lambda span: -float(scores[span.start : span.stop].mean()))
    held = set(range(N - 4, N))
    for span in ranked:
        if len(held) + len(span) > N // 2:
            break
        held |= set(span)
    assert kept(llama, ids, ChunkKV(snap(), chunk=chunk))[0] == [sorted(held)] * 2


def test_chunks_of_one_token_are_the_policy_itself() -> None:
    """All heads of TOVA keep the same tokens already."""
    llama, ids = model("llama"), tokens(1, N)
    assert kept(llama, ids, ChunkKV(TOVA(share=0.4), chunk=1)) == kept(llama, ids, TOVA(share=0.4))


def test_a_chunk_that_does_not_fit_is_kept_in_part() -> None:
    for layer in kept(model("llama"), tokens(1, N), ChunkKV(snap(share=0.25), chunk=20)):
        for head in layer:
            first = set(head) - set(range(N - 4, N))
            assert len(head) == 10 and first in (set(range(6)), set(range(20, 26)))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pieces", [(40,), (13, 27), (5, 20, 15)])
def test_chunks_are_those_of_the_sequence(side: str, pieces: tuple[int, ...]) -> None:
    """Pieces of a prompt and padding do not move the limits of chunks."""
    ids, mask = padded(tokens(2, N), side, 7)
    cache, end = DynamicCache(), 0
    with torch.no_grad(), apply(model("llama"), ChunkKV(snap(recent=1, share=0.45), chunk=4)):
        for piece in pieces:
            end += piece
            model("llama")(ids[:, end - piece : end], attention_mask=mask[:, :end], past_key_values=cache)
        positions = cache.layers[0].store.padded("positions")
    for row in range(2):
        own = mask[row].cumsum(0)
        read = [int(own[end - 1]) for end in torch.tensor(pieces).cumsum(0)]
        cut = {chunk for count in read for chunk in (count // 4, (count - 1) // 4)}  # a piece ends or its newest stays
        for head in positions[row]:
            held = [(int(own[p]) - 1) // 4 for p in head.tolist() if p >= 0]
            inner = [chunk for chunk in held if chunk not in cut]
            assert inner and all(inner.count(chunk) == 4 for chunk in inner)


def right(policy: Method, ids: Tensor, answers: Tensor) -> float:
    lm = induction_lm()
    with apply(lm, policy):
        return accuracy(lm, ids, answers)


def test_answers_of_several_tokens_stay_whole(claim: ClaimFixture) -> None:
    """The question attends to the first token of its answer; the others are only attended to while answering."""
    ids, answers = recall(16, length=128, answer=8, distractors=1, away=12)
    ours = right(ChunkKV(snap(share=0.3, sink=1), chunk=16), ids, answers)
    for pool in (1, 5):
        claim(
            "chunks keep the neighbours of what the question attends to: tokens of the answer that are right",
            ours=ours, baseline=right(snap(share=0.3, sink=1, pool=pool), ids, answers), better="higher", margin=0.3,
            baseline_name=f"SnapKV, pooled over {pool}", seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("base", [H2O(share=0.3), snap(heads="adaptive")], ids=["h2o", "adaptive"])
def test_heads_share_alike(base: ScorePolicy) -> None:
    for layer in kept(model("llama"), tokens(1, N), ChunkKV(base, chunk=4)):
        assert layer[0] == layer[1] and len(layer[0]) < N


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="chunk=0"):
        ChunkKV(chunk=0)
    with pytest.raises(OptionError, match="base must be a policy that scores"):
        ChunkKV(None)  # type: ignore[arg-type]
