"""The reference run on the lab model: a shared prefill changes no answer, and known results are reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foveate.bench.known import FULL, LAST, PACKED, SHARING_ALL_BUT_LAST, own_tokens
from foveate.bench.methods import Contender
from foveate.bench.policies import answers, calibrate, losses, shared_prefill, times
from foveate.bench.policies.plan import Plan, policies, quick, whole
from foveate.bench.policies.run import JOURNAL, RESULTS, run
from foveate.bench.policies.shared_prefill import copy_cache, decode, live_bytes, prefill
from foveate.cli import app
from foveate.core.catalog import system
from foveate.core.errors import FoveateError
from foveate.host import apply
from foveate.labs import LABS
from foveate.report import policies as report
from foveate.tasks.text.ruler import kind
from tests.support.lab import lab, lab_gates, lab_host

TINY = Plan(
    ("sink_recent", "razor_attention"), budgets=(0.3,), tasks=("niah_multikey",), examples=3, characters=900, batch=2,
    losses=(160,), texts=2, horizon=6, times=(128,), rounds=2, steps=3,
)  # fmt: skip


class Watch:
    """Counts progress, and interrupts the run after `stop_at` steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.labels: list[str] = []
        self.total, self.stop_at = 0, stop_at

    def start(self, total: int) -> None:
        self.total += total

    def advance(self, label: str) -> None:
        self.labels.append(label)
        if len(self.labels) == self.stop_at:
            raise KeyboardInterrupt

    def say(self, label: str) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the lab to a folder, so that nothing is written into the package."""
    to = tmp_path_factory.mktemp("models") / "lab"
    shutil.copytree(LABS["lm"].path, to)
    (to / "duo_attention.safetensors").unlink()
    return to


@pytest.fixture(scope="module", autouse=True)
def short_probe() -> Iterator[None]:
    """Shorten RazorAttention's probe, which is enough for the lab."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "PROBE", 48)
        yield


@pytest.fixture(scope="module")
def found(folder: Path, short_probe: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("out")
    watch = Watch()
    result = run([str(folder)], TINY, out, watch)
    assert len(watch.labels) == watch.total
    return result, out


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of rows of each `decode` call."""
    seen: list[int] = []
    original = shared_prefill.decode

    def counted(model: Any, methods: Any, prefilled: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(prefilled.ids))
        return original(model, methods, prefilled, *args, **kwargs)

    for module in ("answers", "losses", "times"):
        monkeypatch.setattr(f"foveate.bench.policies.{module}.decode", counted)
    return seen


def prompts(count: int = 3, length: int = 900) -> torch.Tensor:
    _, tokenizer = lab()
    return torch.cat(
        [tokenizer(e.prompt, return_tensors="pt").input_ids for e in kind("niah_multikey", length, count).examples()]
    )


@pytest.mark.parametrize("key", ["full", "sink_recent", "duo_attention", "razor_attention", "recycled_attention"])
def test_a_shared_prefill_changes_no_answer(key: str) -> None:
    model, _ = lab()
    ids, new = prompts(), 7
    contender = Contender(key, lab_host(), 0.3)
    contender.calibrate(lambda cls, key: {"gates": lab_gates()} if key == "duo_attention" else {})
    decoded = decode(model, contender.at(ids.shape[1]), prefill(model, ids), new)
    with torch.no_grad(), apply(model, *contender.at(ids.shape[1])) as alone:
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    assert torch.equal(decoded.ids, whole[:, ids.shape[1] :])
    assert decoded.kept == pytest.approx(alone.stats.kept, abs=1e-3)
    assert decoded.losses is None and len(decoded.seconds) == new


@pytest.mark.parametrize("key", [*SHARING_ALL_BUT_LAST, "h2o"])
def test_a_policy_that_scores_by_the_prompt_reads_what_it_needs_itself(key: str) -> None:
    """After a prefill up to the last token it would see one query alone, and keep everything or choose blindly."""
    assert own_tokens(key) == (None if key == "h2o" else LAST)
    model, _ = lab()
    ids, new = prompts(2), 5
    contender = Contender(key, lab_host(), max(0.3, system(key).load().least(lab_host(), ids.shape[1])))
    contender.calibrate(lambda cls, key: cls.calibrate(lab_host(), iter([(ids, torch.zeros_like(ids).bool())])))
    decoded = decode(model, contender.at(ids.shape[1]), prefill(model, ids), new, own=own_tokens(key))
    with torch.no_grad(), apply(model, *contender.at(ids.shape[1])) as alone:
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    assert torch.equal(decoded.ids, whole[:, ids.shape[1] :])
    assert (decoded.kept, decoded.read) == pytest.approx((alone.stats.kept, alone.stats.read), abs=1e-3)


@pytest.mark.parametrize("key", ["snapkv", "h2o"])
def test_a_row_of_a_policy_that_scores_by_the_prompt(key: str, folder: Path, tmp_path: Path) -> None:
    plan = replace(TINY, methods=(key,), examples=2, rounds=1)
    full, _, row = run([str(folder)], plan, tmp_path, Watch())["models"][0]["rows"]
    assert row["kept"] == pytest.approx(0.3, abs=0.02) and row["read"] == pytest.approx(0.3, abs=0.05)
    own, base = (each["times"]["128"]["decode_cache_mb"] for each in (row, full))
    assert own < 0.5 * base, "the cache of the timed prompt is compressed too"


def test_forced_losses_are_the_models_own() -> None:
    model, _ = lab()
    ids = prompts(2)
    cut = ids.shape[1] - 9
    decoded = decode(model, (), prefill(model, ids[:, :cut]), 9, ids[:, cut:])
    with torch.no_grad():
        logits = model(ids).logits[:, cut - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, cut:].flatten(), reduction="none")
    torch.testing.assert_close(decoded.losses.flatten(), expected, rtol=1e-3, atol=1e-4)
    assert (decoded.kept, decoded.read) == (1.0, 1.0)


def test_a_prefill_serves_many_policies() -> None:
    model, _ = lab()
    prefilled = prefill(model, prompts(1))
    before = [layer.keys.clone() for layer in prefilled.cache.layers]
    contender = Contender("sink_recent", lab_host(), 0.3)
    first = decode(model, contender.at(900), prefilled, 4)
    again = decode(model, contender.at(900), prefilled, 4)
    assert torch.equal(first.ids, again.ids)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefilled.cache.layers, before, strict=True))
    own = copy_cache(prefilled.cache)
    own.layers[0].keys.zero_()
    assert torch.equal(prefilled.cache.layers[0].keys, before[0])


def test_reads_are_counted_after_the_prompt() -> None:
    model, _ = lab()
    contender = Contender("sink_recent", lab_host(), 0.25)
    decoded = decode(model, contender.at(900), prefill(model, prompts(1)), 4)
    assert 0.24 < decoded.kept < 0.27 and 0.24 < decoded.read < 0.27


def test_live_memory_counts_tensors() -> None:
    device = torch.device("cpu")
    before = live_bytes(device)
    kept = torch.zeros(1000, 256)
    views = [kept[i] for i in range(10)]
    freed = torch.zeros(1000, 256)
    del freed
    assert live_bytes(device) - before == 1000 * 256 * 4
    del kept
    assert live_bytes(device) - before == 1000 * 256 * 4, "a view keeps its whole storage"
    del views
    assert live_bytes(device) == before


def test_every_figure_is_present(found: tuple[dict[str, Any], Path]) -> None:
    result, out = found
    assert json.loads((out / RESULTS).read_text()) == json.loads(json.dumps(result))
    (model,) = result["models"]
    assert (model["layers"], model["kv_heads"], model["type"]) == (4, 4, "llama")
    full, packed, sink, razor = model["rows"]
    assert [row["method"] for row in model["rows"]] == [FULL, PACKED, *TINY.methods]
    assert packed["kept"] == packed["read"] == 1.0 and packed["scores"]["all"]["mean"] == full["scores"]["all"]["mean"]
    assert full["scores"]["all"] == full["scores"]["niah_multikey"]
    assert full["scores"]["all"]["count"] == 3 and full["scores"]["all"]["mean"] > sink["scores"]["all"]["mean"]
    assert full["kept"] == full["read"] == 1.0 and sink["kept"] == pytest.approx(0.3, abs=0.02)
    assert "more" not in full["losses"]["160"] and full["losses"]["160"]["tokens"] == 12
    for row in (sink, razor):
        loss = row["losses"]["160"]
        assert loss["more"] == pytest.approx(loss["mean"] - full["losses"]["160"]["mean"], abs=1e-6)
        assert loss["low"] <= loss["more"] <= loss["high"]
        timed = row["times"]["128"]
        assert timed["decode_ratio"][0] > 0 and timed["read_ratio"][0] > 0
        assert timed["decode_live_mb"] < full["times"]["128"]["decode_live_mb"]
        assert timed["decode_cache_mb"] < 0.5 * full["times"]["128"]["decode_cache_mb"]
    assert full["times"]["128"]["decode_ratio"] == (1.0, 1.0, 1.0)
    assert model["learnt_seconds"].keys() == {"razor_attention"}


def test_nothing_is_measured_twice(
    found: tuple[dict[str, Any], Path], folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = found

    def not_again(*args: Any) -> None:
        raise AssertionError("read again")

    for module in ("answers", "losses", "times"):
        monkeypatch.setattr(f"foveate.bench.policies.{module}.prefill", not_again)
    again = run([str(folder)], TINY, out, Watch())
    assert measured == [] and json.dumps(again) == json.dumps(result)


def test_more_examples_add_to_known_results(
    found: tuple[dict[str, Any], Path], folder: Path, measured: list[int], tmp_path: Path
) -> None:
    shutil.copy(found[1] / JOURNAL, tmp_path / JOURNAL)
    only = replace(TINY, losses=(), times=())
    run([str(folder)], replace(only, examples=4), tmp_path, Watch())
    assert measured == [2, 2, 2, 2], "only the second batch, under each of four contenders"


def test_an_interrupted_run_resumes(folder: Path, measured: list[int], tmp_path: Path) -> None:
    only = replace(TINY, losses=(), times=())
    with pytest.raises(KeyboardInterrupt):
        run([str(folder)], only, tmp_path, Watch(stop_at=2))
    assert measured == [2, 2]
    run([str(folder)], only, tmp_path, Watch())
    assert measured == [2, 2, 2, 2, 1, 1, 1, 1]
    run([str(folder)], only, tmp_path, Watch(), fresh=True)
    assert len(measured) == 16


def test_policies_skip_tasks_that_the_full_cache_fails(folder: Path, measured: list[int], tmp_path: Path) -> None:
    only = replace(TINY, tasks=("common_words", "niah_multikey"), characters=1100, losses=(), times=())
    (model,) = run([str(folder)], only, tmp_path, Watch())["models"]
    assert measured == [2, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    assert [about["counts"] for about in model["tasks"].values()] == [False, True]
    full, _, sink, _ = model["rows"]
    assert full["scores"]["common_words"]["mean"] < 0.1 and sink["scores"]["common_words"]["mean"] is None
    assert full["scores"]["all"] == full["scores"]["niah_multikey"]


def test_other_weights_reuse_no_answers(
    found: tuple[dict[str, Any], Path], folder: Path, measured: list[int], tmp_path: Path
) -> None:
    shutil.copy(found[1] / JOURNAL, tmp_path / JOURNAL)
    only = replace(TINY, methods=(), losses=(), times=())
    run([str(folder)], only, tmp_path, Watch(), dtype="bfloat16")
    assert measured == [2, 2, 1, 1]


def test_a_failed_policy_is_a_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Contender.at

    def at(self: Contender, length: int) -> Any:
        if self.key == "sink_recent":
            raise RuntimeError("out of order")
        return original(self, length)

    monkeypatch.setattr(Contender, "at", at)
    result = run([str(folder)], replace(TINY, losses=(), times=()), tmp_path, Watch())
    _, _, sink, razor = result["models"][0]["rows"]
    assert sink["error"] == "RuntimeError: out of order" and "error" not in razor
    page = report.page(result)
    assert "- `sink_recent` at 30%: RuntimeError: out of order" in page
    assert "sink_recent" not in report.short(result)


def test_the_page_shows_the_results(found: tuple[dict[str, Any], Path]) -> None:
    result, _ = found
    page, short = report.page(result), report.short(result)
    sink = result["models"][0]["rows"][2]
    assert f"{sink['losses']['160']['more']:+.3f}" in page
    for row in result["models"][0]["rows"]:
        assert page.count(f"`{row['method']}`") >= 3 and f"| `{row['method']}` |" in short
        assert f"{row['scores']['all']['mean']:.0%} (" in short
    widths = {line.count("|") for line in short.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_all_policies_of_the_catalogue_take_part() -> None:
    assert {"sink_recent", "duo_attention", "razor_attention", "token_select", "tidal_decode"} < set(policies())
    assert whole().methods == policies() and set(quick().methods) < set(policies())
    assert len(whole().contenders) == 2 + len(policies()) and len(quick().contenders) == 2 + len(quick().methods)
    assert times.PREFILL_ROUNDS > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(methods=("sinks",)), 'unknown method "sinks"'),
        (dict(tasks=("needle in hay",)), "unknown task"),
        (dict(tasks=("niah_single@long",)), "NAME@CHARACTERS"),
        (dict(budgets=(0.0,)), "budgets=(0.0,)"),
        (dict(budgets=()), "budgets=()"),
        (dict(examples=0), "examples=0"),
        (dict(horizon=0), "horizon=0"),
    ],
)
def test_bad_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        replace(TINY, **change)
    assert message in str(caught.value)


def test_prompts_past_the_context_are_refused(folder: Path, tmp_path: Path) -> None:
    plan = replace(TINY, characters=5000, losses=(), times=())
    examples = kind("niah_multikey", 5000, plan.examples).examples()
    new = max(len(example.answer) for example in examples) + answers._SPARE  # a token is a byte
    with pytest.raises(FoveateError, match=rf"takes \d+ \+ {new} tokens; the model's context holds 4096"):
        run([str(folder)], plan, tmp_path, Watch())


def test_losses_past_the_context_are_refused_before_anything_is_measured(folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(FoveateError, match=r"losses=4090 takes 4090 \+ 7 tokens; the model's context holds 4096"):
        run([str(folder)], replace(TINY, losses=(4090,)), tmp_path, watch)
    assert watch.labels == [] and not (tmp_path / JOURNAL).exists()


def test_the_quick_plan_fits_the_lab_model() -> None:
    model, tokenizer = lab()
    plan, context = quick(), model.config.max_position_embeddings
    assert max(plan.losses) + plan.horizon + 1 <= context and max(plan.times) + plan.steps + 1 <= context
    for name in plan.tasks:
        for example in kind(name, plan.characters, plan.examples).examples():
            sizes = [len(tokenizer(text).input_ids) for text in (example.prompt, example.answer)]
            assert sum(sizes) + answers._SPARE + 1 <= context, name


def test_a_plan_counts_its_measurements_and_knows_its_typical_budget() -> None:
    plan = replace(TINY, budgets=(0.1, 0.2, 0.5), losses=(160, 200), times=(64, 128, 256), examples=5)
    assert plan.typical == 0.2 and replace(plan, budgets=(0.1, 0.25, 0.3)).typical == 0.25
    assert [key for key, _ in plan.contenders] == [FULL, PACKED, *plan.methods * 3]
    made: Any = SimpleNamespace(contenders=plan.contenders, plan=plan)
    assert losses.loss_steps(made) == 16
    assert answers.answer_steps(made) == 24, "three batches of two of each task"


def test_a_task_may_have_a_length_of_its_own() -> None:
    plan = replace(TINY, tasks=("niah_single", "niah_single@2000"), examples=5)
    short, long = ([len(e.prompt) for e in plan.task(name).examples()] for name in plan.tasks)
    assert (len(short), len(long)) == (5, 3) and min(long) > 1800 > max(short)


def test_the_command_runs_and_refuses(folder: Path, tmp_path: Path) -> None:
    sizes = "--methods sink_recent --budgets 0.3 --tasks niah_single --examples 1 --characters 600 --losses 96"
    out = tmp_path / "out"
    command = ["bench", "policies", "--model", str(folder), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, *sizes.split(), "--times", "64"])
    assert done.exit_code == 0, done.output
    assert "`sink_recent`" in done.output and (out / "policies.md").is_file()
    for bad in (["--budgets", "lots"], ["--tasks", "hay"], ["--model", str(tmp_path / "none")]):
        done = CliRunner().invoke(app, [*command, *bad])
        assert done.exit_code == 2 and done.output.count("\n") <= 2, done.output


def test_a_budget_that_a_policy_cannot_meet_is_a_reason_and_not_the_end(folder: Path, tmp_path: Path) -> None:
    result = run([str(folder)], replace(TINY, methods=("think", "sink_recent"), losses=(), times=()), tmp_path, Watch())
    _, _, think, sink = result["models"][0]["rows"]
    assert think["error"].startswith("budget=0.3 is less than the") and "scores" not in think
    assert "error" not in sink and sink["kept"] == pytest.approx(0.3, abs=0.02)
