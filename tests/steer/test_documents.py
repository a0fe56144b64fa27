"""Prompts of documents, and the attention that the end of a prompt pays to each of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError, OptionError, UnsupportedModel
from foveate.host import Method, apply
from foveate.kv.sink_recent import SinkRecent
from foveate.steer.parts import document_attention as module
from foveate.steer.parts.document_attention import document_attention
from foveate.steer.parts.document_prompt import DocumentPrompt, PromptFormat
from foveate.steer.text.act_calibration import ActCalibration
from tests.lens.models import eager_maps, tiny
from tests.support.host_models import model as host_model
from tests.support.lab import lab

SPANS = ((3, 9), (9, 10), (12, 20))
IDS = torch.randint(2, 50, (1, 24), generator=torch.Generator().manual_seed(1))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


def by_hand(maps: list[Tensor], rows: slice, chosen: list[tuple[int, int]]) -> Tensor:
    """Average a document's summed weights over heads, then over layers."""
    layers = {layer: [head for at, head in chosen if at == layer] for layer in range(len(maps))}
    means = [
        torch.stack([maps[layer][0, heads][:, rows, start:end].sum(-1).mean() for start, end in SPANS])
        for layer, heads in layers.items()
        if heads
    ]
    return torch.stack(means).mean(0)


ALL = [(layer, head) for layer in range(2) for head in range(4)]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("chunk", [None, 5, 100])
@pytest.mark.parametrize("query", ["last", "question"])
def test_it_is_the_eager_models_attention(kind: str, chunk: int | None, query: Any) -> None:
    """Windows, soft caps and grouped heads included; a window of 6 hides the first two documents."""
    model = tiny(kind)
    expected = by_hand(eager_maps(model, {"input_ids": IDS}), slice(-1 if query == "last" else -4, None), ALL)
    got = document_attention(model, IDS, SPANS, query=query, chunk=chunk)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert 0 < float(got.sum()) <= 1


def test_layers_heads_and_lengths() -> None:
    model = tiny("llama")
    maps, last = eager_maps(model, {"input_ids": IDS}), slice(-1, None)
    some = [(0, 1), (1, 0), (1, 3)]
    got = document_attention(model, IDS, SPANS, heads=some)
    torch.testing.assert_close(got, by_hand(maps, last, some), atol=1e-6, rtol=1e-5)
    first = [(0, head) for head in range(4)]
    for layers in ([0], "shallow"):
        got = document_attention(model, IDS, SPANS, layers)  # type: ignore[arg-type]
        torch.testing.assert_close(got, by_hand(maps, last, first), atol=1e-6, rtol=1e-5)
    got = document_attention(model, IDS, SPANS, [1], some, "length")
    expected = by_hand(maps, last, some[1:]) / torch.tensor([6, 1, 8])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_only_the_rows_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[slice] = []
    weight_tile = module.weight_tile
    monkeypatch.setattr(module, "weight_tile", lambda site, some: rows.append(some) or weight_tile(site, some))
    document_attention(tiny("llama"), IDS, SPANS)
    assert rows == [slice(23, 24)] * 2
    monkeypatch.setattr(module, "TILE", 4 * 24 * 3)
    rows.clear()
    document_attention(tiny("llama"), IDS, SPANS, query="question")
    assert rows == [slice(20, 23), slice(23, 24)] * 2


def test_methods_around_the_call_count() -> None:
    """Edited weights are read; of evicted documents nothing is left; a replaced attention has no weights."""
    model, sinks = tiny("llama"), ActCalibration({0: range(4), 1: range(4)}, beta=0.0, alpha=1.0)
    before = document_attention(model, IDS, SPANS)
    with apply(model, sinks):
        assert (document_attention(model, IDS, SPANS) - before).abs().max() > 0.01
    with apply(model, SinkRecent(1, 2)):
        assert document_attention(model, IDS, SPANS, chunk=12)[:2].tolist() == [0, 0]
        assert torch.equal(document_attention(model, IDS, SPANS), before)  # tokens are dropped after the call

    class Replaces(Method):
        def attend(self, site: Any) -> Tensor:
            return torch.zeros(*site.q.shape[:3], site.v.shape[-1])

    with apply(model, Replaces()), pytest.raises(UnsupportedModel, match="replaced the attention of layer 0"):
        document_attention(model, IDS, SPANS)
    assert torch.equal(document_attention(model, IDS, SPANS), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: document_attention(m, IDS[0], SPANS), "ids must be one sequence (1, N)"),
        (lambda m: document_attention(m, IDS, []), "spans must hold at least one document"),
        (lambda m: document_attention(m, IDS, [(0, 24)]), "spans: (0, 24)"),
        (lambda m: document_attention(m, IDS, [(5, 9), (8, 10)]), "spans: (8, 10) must begin at 9 or later"),
        (lambda m: document_attention(m, IDS, SPANS, [2]), "layers: 2 must be in 0..1"),
        (lambda m: document_attention(m, IDS, SPANS, "deep"), "layers='deep' must be one of 'all', 'shallow'"),
        (lambda m: document_attention(m, IDS, SPANS, heads=[(0, 9)]), "heads: (0, 9)"),
        (lambda m: document_attention(m, IDS, SPANS, heads=[]), "none of the chosen layers attends"),
        (lambda m: document_attention(m, IDS, SPANS, normalise="mean"), "normalise='mean'"),
        (lambda m: document_attention(m, IDS, SPANS, query="all"), "query='all'"),
        (lambda m: document_attention(m, IDS, SPANS, chunk=0), "chunk=0 must be a whole number, at least 1"),
        (lambda m: document_attention(host_model("bart"), IDS, SPANS), "needs a decoder"),
        (lambda m: document_attention(host_model("bert"), IDS, SPANS), "needs a decoder"),
        (lambda m: PromptFormat(instruction=""), "instruction='' must be"),
        (lambda m: PromptFormat(document="DOCUMENT"), "document='DOCUMENT' must be a text that contains {document}"),
        (lambda m: PromptFormat(question="?"), "question='?' must be a text that contains {question}"),
    ],
)
def test_bad_calls_are_refused(make: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make(tiny("llama"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


DOCUMENTS = ["Brenda keeps bees.", "The {question} of braces.", "A third, longer, document of words."]


def chatty(chat: bool) -> Any:
    tokenizer = copy.deepcopy(lab()[1])
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@pytest.mark.parametrize("chat", [False, True])
def test_spans_are_the_documents_tokens(chat: bool) -> None:
    """Every document has the same ids at every place, and the prompt reads as the template says."""
    tokenizer, make = chatty(chat), PromptFormat(document="{number}: {document}\n")
    prompt = make(tokenizer, DOCUMENTS, "Who keeps {document}?")
    for number, (document, (start, end)) in enumerate(zip(DOCUMENTS, prompt.spans, strict=True), start=1):
        assert tokenizer.decode(prompt.ids[0, start:end]) == f"{number}: {document}\n"
    whole = tokenizer.decode(prompt.ids[0], skip_special_tokens=True)
    question = make.question.replace("{question}", "Who keeps {document}?")
    body = make.instruction + "".join(f"{i}: {document}\n" for i, document in enumerate(DOCUMENTS, start=1))
    if chat:
        assert whole == f"<user>{body}\n\n{question}</user><assistant>"
    else:
        assert whole.removeprefix(tokenizer.decode(tokenizer("").input_ids, skip_special_tokens=True)) == (
            body + question + "\nAnswer:"
        )
    backwards = make(tokenizer, DOCUMENTS[::-1], "Who keeps {document}?")
    assert backwards.ids.shape == prompt.ids.shape and not torch.equal(backwards.ids, prompt.ids)


def test_a_system_message_needs_a_template() -> None:
    prompt = PromptFormat(system="Be brief.")(chatty(True), DOCUMENTS, "Why?")
    assert chatty(True).decode(prompt.ids[0]).startswith("<system>Be brief.</system><user>")
    with pytest.raises(OptionError, match="system= needs a tokenizer with a chat template"):
        PromptFormat(system="Be brief.")(chatty(False), DOCUMENTS, "Why?")


def test_a_prompt_checks_its_spans() -> None:
    with pytest.raises(OptionError, match="spans"):
        DocumentPrompt(IDS, ((4, 4),))
