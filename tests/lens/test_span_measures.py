"""Masses between named spans: those of whole maps, in one pass, and refused where spans make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError, OptionError
from foveate.host import apply, fused_statistics
from foveate.lens import Lens, SpanMass, span_masses
from foveate.lens.lens import look
from tests.lens.models import eager_maps, image, text, tiny
from tests.support.tensors import assert_near

SPANS = {"system": (7, 10), "question": (10, 15), "answer": (15, 24)}


def expected(w: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The mean over one span's queries of their mass on another span, `(H,)`."""
    return w[:, slice(*source), slice(*target)].sum(-1).mean(-1)


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize(
    ("kind", "padding"), [("llama", "none"), ("llama", "left"), ("mistral", "none"), ("bert", "none")]
)
def test_they_are_sums_of_maps(kind: str, padding: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.lens.span_measures._FEW", few)
    model, inputs = tiny(kind), text(padding)
    measures = span_masses(SPANS)
    seen = look(model, inputs, measures=measures)
    assert [measure.name for measure in measures][:4] == [
        "system->system", "system->question", "system->answer", "question->system",
    ]  # fmt: skip
    for layer, w in enumerate(eager_maps(model, inputs)):
        for measure in measures:
            source, target = (SPANS[name] for name in measure.name.split("->"))
            found = seen.lens.reduced(measure)[layer]
            for row in range(2):
                assert_near(found[row], expected(w[row], source, target), 1e-4, f"{measure.name}, layer {layer}")
            everywhere = w[..., slice(*target)].sum(-1)
            assert_near(seen.values(measure)[layer], everywhere, 1e-4)


def test_all_spans_share_one_pass_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.lens.span_measures._FEW", 0)
    model, calls, own = tiny("llama"), [], fused_statistics.statistics

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[2].shape[-1])
        return own(*args, **options)

    monkeypatch.setattr(fused_statistics, "statistics", counted)
    look(model, text(), measures=span_masses(SPANS), layers=[0])
    assert calls.count(3) == 1 and len(calls) == 2  # one for the log-sum-exp


def test_a_text_each_has_spans_of_its_own() -> None:
    model, inputs = tiny("llama"), text("left")
    spans = {"a": [(7, 12), (0, 5)], "b": [(12, 24), (5, 24)]}
    measure = SpanMass(spans, "a", "b")
    seen = look(model, inputs, measures=[measure])
    for layer, w in enumerate(eager_maps(model, inputs)):
        for row in range(2):
            wanted = expected(w[row], spans["b"][row], spans["a"][row])
            assert_near(seen.lens.reduced(measure)[layer][row], wanted, 1e-4)


def test_generated_tokens_are_a_span() -> None:
    model, inputs = tiny("llama"), text()
    measure = SpanMass({"text": (0, 24), "new": (24, 28)}, "text", "new")
    lens = Lens([measure], phase="all")
    with torch.no_grad(), apply(model, lens):
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    w = eager_maps(model, {"input_ids": ids[:, :-1]})[1]
    assert_near(lens.reduced(measure)[1][0], expected(w[0], (24, 28), (0, 24)), 1e-4)
    assert lens.table()[0]["measure"] == "new->text"


def test_an_image_has_spans() -> None:
    model, measure = tiny("vit"), SpanMass({"cls": (0, 1), "patches": (1, 17)}, "cls", "patches")
    seen = look(model, image(), measures=[measure])
    w = eager_maps(model, image())[0]
    assert_near(seen.lens.reduced(measure)[0], w[:, :, 1:, 0].mean(-1), 1e-4)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ({"a": (0, 5), "b": (4, 8)}, 'spans: "a"=(0, 5) and "b"=(4, 8) overlap; a token may be in one span only'),
        ({"a": [(0, 5), (0, 2)], "b": [(5, 8), (1, 8)]}, "overlap"),
        ({"a": (5, 5)}, 'spans: "a"=(5, 5) must be (start, stop) with 0 <= start < stop'),
        ({"a": (-1, 5)}, "must be (start, stop)"),
        ({"a": (0, 2.5)}, "must be (start, stop)"),
        ({}, "must have names"),
        ({"a": [(0, 1), (0, 1)], "b": [(1, 2)] * 3}, "one for each text"),
        ({"a": (20, 25)}, 'spans: "a"=(20, 25) must lie within the text, which has 24 tokens'),
        ({"a": [(0, 1)] * 3}, "spans are those of 3 texts; the call has 2"),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans: dict[str, Any], words: str) -> None:
    with pytest.raises(FoveateError) as caught:
        look(tiny("llama"), text(), measures=span_masses(spans))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_spans_are_checked() -> None:
    with pytest.raises(FoveateError, match='unknown span "questoin"; did you mean "question"?'):
        SpanMass(SPANS, "questoin")
    assert SpanMass(SPANS, "question").name == "all->question"
    assert SpanMass(SPANS, "question") == SpanMass(dict(SPANS), "question")
    with pytest.raises(OptionError, match="different names"):
        look(tiny("llama"), text(), measures=[SpanMass(SPANS, "question")] * 2)
