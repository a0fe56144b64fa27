"""`Comparison`: ratios, settings, and saving and loading results.json."""

from __future__ import annotations

import json
import math
import os
from pathlib import PurePosixPath

import pytest
import torch
from safetensors import SafetensorError

from foveate.bench.comparison.results import Answer, Comparison, Row
from foveate.bench.looking import state
from foveate.core.errors import FoveateError, OptionError
from foveate.kv.parts import calibration_store
from foveate.kv.parts.training_state import TrainingState
from foveate.lens.survey import Survey


def make_row(method: str = "full", **values) -> Row:
    numbers = dict(score=0.5, cache_kept=1.0, keys_read=1.0, prefill_ms=20.0, decode_ms=4.0)
    megabytes = dict(prompt_mb=60.0, answer_mb=64.0, peak_mb=80.0)
    answers = [Answer("where is it?", "here", "there", 0.0), Answer("2 + 2 =", "4", "4", 1.0)]
    return Row(method, method.title(), {"sink": 4}, **({"answers": answers} | numbers | megabytes | values))


def timed(*pairs: tuple[float, float]) -> list[Answer]:
    """Create answers with decoding times and the baseline's."""
    return [Answer("p", "e", "e", 1.0, decode_ms=own, base_decode_ms=base) for own, base in pairs]


def make_comparison(*rows: Row, **values) -> Comparison:
    settings = dict(model="lab/lm", task="needle", seed=0, device="cpu", dtype="float32", budgets=[0.4], examples=2)
    return Comparison(**(settings | values), length=1024, versions={"torch": "2.13"}, rows=list(rows))


def test_ratio_is_to_the_baseline():
    duo = make_row("duo", prompt_mb=32.0, answer_mb=8.0, score=0.25)
    comparison = make_comparison(make_row(), duo)
    assert comparison.ratio(duo, "memory_mb") == 0.5
    assert comparison.ratio(duo, "score") == 0.5
    assert comparison.ratio(comparison.rows[0], "peak_mb") == 1.0


def test_ratios_of_times_are_paired_prompt_by_prompt():
    """A machine that becomes ten times slower halfway does not change the ratio."""
    duo = make_row("duo", answers=timed((2, 4), (2.2, 4), (30, 60), (19, 40)), decode_ms=1000.0)
    comparison = make_comparison(make_row(), duo)
    assert comparison.paired(duo, "decode_ms") == (0.5, 0.475, 0.55)
    assert comparison.ratio(duo, "decode_ms") == 0.5
    assert comparison.ratio(duo, "prefill_ms") is None


@pytest.mark.parametrize("ratios, is_certain", [
    ([0.5, 0.5, 0.5], True), ([4.0, 6.0, 7.9], True), ([0.9, 1.0, 1.1], True), ([0.08, 0.5, 1.5], False),
    ([0.7, 1.0, 1.2], False), ([3.0, 5.0, 6.1], False),
])  # fmt: skip
def test_an_uncertain_ratio_is_withheld(ratios, is_certain):
    duo = make_row("duo", answers=timed(*[(ratio, 1.0) for ratio in ratios]))
    comparison = make_comparison(make_row(), duo)
    assert comparison.paired(duo, "decode_ms").is_certain == is_certain
    assert (comparison.ratio(duo, "decode_ms") is not None) == is_certain
    derived = json.loads(comparison.to_json())["rows"][1]["derived"]
    assert derived["withheld"] == ([] if is_certain else ["decode_ms"])
    assert derived["ratios"]["decode_ms"]["high"] == max(ratios)


def test_two_prompts_give_no_ratio_of_times():
    duo = make_row("duo", answers=timed((1, 2), (1, 2), (math.nan, 2), (1, math.nan)))
    assert make_comparison(make_row(), duo).paired(duo, "decode_ms") is None


def test_a_row_summarises_its_answers():
    answers = [
        Answer("p", "e", "e", 1.0, 9, 0.4, 0.3, 10.0, 2.0),
        Answer("p", "e", "e", 0.0, 9, 0.2, 0.1, 30.0, 4.0),
        Answer("p", "e", "", 0.0, 9, error="too long"),
    ]
    row = Row.summing("duo", "Duo", {}, answers, [1.0, 2.0, 3.0], "1 of 3 prompts: too long")
    assert (row.score, row.cache_kept, row.keys_read) == (1 / 3, pytest.approx(0.3), pytest.approx(0.2))
    assert (row.prefill_ms, row.decode_ms, row.memory_mb, row.peak_mb) == (20.0, 3.0, 2.0, 3.0)
    assert row.score_interval == pytest.approx((0.0615, 0.7923), abs=1e-4)
    failed = Row.failed("gta", "GTA", "no")
    assert math.isnan(failed.score) and failed.score_interval is None and failed.error == "no"
    assert make_comparison(failed).to_json() == Comparison.from_json(make_comparison(failed).to_json()).to_json()


def test_scores_are_grouped_as_the_benchmark_does():
    answers = [Answer("p", "e", "o", 1.0, groups="easy, short"), Answer("p", "e", "o", 0.0, groups="easy")]
    row = make_row(answers=[*answers, Answer("p", "e", "o", 0.5)])
    assert {name: found["score"] for name, found in row.by_group().items()} == {"easy": 0.5, "short": 1.0}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_ratio_is_none_without_a_usable_baseline(value):
    duo = make_row("duo")
    assert make_comparison(duo).ratio(duo, "score") is None
    assert make_comparison(make_row(score=value), duo).ratio(duo, "score") is None


def test_ratio_of_a_missing_number_is_none():
    lost = make_row("duo", peak_mb=math.nan)
    assert make_comparison(make_row(), lost).ratio(lost, "peak_mb") is None


def test_ratio_refuses_unknown_measures():
    with pytest.raises(OptionError, match='measure="title" must be one of score, '):
        make_comparison(make_row()).ratio(make_row(), "title")


def test_json_round_trip_is_lossless(tmp_path):
    numbers = dict(
        cache_kept=0.5, keys_read=0.4, prefill_ms=1.5, decode_ms=0.1, base_prefill_ms=3.0, base_decode_ms=1.0
    )
    answers = [Answer("p", "e", "o", 1 / 3, 7, **numbers, error="x")]
    row = make_row("duo", score=1 / 3, answers=answers, error="1 of 2 prompts: x")
    comparison = make_comparison(make_row(answers=answers), row, metric="loss", batch=4, digest="abc")
    assert Comparison.from_json(comparison.to_json()) == comparison
    path = comparison.save(tmp_path / "new folder" / "results.json")
    assert Comparison.load(path) == comparison


def test_any_text_survives_saving(tmp_path):
    texts = [
        "naïve ☃ 日本語",
        "</script><b>",
        'quotes " and \\',
        "nul \x00, bell \x07",
        "lone surrogate \udc80",
        "\u2028",
    ]
    row = make_row()
    row.answers[:] = [Answer(text, text, text, 1.0, error=text) for text in texts]
    comparison = make_comparison(row)
    loaded = Comparison.load(comparison.save(tmp_path / "results.json")).rows[0].answers
    assert [(answer.prompt, answer.expected, answer.output, answer.error) for answer in loaded] == [
        (text,) * 4 for text in texts
    ]


def test_non_finite_numbers_become_null_and_load_as_nan():
    row = make_row("duo", prefill_ms=math.nan, peak_mb=math.inf, score=-math.inf)
    row.options["rate"] = math.inf
    text = make_comparison(row).to_json()
    content = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert content["rows"][0]["peak_mb"] is None and content["rows"][0]["options"]["rate"] is None
    back = Comparison.from_json(text).rows[0]
    assert math.isnan(back.prefill_ms) and math.isnan(back.peak_mb) and math.isnan(back.score)


def test_options_become_plain_data():
    numpy = pytest.importorskip("numpy")
    row = make_row("duo")
    row.options.update(
        keep=numpy.float32(0.5), heads=(numpy.int64(1), True), path=PurePosixPath("/a"), nested={1: None}
    )
    options = json.loads(make_comparison(row).to_json())["rows"][0]["options"]
    assert options == {"sink": 4, "keep": 0.5, "heads": [1, True], "path": "/a", "nested": {"1": None}}


def test_settings_do_not_depend_on_the_rows():
    empty, full = make_comparison(), make_comparison(make_row())
    assert empty.settings() == full.settings()
    assert "rows" not in full.settings()
    assert Comparison.from_json(full.to_json()).settings() == full.settings()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"model": "other"}, {"budgets": [0.5]}, {"examples": 3}, {"digest": "0"}, {"metric": "exact"}],
)
def test_settings_differ_between_different_runs(change):
    assert make_comparison(**change).settings() != make_comparison().settings()


def broken(change) -> str:
    content = json.loads(make_comparison(make_row()).to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", 'not a comparison: "format" must be "foveate.comparison/3"'),
        (broken(lambda it: it.update(format="foveate.comparison/9")), "not a comparison"),
        (broken(lambda it: it.pop("seed")), "seed is missing"),
        (broken(lambda it: it.update(extra=1)), "'extra' is unknown"),
        (broken(lambda it: it.update(seed=True)), "seed must be an integer, got true"),
        (broken(lambda it: it.update(versions={"torch": 2})), "versions must be an object of texts"),
        (broken(lambda it: it.update(rows={})), "rows must be a list"),
        (broken(lambda it: it["rows"].append(3)), r"rows\[1\] must be an object, got 3"),
        (
            broken(lambda it: it["rows"][0].update(score="high")),
            r'rows\[0\].score must be a number or null, got "high"',
        ),
        (broken(lambda it: it["rows"][0].update(score=10**400)), r"rows\[0\].score is too large"),
        (broken(lambda it: it["rows"][0]["answers"][1].pop("output")), r"rows\[0\].answers\[1\].output is missing"),
    ],
)
def test_a_malformed_file_is_refused_by_its_field(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(FoveateError, match=message) as caught:
        Comparison.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_load_names_a_file_that_cannot_be_read(tmp_path):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in [(tmp_path / "none.json", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")]:
        with pytest.raises(OptionError, match=message):
            Comparison.load(path)


def test_a_full_disk_is_one_line_for_tensors_too(tmp_path, monkeypatch):
    """safetensors does not raise an OSError, and the folder of a draft may be a file."""

    def full(*_):
        raise SafetensorError("Error while serializing: No space left on device")

    def refused(call):
        with pytest.raises(OptionError, match=r"^cannot write .*tensors: .*No space left on device") as caught:
            call()
        assert "\n" not in str(caught.value)

    for module in (state, calibration_store):
        monkeypatch.setattr(module, "save_file", full)
    survey = Survey(("entropy",), *torch.zeros(3, 1, 2, 2), texts=1)
    refused(lambda: state.State(tmp_path, {}).save(survey, 1))
    parameter = torch.nn.Parameter(torch.zeros(2))
    refused(lambda: TrainingState(tmp_path / "t.safetensors", "").save(1, parameter, torch.optim.Adam([parameter])))
    refused(lambda: calibration_store.save({}, tmp_path / "c.safetensors", "model"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot write"):
        calibration_store.save({}, tmp_path / "file" / "c.safetensors", "model")


def test_a_failed_save_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = make_comparison(make_row()).save(tmp_path / "results.json")
    before = path.read_text()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OptionError, match="cannot write .*results.json: No space left on device"):
        make_comparison().save(path)
    assert path.read_text() == before
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
