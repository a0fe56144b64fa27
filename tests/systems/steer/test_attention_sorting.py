"""Attention sorting: exact limits, and the paper's claim on a recall model with a preference for what is near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from foveate.core.errors import FoveateError
from foveate.steer.parts.document_prompt import DocumentPrompt, PromptFormat
from foveate.steer.text import attention_sorting as module
from foveate.steer.text.attention_sorting import AttentionSorting, by_attention, recency_profile
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support.constructed import BOS, FILLER, HEAD, KEYS, ONE, PREVIOUS, VALUES, induction_lm
from tests.support.lab import lab

Patch = pytest.MonkeyPatch
COUNT, LENGTH = 20, 12
#: Logits that the key's own match is worth, by key, and those that 240 tokens of distance cost.
MATCH, DISTANCE = (6.0, 9.0), 9.0


def recency_lm() -> LlamaForCausalLM:
    """Build a model that recalls the value behind a key, and whose logits fall with distance, as ALiBi's do.

    In the head that matches, a pair of channels which turns by a thousandth of a radian a token adds -sin(distance).
    """
    lm, head, slow = induction_lm(), 0, 4
    attention, turn, half = lm.model.layers[1].self_attn, 1e-3, HEAD // 2
    with torch.no_grad():
        attention.q_proj.weight[head * HEAD + slow, ONE] = DISTANCE / (COUNT * LENGTH * turn)
        attention.k_proj.weight[head * HEAD + half + slow, ONE] = -(HEAD**0.5)
        keys = attention.k_proj.weight[head * HEAD : (head + 1) * HEAD, PREVIOUS + KEYS.start : PREVIOUS + KEYS.stop]
        keys *= torch.linspace(*MATCH, len(KEYS)) / 30.0  # 30 is a match's worth in the model as it comes
    return lm


def build(_: None, documents: Sequence[Tensor], question: Tensor) -> DocumentPrompt:
    """Build a prompt of ids: a start, the documents, and a question."""
    ends = 1 + torch.tensor([0, *(len(x) for x in documents)]).cumsum(0)
    spans = tuple(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    return DocumentPrompt(torch.cat([torch.tensor([BOS]), *documents, question])[None], spans)


def library(seed: int) -> tuple[list[Tensor], Tensor, int]:
    """Draw documents of fillers, of which the first holds the key and its value; return them, question and value."""
    draw = torch.Generator().manual_seed(seed)
    documents = list(torch.randint(FILLER.start, FILLER.stop, (COUNT, LENGTH), generator=draw))
    key = int(torch.randint(KEYS.start, KEYS.stop, (), generator=draw))
    values = VALUES.start + torch.randperm(len(VALUES), generator=draw)
    place = 1 + int(torch.randint(LENGTH - 3, (), generator=draw))
    documents[0][place : place + 2] = torch.tensor([key, int(values[0])])
    for document, value in zip(documents[1:], values[1:], strict=False):  # other values, without a key
        document[place] = value
    return documents, torch.tensor([FILLER.start, key]), int(values[0])


@torch.no_grad()
def read(lm: LlamaForCausalLM, sorting: AttentionSorting, seed: int, place: int = 0) -> tuple[bool, int]:
    """Return whether the answer from the sorted prompt is right, and the true document's final place."""
    documents, question, value = library(seed)
    documents.insert(place, documents.pop(0))
    found = sorting.sort(lm, None, documents, question)
    return int(lm(found.prompt.ids).logits[0, -1].argmax()) == value, found.order.index(place)


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    return recency_lm()


# -- exact limits ------------------------------------------------------------------------------------------------------


def test_no_rounds_keep_the_order(lm: LlamaForCausalLM) -> None:
    documents, question, _ = library(0)
    found = AttentionSorting(0, build=build).sort(lm, None, documents, question)
    assert found.order == tuple(range(COUNT)) and found.orders == () and found.scores.shape == (0, COUNT)
    assert torch.equal(found.prompt.ids, build(None, documents, question).ids)


def test_uniform_attention_keeps_the_order_of_equally_long_documents() -> None:
    uniform = tiny("llama")
    for parameter in uniform.parameters():
        parameter.data.zero_()
    documents, question, _ = library(0)
    found = AttentionSorting(3, build=build).sort(uniform, None, documents, question)
    assert found.order == tuple(range(COUNT)) and len(found.orders) == 1  # a round that changes nothing is the last
    longer = [torch.cat([documents[0]] * 2), *documents[1:]]
    assert AttentionSorting(1, build=build).order(uniform, None, longer, question)[-1] == 0
    by_token = AttentionSorting(1, normalise="length", build=build).sort(uniform, None, longer, question).scores
    torch.testing.assert_close(by_token, torch.full((1, COUNT), 1 / (3 + LENGTH * (COUNT + 1))))


@pytest.mark.parametrize("best", ["last", "first"])
def test_one_round_is_an_argsort(best: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.3])
    monkeypatch.setattr(module, "document_attention", lambda *given, **options: scores)
    documents = list(torch.arange(10).view(5, 2))
    order = AttentionSorting(1, best, build=build).order(None, None, documents, torch.tensor([1]))
    ascending = np.argsort(scores.numpy(), kind="stable").tolist()
    assert order == (ascending if best == "last" else np.argsort(-scores.numpy(), kind="stable").tolist())
    for k in (1, 3, 9):
        some = AttentionSorting(1, best, k, build=build).sort(None, None, documents, torch.tensor([1]))
        assert list(some.order) == (order[-k:] if best == "last" else order[:k])
        assert len(some.prompt.spans) == min(k, 5)


def test_rounds_read_the_prompt_that_the_last_one_made(lm: LlamaForCausalLM) -> None:
    documents, question, _ = library(3)
    found = AttentionSorting(3, build=build).sort(lm, None, documents, question)
    assert found.orders[0] == tuple(range(COUNT)) and len(found.orders) == found.scores.shape[0]
    for order, scores, after in zip(found.orders, found.scores, [*found.orders[1:], found.order], strict=True):
        own = scores[list(order)]
        assert [order[place] for place in by_attention(own)] == list(after)
        prompt = build(None, [documents[number] for number in order], question)
        torch.testing.assert_close(own, module.document_attention(lm, prompt.ids, prompt.spans))


# -- what the paper claims ---------------------------------------------------------------------------------------------


def test_sorting_finds_an_early_document(lm: LlamaForCausalLM, claim: ClaimFixture) -> None:
    share, place = {}, {}
    for rounds in (0, 1, 3):
        results = [read(lm, AttentionSorting(rounds, build=build), seed) for seed in range(40)]
        share[rounds], place[rounds] = (sum(column) / 40 for column in zip(*results, strict=True))
    assert share[0] <= share[1] <= share[3]
    assert place[0] < place[1] < place[3] and place[3] >= 0.75 * COUNT
    claim(
        "three rounds let a model that prefers near text answer from the first of 20 documents: share of right answers",
        ours=share[3],
        baseline=share[0],
        better="higher",
        margin=0.3,
        baseline_name="the documents as they come",
        seed=0,
    )


def test_sorting_needs_the_attention(lm: LlamaForCausalLM, claim: ClaimFixture, monkeypatch: Patch) -> None:
    """The true document comes at every place equally often; shuffled scores move it to any, and nothing is gained."""
    cases = [(seed, place) for seed in range(10) for place in range(COUNT)]

    def share(sorting: AttentionSorting) -> float:
        return sum(read(lm, sorting, seed, place)[0] for seed, place in cases) / len(cases)

    plain, ours = share(AttentionSorting(0, build=build)), share(AttentionSorting(1, build=build))
    draw, real = torch.Generator().manual_seed(0), module.document_attention

    def shuffled(*given: Any, **options: Any) -> Tensor:
        scores = real(*given, **options)
        return scores[torch.randperm(len(scores), generator=draw)]

    monkeypatch.setattr(module, "document_attention", shuffled)
    control = share(AttentionSorting(1, build=build))
    assert abs(control - plain) < 0.05
    claim(
        "one round raises the share of right answers where the true document stands anywhere; shuffled scores do not",
        ours=ours, baseline=max(plain, control), better="higher", margin=0.2,
        baseline_name="no sorting, or sorting by shuffled scores", seed=0,
    )  # fmt: skip


def test_a_relevant_document_gets_more_at_every_place(lm: LlamaForCausalLM) -> None:
    """The two facts that sorting rests on: recency, and relevance at the same place."""
    attention, places = [], torch.arange(0, COUNT, 3)
    for place in places.tolist():
        documents, question, _ = library(1)
        documents.insert(place, documents.pop(0))
        prompt = build(None, documents, question)
        attention.append(module.document_attention(lm, prompt.ids, prompt.spans))
    relevant, others = recency_profile(torch.stack(attention), places)
    assert bool((relevant[places] > others[places]).all()) and bool((others.diff() > 0).all())
    assert bool(relevant.isnan()[torch.tensor([1, 2, 4])].all())
    assert bool((relevant[places].diff() > 0).all())


# -- words -------------------------------------------------------------------------------------------------------------


def test_it_takes_a_model_a_tokenizer_and_texts() -> None:
    model, tokenizer = lab()
    texts = ["The pass key of Ada is 31415.", "The pass key of Bea is 92653.", "Bees live in hives."]
    sorting = AttentionSorting(2, build=PromptFormat(answer="\nThe pass key of Ada is"))
    order = sorting.order(model, tokenizer, texts, "What is the pass key of Ada?")
    assert sorted(order) == [0, 1, 2]
    found = sorting.sort(model, tokenizer, texts, "What is the pass key of Ada?")
    ids = found.prompt.ids
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    answer = sorting.answer(model, tokenizer, texts, "What is the pass key of Ada?", 8)
    assert answer == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionSorting(-1), "rounds=-1 must be a whole number, at least 0"),
        (lambda: AttentionSorting(best="middle"), "best='middle' must be one of 'last', 'first'"),
        (lambda: AttentionSorting(top_k=0), "top_k=0 must be a whole number, at least 1"),
        (lambda: AttentionSorting(chunk=1.5), "chunk=1.5 must be a whole number, at least 1"),
        (lambda: AttentionSorting(normalise="z"), "normalise='z' must be one of"),
        (lambda: AttentionSorting(heads=3), "heads must be a table"),
        (lambda: AttentionSorting(layers=3), "layers=3 must be"),
        (lambda: AttentionSorting(build="{document}"), "build='{document}' must be a PromptFormat"),
        (lambda: AttentionSorting().order(None, None, [], "?"), "documents must be a list of at least one"),
        (lambda: AttentionSorting().order(None, None, "text", "?"), "documents must be a list of at least one"),
        (
            lambda: AttentionSorting(build=lambda *_: build(None, [torch.arange(4)], torch.arange(2))).order(
                None, None, ["a", "b"], "?"
            ),
            "build must return a span for each of 2 documents; got 1",
        ),
        (lambda: recency_profile(torch.zeros(2, 3), torch.zeros(3)), "relevant (prompts,)"),
    ],
)
def test_bad_calls_are_refused(make: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
