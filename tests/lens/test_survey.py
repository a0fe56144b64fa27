"""Measures over many texts: mean, spread and interval by NumPy's and SciPy's word, whatever the batches are."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.lens import Survey, look_over, next_logits
from foveate.lens.lens import look
from foveate.lens.parts.student import t_quantile
from foveate.lens.survey import surveys
from tests.lens.models import image, text, tiny
from tests.support.tensors import assert_near

NAMES = ["entropy", "sink_mass", "received_mass", "induction", "output_norm"]


def batches() -> list[dict[str, Tensor]]:
    """Six texts in three batches, of which two are padded."""
    found = [text("left", 24), text("right", 30), text("none", 40)]
    for number, inputs in enumerate(found):
        inputs["input_ids"] = (inputs["input_ids"] + 5 * number) % 9 + 2
    return found


def singles() -> list[dict[str, Tensor]]:
    """The same texts one by one, without padding."""
    each = [(inputs, row) for inputs in batches() for row in range(2)]
    return [{"input_ids": inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]} for inputs, row in each]


def by_text(model: object) -> numpy.ndarray:
    """Each text's measures from its own look: `(texts, M, L, H)`."""
    found = []
    for inputs in singles():
        rows = look(model, inputs, measures=NAMES).measures()
        found.append([[[r["value"] for r in rows if (r["measure"], r["layer"]) == (name, layer)] for layer in range(2)]
                      for name in NAMES])  # fmt: skip
    return numpy.array(found)


def test_mean_spread_and_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    model = tiny("llama")
    survey, each = look_over(model, batches(), measures=NAMES), by_text(model)
    assert survey.texts == 6 and survey.names == tuple(NAMES)
    assert_near(survey.value, torch.tensor(each.mean(0)), 1e-4)
    assert_near(survey.spread, torch.tensor(each.std(0, ddof=1)), 1e-4)
    low, high = stats.t.interval(0.9, 5, each.mean(0), stats.sem(each, axis=0))
    for ours, theirs in zip(survey.interval(0.9), (low, high), strict=True):
        assert_near(ours, torch.tensor(theirs), 2e-3)
    rows = survey.table()
    assert len(rows) == 5 * 2 * 4
    first = rows[0]
    assert (first["layer"], first["head"], first["measure"], first["texts"]) == (0, 0, "entropy", 6)
    assert first["value"] == pytest.approx(each[:, 0, 0, 0].mean(), rel=1e-3)
    assert first["spread"] == pytest.approx(each[:, 0, 0, 0].std(ddof=1), rel=1e-3)
    assert first["low"] < first["value"] < first["high"] and "entropy" in survey._repr_html_()


def test_batches_and_their_order_do_not_matter() -> None:
    model = tiny("llama")
    whole, one = look_over(model, batches(), measures=NAMES), look_over(model, singles()[::-1], measures=NAMES)
    assert_near(whole.value, one.value, 1e-4)
    assert_near(whole.spread, one.spread, 1e-4)


def test_an_earlier_survey_goes_on() -> None:
    model, given = tiny("llama"), batches()
    whole = look_over(model, given, measures=NAMES)
    half = look_over(model, given[:1], measures=NAMES)
    rest = look_over(model, given[1:], measures=NAMES, survey=half)
    for name in ("count", "mean", "squares"):
        assert torch.equal(getattr(rest, name), getattr(whole, name))
    assert [survey.texts for survey in surveys(model, given, measures=NAMES)] == [2, 4, 6]


def test_texts_without_a_value_do_not_count() -> None:
    """A text in which no token comes twice says nothing about induction."""
    model = tiny("llama")
    given = [torch.arange(2, 20)[None], torch.arange(2, 20)[None] % 5]
    survey = look_over(model, given, measures=["induction", "entropy"])
    assert survey.count[0].unique().tolist() == [1] and survey.count[1].unique().tolist() == [2]
    alone = look(model, given[1], measures=["induction"])
    assert_near(survey.value[0, 1], alone.lens.reduced("induction")[1][0].double(), 1e-5)
    assert survey.spread[0].isnan().all() and survey.spread[1].isfinite().all()
    nothing = look_over(model, given[:1], measures=["induction"])
    assert nothing.value.isnan().all() and nothing.texts == 1


def test_next_logits_are_a_measure() -> None:
    model, given = tiny("llama"), batches()
    survey = look_over(model, given, measures=["next_logit", "entropy"])
    each = torch.cat([next_logits(model, inputs).reduced() for inputs in given]).double()
    assert_near(survey.value[0], each.mean(0), 1e-5)
    alone = look_over(model, given, measures=["next_logit"])
    assert torch.equal(alone.mean[0], survey.mean[0])


def test_an_encoder_of_images_and_chosen_layers() -> None:
    model = tiny("vit")
    survey = look_over(model, [image(), image()], measures=["entropy"], layers=[1])
    assert survey.texts == 4 and survey.value[0, 0].isnan().all()
    rows = look(model, image(), measures=["entropy"], layers=[1]).measures()
    assert_near(survey.value[0, 1], torch.tensor([row["value"] for row in rows]).double(), 1e-5)


def test_sums_do_not_cancel() -> None:
    """A mean of a million leaves the spread of one exact, which sums of squares would not."""
    values = 1e8 + torch.randn(1, 1000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    survey = Survey.empty(["entropy"], 1, 1)
    for some in values.split(7, 1):
        survey = survey.with_texts(some)
    assert survey.spread.item() == pytest.approx(values.std().item(), rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 1000])
def test_quantiles_are_students(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=5e-3)
    assert t_quantile(0.025, freedom) == pytest.approx(-t_quantile(0.975, freedom), rel=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny("llama")
    survey = look_over(model, batches()[:1], measures=["entropy"])
    with pytest.raises(FoveateError, match="at least one text"):
        look_over(model, [])
    with pytest.raises(FoveateError, match="other measures"):
        look_over(model, batches(), measures=["sink_mass"], survey=survey)
    with pytest.raises(FoveateError, match='unknown measure "entorpy"'):
        look_over(model, batches(), measures=["entorpy"])
    with pytest.raises(FoveateError, match="level=1.0"):
        survey.interval(1.0)
    with pytest.raises(FoveateError, match="freedom=0"):
        t_quantile(0.9, 0)
    assert math.isclose(survey.interval(0.5)[0].nanmean().item(), survey.interval(0.5)[0].mean().item())
