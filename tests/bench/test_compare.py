"""`compare`: what it measures, what it keeps when interrupted, and what it refuses before writing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from foveate.bench.compare import compare
from foveate.bench.memory import peak_bytes
from foveate.core.errors import FoveateError, OptionError, TaskError, UnknownKey, UnsupportedModel
from foveate.models import byte_tokenizer as bytes_


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random decoder with the byte tokenizer, as a checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bytes_.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=768,
        bos_token_id=bytes_.BOS, eos_token_id=bytes_.EOS, pad_token_id=bytes_.PAD,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    bytes_.build(768).save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{'word ' * 30}and the key is {n}", "answer": " ab"} for n in range(2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


class Watch:
    """Counts progress, and stops the run after some steps where asked to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.total, self.steps, self.stop_at = 0, 0, stop_at

    def start(self, total: int) -> None:
        self.total = total

    def say(self, label: str) -> None: ...

    def advance(self, label: str) -> None:
        self.steps += 1
        if self.steps == self.stop_at:
            raise KeyboardInterrupt


def test_a_persons_own_model_and_prompts(folder: Path, prompts: Path, tmp_path: Path) -> None:
    watch, out = Watch(), tmp_path / "out"
    found = compare(
        model=str(folder), task=str(prompts), methods=["sink_recent", "razor_attention", "sliding_window"], budget=0.4,
        out=out, progress=watch,
    )  # fmt: skip
    assert [row.method for row in found.rows] == ["full", "sink_recent", "razor_attention", "sliding_window"]
    full, sink, razor, window = found.rows
    assert (full.cache_kept, full.keys_read) == (1.0, 1.0) and (window.cache_kept, window.keys_read) == (1.0, 1.0)
    assert 0.3 < sink.cache_kept < 0.45 and sink.keys_read < 0.5 and razor.cache_kept < 0.45
    assert sink.options["recent"] > 4 and razor.options["heads"].endswith("of 6")
    assert all(row.prefill_ms > 0 and row.decode_ms > 0 and row.peak_mb > 0 for row in found.rows)
    assert [a.expected for a in full.answers] == [" ab", " ab"] and watch.steps == watch.total == 8
    assert json.loads((out / "results.json").read_text())["rows"][1]["method"] == "sink_recent"


def test_ctrl_c_keeps_what_is_measured_and_a_second_run_resumes(folder: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(folder),
        "methods": ["sink_recent", "sliding_window"],
        "length": 400,
        "examples": 2,
        "out": tmp_path,
    }
    with pytest.raises(KeyboardInterrupt) as stopped:
        compare(**settings, progress=Watch(stop_at=5))
    assert stopped.value.args == (2, 3)
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in kept] == ["full", "sink_recent"]
    again = Watch()
    found = compare(**settings, progress=again)
    assert again.total == 2 and [row.method for row in found.rows] == ["full", "sink_recent", "sliding_window"]
    assert found.rows[0].prefill_ms == kept[0]["prefill_ms"]
    other = Watch()
    compare(**{**settings, "budget": 0.5}, progress=other)
    assert other.total == 6  # other settings: nothing of it can be reused


def test_learnt_gates_are_kept_beside_the_results(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.kv import duo_attention

    calls = []

    def train(model: object, data: object, **options: object) -> torch.Tensor:
        calls.append(next(iter(data))[0].shape)  # type: ignore[call-overload]
        return torch.rand(3, 2)

    monkeypatch.setattr(duo_attention, "duo_train", train)
    settings = {"model": str(folder), "task": str(prompts), "methods": ["duo_attention"], "out": tmp_path}
    compare(**settings)
    compare(**settings, fresh=True)
    assert len(calls) == 1 and (tmp_path / "duo_attention.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"methods": ["duo_atention"]}, UnknownKey, 'did you mean "duo_attention"'),
        ({"methods": ["sink_recent", "sink_recent"]}, OptionError, "twice"),
        ({"budget": 0.0}, OptionError, "budget"),
        ({"budget": 1.5}, OptionError, "budget"),
        ({"dtype": "float31"}, OptionError, "dtype"),
        ({"device": "warp"}, OptionError, "device"),
        ({"examples": 0}, OptionError, "examples"),
        ({"length": 12}, OptionError, "length"),
        ({"length": 900}, TaskError, "context holds 768"),
        ({"task": "poetry"}, TaskError, "poetry"),
        ({"task": "none.jsonl", "length": None}, TaskError, "cannot be read"),
        ({"task": "mine.jsonl", "length": 700}, OptionError, "length"),
        ({"model": "./nowhere"}, UnsupportedModel, "no folder"),
    ],
)  # fmt: skip
def test_refuses_in_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, options: dict[str, object], error: type[FoveateError], says: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=says) as raised:
        compare(**{"model": str(folder), "out": out, "examples": 1, "length": 500, **options})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value) and not out.exists()


def test_refuses_encoders_and_pickles(folder: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    BertLMHeadModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(encoder)
    bytes_.build(768).save_pretrained(encoder)
    with pytest.raises(UnsupportedModel, match="decoder"):
        compare(model=str(encoder), out=tmp_path / "out")
    pickled = tmp_path / "pickled"
    LlamaForCausalLM.from_pretrained(folder).config.save_pretrained(pickled)
    bytes_.build(768).save_pretrained(pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        compare(model=str(pickled), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        a = torch.zeros(1000)
        b = a + 1  # both alive: 8,000 bytes
        del a
        c = b.view(10, 100)  # a view costs nothing
        c + 1

    assert peak_bytes(work, torch.device("cpu")) == 8000
