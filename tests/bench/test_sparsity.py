"""Sparse operators against dense attention: what is compared, the ideal, the error, and runs that resume."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import isnan, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from foveate.bench.parts.turns import take_turns
from foveate.bench.sparsity import captured as capturing, run as module
from foveate.bench.sparsity.captured import Inputs, captured, read
from foveate.bench.sparsity.operators import chosen_share, is_causal, made, sparse_operators
from foveate.bench.sparsity.results import RESULTS, Sparse, SparseRow
from foveate.bench.sparsity.run import sparse
from foveate.core.catalog import systems
from foveate.core.errors import Interrupted, OptionError, ShapeError, UnknownKey, UnsupportedPattern
from foveate.ops import FNA, HiP, S2Attention, SlidingWindow, Softmax
from foveate.ops.base.selective import Selective
from foveate.report import sparse as report
from foveate.tasks.parts.corpus import text

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settings(decoder: Path, tmp_path: Path) -> dict:
    return dict(lengths=[64, 96], operators=["sliding_window", "fna"], heads=2, dim=8, rounds=2, model=str(decoder),
                tokens=64, out=tmp_path / "out")  # fmt: skip


def inputs(n: int, heads: int = 2, kv_heads: int = 2, dim: int = 8) -> Inputs:
    random = torch.Generator().manual_seed(0)
    return Inputs(*(torch.randn(1, h, n, dim, generator=random) for h in (heads, kv_heads, kv_heads)))


# -- operators ---------------------------------------------------------------------------------------------------------


def test_every_operator_that_selects_is_found() -> None:
    found = sparse_operators()
    selective = {row.key for row in systems("ops") if isinstance(c := row.load(), type) and issubclass(c, Selective)}
    assert selective <= found.keys()
    assert {"sliding_window", "s2_attention", "hip", "fna", "gna"} <= found.keys()
    assert not {"softmax", "music_transformer", "lightning_attention", "titans"} & found.keys()
    assert list(sparse_operators(["gna", "hip"])) == ["gna", "hip"]
    with pytest.raises(UnknownKey, match='unknown sparse operator "sofmax"'):
        sparse_operators(["sofmax"])
    with pytest.raises(UnknownKey, match="softmax"):
        sparse_operators(["softmax"])


def test_operators_are_made_at_the_budget() -> None:
    assert made(SlidingWindow, 0.25, 256, 2, 2, 8).window == 60
    assert is_causal(SlidingWindow())
    assert not is_causal(FNA())


def test_an_operator_that_needs_sizes_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(cls: type, budget: float, length: int) -> SlidingWindow:
        raise OptionError("needs sizes")

    monkeypatch.setattr(SlidingWindow, "at_budget", classmethod(needs))
    assert made(SlidingWindow, 0.25, 256, 2, 2, 8).window == 512


def test_the_chosen_share_is_counted() -> None:
    """Of a window all rows are alike but the first ones, which see less."""
    n, size = 256, 16
    seen = sum(min(row + 1, size) for row in range(n)) / (n * (n + 1) / 2)
    assert chosen_share(SlidingWindow(size, sinks=0), *inputs(n)) == pytest.approx(seen, rel=1e-6)
    assert chosen_share(FNA((-1,), 16), *inputs(n)) == pytest.approx(16 / n)
    assert chosen_share(SlidingWindow(n, sinks=0), *inputs(n)) == 1.0
    assert chosen_share(S2Attention(block=4, local_blocks=1, stride=1), *inputs(96)) == 1.0


def test_the_chosen_share_of_long_calls_is_a_sample() -> None:
    op = SlidingWindow(64, sinks=0)
    q, k, v = inputs(2048)
    exact = op.selection(q, k, True, 1.0).density(causal=True)
    assert chosen_share(op, q, k, v) == pytest.approx(exact, rel=0.1)
    hip = HiP(keep=256)
    assert chosen_share(hip, q, k, v) == pytest.approx(hip.selection(q, k, True, 1.0).density(causal=True), rel=0.1)


def test_an_operator_without_a_selection_has_the_share_of_its_plan() -> None:
    assert chosen_share(Softmax(), *inputs(64)) == 1.0


# -- times -------------------------------------------------------------------------------------------------------------


def test_calls_take_turns_there_and_back() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    done: list[int] = []
    taken = take_turns(calls, 3, CPU, done.append)
    assert "".join(order) == "abccbaabc"
    assert done == [1, 2, 3]
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_of_times_in_the_same_round(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is ten times as slow in the second round of three; the median of ratios does not notice."""
    times = {"causal self": [4.0, 40.0, 5.0], "self": [8.0, 80.0, 8.0], "sliding_window": [2.0, 20.0, 1.0],
             "fna": [16.0, 160.0, 16.0]}  # fmt: skip
    monkeypatch.setattr(module, "take_turns", lambda calls, *rest: {name: times[name] for name in calls})
    rows = sparse(**{**settings, "lengths": [64]}).rows
    assert [row.operator for row in rows] == ["sliding_window", "fna"]
    window, fna = rows
    assert (window.speedup, window.speedup_low, window.speedup_high) == (2.0, 2.0, 5.0)
    assert (window.ms, window.dense_ms, fna.dense_ms) == (2000.0, 5000.0, 8000.0)
    assert fna.speedup == 0.5
    assert window.pattern == "causal self"
    assert fna.pattern == "self"
    assert window.ideal == pytest.approx(1 / window.chosen)
    assert window.ratio == pytest.approx(2.0 * window.chosen)


def test_an_operator_that_cannot_run_is_a_row_with_the_reason(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: SlidingWindow, *args: object) -> None:
        raise UnsupportedPattern("it has\na reason")

    monkeypatch.setattr(SlidingWindow, "select", refuses)
    fna, window = sparse(**settings).rows[1], sparse(**settings).rows[0]
    assert window.note == "it has a reason"
    assert isnan(window.speedup)
    assert fna.speedup > 0
    assert "it has a reason" in printed(sparse(**settings))


# -- errors on real tensors --------------------------------------------------------------------------------------------


def test_errors_are_relative_to_dense_attention(settings: dict, decoder: Path) -> None:
    row = sparse(**{**settings, "lengths": [64], "operators": ["sliding_window"]}).rows[0]
    real = captured(str(decoder), 64)
    op = made(SlidingWindow, module.BUDGET, 64, 4, 2, 8)
    expected = F.scaled_dot_product_attention(*real, is_causal=True, enable_gqa=True)
    assert row.error == pytest.approx(float((op(*real, causal=True) - expected).norm() / expected.norm()), rel=1e-4)
    assert 0.01 < row.error < 2


def test_an_exact_operator_has_no_error(settings: dict) -> None:
    rows = sparse(**{**settings, "budget": 1.0}).rows
    assert [row.error < 1e-5 for row in rows[:2]] == [True, True]
    assert all(isnan(row.error) for row in rows[2:]), "the model reads 64 tokens"


def test_what_is_captured_is_what_the_model_attends_with(decoder: Path) -> None:
    """Queries, keys and values give the layer's attention, as the model's own weights show."""
    real = captured(str(decoder), 40)
    assert [tuple(x.shape) for x in real] == [(3, 4, 40, 8), (3, 2, 40, 8), (3, 2, 40, 8)]
    model = AutoModelForCausalLM.from_pretrained(decoder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    ids = tokenizer(text("heldout")[:640], return_tensors="pt").input_ids[:, :40]
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    k = real.k.repeat_interleave(2, 1)
    logits = real.q @ k.transpose(2, 3) * 8**-0.5
    logits = logits.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(logits.softmax(-1), torch.cat(list(maps)), atol=1e-5, rtol=1e-4)


def test_a_model_reads_once(decoder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = captured(str(decoder), 32)
    real = capturing.capture
    monkeypatch.setattr(capturing, "capture", lambda *_: pytest.fail("it reads again"))
    for ours, theirs in zip(first, captured(str(decoder), 32), strict=True):
        assert torch.equal(ours, theirs)
    (file,) = (cache / "captured").iterdir()
    file.write_bytes(b"damaged")
    monkeypatch.setattr(capturing, "capture", real)
    said: list[str] = []
    assert torch.equal(captured(str(decoder), 32, said.append).q, first.q)
    assert any("is damaged" in line for line in said)
    assert captured(str(decoder), 24).q.shape[2] == 24
    assert len(list((cache / "captured").iterdir())) == 2


def test_a_short_context_is_read_whole(decoder: Path) -> None:
    assert captured(str(decoder), 10_000).q.shape[2] == 768


def test_layers_with_full_attention_are_read() -> None:
    class Config:
        num_hidden_layers = 8
        layer_types = ["sliding_attention", "full_attention"] * 4

    assert capturing._layers(Config()) == [3, 5, 7]
    Config.layer_types = None
    assert capturing._layers(Config()) == [2, 4, 6]
    Config.num_hidden_layers = 1
    assert capturing._layers(Config()) == [0]


def test_a_file_of_inputs_serves_times_and_errors(settings: dict, tmp_path: Path) -> None:
    given = inputs(96, heads=4, dim=16)
    save_file(given._asdict(), tmp_path / "qkv.safetensors")
    found = sparse(**{**settings, "inputs": tmp_path / "qkv.safetensors", "model": "nobody"})
    assert [isnan(row.error) for row in found.rows] == [False] * 4
    with pytest.raises(OptionError, match="lengths=128 is longer than the inputs of 96 tokens"):
        sparse(**{**settings, "inputs": tmp_path / "qkv.safetensors", "lengths": [128], "fresh": True})


def test_wrong_files_of_inputs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(OptionError, match="cannot be read as safetensors"):
        read(path)
    save_file({"q": torch.zeros(1, 1, 4, 4)}, path)
    with pytest.raises(OptionError, match="has no tensor k, v; it needs q, k and v"):
        read(path)
    good = inputs(4)._asdict()
    for name, shape in (("k", (1, 2, 5, 8)), ("q", (1, 3, 4, 8)), ("v", (2, 4, 8)), ("q", (1, 2, 4, 9))):
        save_file({**good, name: torch.zeros(shape)}, path)
        with pytest.raises(ShapeError, match=r"must hold q \(B, Hq, N, D\)"):
            read(path)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_resumes(settings: dict, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    first = sparse(**{**settings, "lengths": [64], "operators": ["fna"]})
    both = sparse(**settings, progress=lambda *at: steps.append(at))
    assert [(row.operator, row.length) for row in both.rows] == [
        ("sliding_window", 64), ("fna", 64), ("sliding_window", 96), ("fna", 96)
    ]  # fmt: skip
    assert both.rows[1] == first.rows[0]
    assert steps[0] == (0, 6, "64 tokens, round 0")
    assert steps[-1] == (5, 6, "96 tokens, round 2")
    kept = json.loads((settings["out"] / RESULTS).read_text())
    assert kept["settings"]["threads"] == torch.get_num_threads()
    assert kept["rows"][0]["ratio"] == pytest.approx(first.rows[0].ratio)
    assert sparse(**settings).rows == both.rows, "nothing is measured again"
    with pytest.raises(OptionError, match=r"other settings \(heads was 2, is 4\); --fresh replaces them"):
        sparse(**{**settings, "heads": 4})
    again = sparse(**{**settings, "heads": 4, "lengths": [64]}, fresh=True)
    assert len(Sparse.load(settings["out"] / RESULTS).rows) == len(again.rows) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"format": "foveate.sparse/0"}', '{"format": "foveate.sparse/1"}'])
def test_results_that_cannot_be_read_are_replaced_on_demand(settings: dict, content: str) -> None:
    settings["out"].mkdir()
    (settings["out"] / RESULTS).write_text(content)
    with pytest.raises(OptionError, match=r"sparse.json cannot be read .*; --fresh replaces it"):
        sparse(**settings)
    assert (settings["out"] / RESULTS).read_text() == content


def test_an_interrupt_keeps_finished_lengths(settings: dict) -> None:
    def watch(step: int, steps: int, note: str) -> None:
        if step > 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        sparse(**settings, progress=watch)
    assert (stopped.value.done, stopped.value.total) == (2, 4)
    assert len(Sparse.load(settings["out"] / RESULTS).rows) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": []}, "lengths must hold at least one"),
        ({"lengths": [0]}, "lengths=0"),
        ({"budget": 0.0}, "budget=0.0 must be above 0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"rounds": 0}, "rounds=0"),
        ({"threads": 0}, "threads=0"),
        ({"heads": 0}, "heads=0"),
        ({"dtype": "float8"}, "dtype="),
        ({"device": "nowhere"}, "device='nowhere' is not usable"),
    ],
)
def test_wrong_options_are_refused_before_work(settings: dict, given: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        sparse(**{**settings, **given, "progress": lambda *at: pytest.fail("it runs")})
    assert not settings["out"].exists()


def test_threads_are_restored(settings: dict) -> None:
    before = torch.get_num_threads()
    found = sparse(**{**settings, "lengths": [64], "threads": 2})
    assert found.settings["threads"] == 2
    assert torch.get_num_threads() == before


# -- reports -----------------------------------------------------------------------------------------------------------

ROW = SparseRow("hip", 1024, "causal self", "gather", 0.125, 2.0, 3.0, 1.5, 1.4, 1.6, 8.0, 0.25)


def printed(found: Sparse) -> str:
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as shown:
        console.print(report.table(found))
    return shown.get()


def test_the_table_has_losses_too() -> None:
    rows = [ROW, replace(ROW, length=2048, speedup=0.5, error=nan)]
    shown = printed(Sparse({}, rows))
    assert "1.50×" in shown
    assert "1.40–1.60" in shown
    assert "0.19" in shown
    assert "0.250" in shown
    assert "0.50×" in shown
    assert "Dense attention is faster in 1 of 2 rows." in shown


def test_results_and_plot_survive_a_file(tmp_path: Path) -> None:
    found = Sparse({"heads": 2}, [ROW, replace(ROW, length=2048), replace(ROW, operator="<b>", note="no", speedup=nan)])
    found.save(tmp_path)
    read_again = Sparse.load(tmp_path / RESULTS)
    assert [asdict(row) for row in read_again.rows[:2]] == [asdict(row) for row in found.rows[:2]]
    assert isnan(read_again.rows[2].speedup)
    drawing = report.plot(found, tmp_path / "sparse.svg").read_text()
    assert drawing.startswith("<svg")
    assert "&lt;b&gt;" in drawing
    assert "hip" in drawing
    assert ">ideal<" in drawing
    assert "predicted" not in drawing
