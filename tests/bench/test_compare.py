"""`compare`: its measurements, and its refusals before anything is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from foveate.bench import known
from foveate.bench.comparison.run import compare
from foveate.core.errors import FoveateError, OptionError, TaskError, UnknownKey, UnsupportedModel
from foveate.models.base import byte_tokenizer as bytes_
from tests.bench.conftest import write_prompts


def test_the_users_own_model_and_prompts(decoder: Path, prompts: Path, tmp_path: Path, watching: type) -> None:
    watch, out = watching(), tmp_path / "out"
    found = compare(
        model=str(decoder), task=str(prompts), methods=["sink_recent", "razor_attention", "sliding_window"], budget=0.4,
        out=out, progress=watch,
    )  # fmt: skip
    assert [row.method for row in found.rows] == ["full", "sink_recent", "razor_attention", "sliding_window"]
    full, sink, razor, window = found.rows
    assert (full.cache_kept, full.keys_read) == (1.0, 1.0) and (window.cache_kept, window.keys_read) == (1.0, 1.0)
    assert 0.3 < sink.cache_kept < 0.45 and sink.keys_read < 0.5 and razor.cache_kept < 0.45
    assert sink.options["recent"] > 4 and razor.options["heads"].endswith("of 6")
    assert all(row.prefill_ms > 0 and row.decode_ms > 0 and row.peak_mb >= row.memory_mb > 0 for row in found.rows)
    assert sink.memory_mb < full.memory_mb
    assert [a.expected for a in full.answers] == [" ab"] * 3 and len(watch.labels) == watch.total == 12
    assert json.loads((out / "results.json").read_text())["rows"][1]["method"] == "sink_recent"


def test_methods_run_interleaved(decoder: Path, prompts: Path, tmp_path: Path, watching: type) -> None:
    """All methods answer a prompt before the next one, in rotating order, each with the full cache's time."""
    watch, keys = watching(), ["full", "sink_recent", "sliding_window"]
    found = compare(model=str(decoder), task=str(prompts), methods=keys, out=tmp_path / "out", progress=watch)
    assert [watch.labels[at : at + 3] for at in (0, 3, 6)] == [keys, keys[1:] + keys[:1], keys[2:] + keys[:2]]
    full, sink, _ = found.rows
    assert [answer.base_decode_ms for answer in sink.answers] == [answer.decode_ms for answer in full.answers]
    assert [answer.base_prefill_ms for answer in sink.answers] == [answer.prefill_ms for answer in full.answers]
    ratios = sorted(a.decode_ms / a.base_decode_ms for a in sink.answers)
    assert found.paired(sink, "decode_ms") == (ratios[1], ratios[0], ratios[2])


def test_the_budget_applies_to_each_prompt(decoder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "lengths.jsonl", ["x" * 60, "y " * 250, "z" * 200])
    methods = ["sink_recent", "sliding_window"]
    found = compare(model=str(decoder), task=str(file), methods=methods, budget=0.25, out=tmp_path / "out")
    for answer in found.rows[1].answers:
        assert answer.cache_kept == pytest.approx(0.25, abs=0.02), answer.tokens
    assert [answer.tokens for answer in found.rows[1].answers] == [61, 501, 201]
    assert found.rows[1].options["recent"] == "11 to 121" and found.rows[1].options["sink"] == 4
    assert found.rows[2].options["window"] == "11 to 121"


def test_a_failed_method_is_a_row_with_its_reason(
    decoder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.kv.recycled_attention import RecycledAttention
    from foveate.kv.sink_recent import SinkRecent
    from foveate.kv.token_select import TokenSelect

    def refuse(*_: object, **__: object) -> None:
        raise OptionError("budget=0.35 leaves no room")

    monkeypatch.setattr(SinkRecent, "at_budget", refuse)
    monkeypatch.setattr(RecycledAttention, "calibrate", classmethod(refuse))
    monkeypatch.setattr(TokenSelect, "bind", lambda *_: [].pop())
    methods = ["sink_recent", "recycled_attention", "token_select", "sliding_window"]
    found = compare(model=str(decoder), task=str(prompts), methods=methods, out=tmp_path / "out")
    assert [row.error for row in found.rows] == [
        "", "budget=0.35 leaves no room", "budget=0.35 leaves no room", "IndexError: pop from empty list", "",
    ]  # fmt: skip
    assert [len(row.answers) for row in found.rows] == [3, 0, 0, 0, 3]


def test_a_failed_prompt_counts_as_a_wrong_answer(
    decoder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.kv.sink_recent import SinkRecent

    original = SinkRecent.at_budget.__func__  # type: ignore[attr-defined]

    def only_short(cls: type, budget: float, host: object, length: int) -> object:
        if length > 200:
            raise RuntimeError("out of\nmemory")
        return original(cls, budget, host, length)

    monkeypatch.setattr(SinkRecent, "at_budget", classmethod(only_short))
    file = write_prompts(tmp_path / "lengths.jsonl", ["x" * 60, "y" * 300, "z" * 100])
    settings = {"model": str(decoder), "task": str(file), "methods": ["sink_recent"], "out": tmp_path / "out"}
    row = compare(**settings).rows[1]
    assert row.error == "1 of 3 prompts: RuntimeError: out of memory"
    assert [answer.error for answer in row.answers] == ["", "RuntimeError: out of memory", ""]
    assert row.answers[1].score == 0.0 and len([a for a in row.answers if a.cache_kept > 0]) == 2
    monkeypatch.undo()
    again = compare(**settings).rows[1]  # failed prompts run again, and the others are reused
    assert again.error == "" and again.answers[0] == row.answers[0]


def test_a_prompt_past_the_context_is_refused_for_the_full_cache_only(decoder: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "long.jsonl", ["x" * 60, "y" * 900])
    found = compare(model=str(decoder), task=str(file), methods=["sink_recent"], budget=0.2, out=tmp_path / "out")
    full, sink = found.rows
    assert full.error == (
        "1 of 2 prompts: the prompt and its answer take 901 + 5 tokens; the model's context holds 768"
    )
    assert sink.error == "" and [len(row.answers) for row in found.rows] == [2, 2]
    assert math.isnan(sink.answers[1].base_prefill_ms) and sink.answers[1].prefill_ms > 0
    assert full.memory_mb > sink.memory_mb > 0  # measured on the prompt that both can read


@pytest.mark.parametrize("key", [key for key in known.methods() if key not in known.policies()])
def test_every_offered_operator_can_read_a_prompt(decoder: Path, prompts: Path, tmp_path: Path, key: str) -> None:
    settings = {"model": str(decoder), "task": str(prompts), "examples": 1, "out": tmp_path / "out"}
    rows = compare(methods=[key], **settings).rows
    assert [row.error for row in rows] == [""] * len(rows)


def test_operators_that_cannot_read_a_prompt_are_not_offered() -> None:
    assert "efficient_attention" not in known.methods()
    with pytest.raises(UnknownKey, match="efficient_attention"):
        known.check(["full", "efficient_attention"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["duo_atention"]}, UnknownKey, 'did you mean "duo_attention"'),
        ({"methods": ["sink_recent", "sink_recent"]}, OptionError, "twice"),
        ({"budget": 0.0}, OptionError, "budget"),
        ({"budget": 1.5}, OptionError, "budget"),
        ({"dtype": "float31"}, OptionError, "dtype"),
        ({"device": "warp"}, OptionError, "device"),
        ({"examples": 0}, OptionError, "examples"),
        ({"batch": 0}, OptionError, "batch"),
        ({"score": "exat"}, UnknownKey, 'did you mean "exact"'),
        ({"length": 12}, OptionError, "length"),
        ({"length": 900}, TaskError, "context holds 768"),
        ({"task": "poetry"}, TaskError, "poetry"),
        ({"task": "none.jsonl", "length": None}, TaskError, "cannot be read"),
        ({"task": "mine.jsonl", "length": 700}, OptionError, "length"),
        ({"model": "./nowhere"}, UnsupportedModel, "no folder"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_write_nothing(
    decoder: Path, tmp_path: Path, options: dict[str, object], error: type[FoveateError], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=message) as raised:
        compare(**{"model": str(decoder), "methods": ["full"], "out": out, "examples": 1, "length": 500, **options})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value) and not out.exists()


def test_encoders_and_pickles_are_refused(decoder: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    BertLMHeadModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(encoder)
    bytes_.build(768).save_pretrained(encoder)
    with pytest.raises(UnsupportedModel, match="decoder"):
        compare(model=str(encoder), out=tmp_path / "out")
    pickled = tmp_path / "pickled"
    LlamaForCausalLM.from_pretrained(decoder).config.save_pretrained(pickled)
    bytes_.build(768).save_pretrained(pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        compare(model=str(pickled), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
