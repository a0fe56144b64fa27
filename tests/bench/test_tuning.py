"""`tune` on models: it ends with a recipe whose cost and score are as claimed, resumes, and refuses bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate.bench.comparison.run import compare
from foveate.bench.loading import load
from foveate.bench.recipes.recipe import Recipe
from foveate.bench.tuning import answers, run as tuning
from foveate.bench.tuning.results import Trial, Tuning
from foveate.bench.tuning.run import tune
from foveate.core.errors import FoveateError, Interrupted
from tests.bench.conftest import Watch, write_prompts

FEW = {"search": 8, "held_out": 8, "budgets": (0.2, 0.5), "methods": ["snapkv", "knorm", "sink_recent"]}


@pytest.fixture
def settings(decoder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a search whose score is the next-token loss, which a random model has too."""
    file = write_prompts(tmp_path / "mine.jsonl", [f"{'word ' * 60}and the key is {n}" for n in range(16)], " abcd")
    return {"model": str(decoder), "task": str(file), "score": "loss", "keep": 0.9, "out": tmp_path / "out", **FEW}


@pytest.fixture(autouse=True)
def _short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "TAIL", 100)


def test_the_result_is_what_compare_measures(settings: dict[str, Any], tmp_path: Path) -> None:
    found = tune(**settings)
    assert 0 < found.share < 0.5 and found.lost <= found.bound <= 0.1 + 1e-9 and found.is_certain
    assert f"takes {found.share:.1%} of the full cache's bytes" in found.claim() and "At 95%" in found.claim()
    assert (found.examples, found.held_out) == (8, 8) and found.calls > 50
    row = compare(
        model=settings["model"], task=settings["task"], score="loss", methods=[found.recipe], out=tmp_path / "compare"
    ).rows[1]
    assert not row.error and row.cache_kept == pytest.approx(found.share, abs=0.02)
    saved = json.loads((settings["out"] / "tuning.json").read_text())
    assert saved["setting"] == found.setting and saved["claim"] == found.claim()
    assert len(saved["tried"]) == len(found.tried) > 10
    recipe = Recipe.read(found.recipe)
    assert recipe.model and recipe.about["claim"] == found.claim()


def test_what_stays_is_held_encoded(settings: dict[str, Any], tmp_path: Path) -> None:
    """The cheapest setting drops tokens and encodes the others; its bytes are those that `compare` measures."""
    found = tune(**{**settings, "methods": ["knorm", "eight_bit"]})
    assert found.setting.startswith("knorm") and found.setting.endswith(" + eight_bit, format=int8, group=4")
    dropped = [one.share for one in found.tried if one.verdict == "holds" and "eight_bit" not in one.setting]
    assert found.share < 0.6 * min(dropped)
    given = {"model": settings["model"], "task": settings["task"], "score": "loss", "out": tmp_path / "compare"}
    row = compare(**given, methods=[found.recipe]).rows[1]
    assert not row.error and row.cache_kept == pytest.approx(found.share, abs=0.02)


def test_an_interrupted_search_resumes(settings: dict[str, Any]) -> None:
    with pytest.raises(Interrupted) as stopped:
        tune(**settings, progress=Watch(stop_at=60))
    assert stopped.value.done > 20
    before = keys_of(settings["out"])
    resumed = tune(**settings)
    after = keys_of(settings["out"])
    assert after[: len(before)] == before and len(set(after)) == len(after) > len(before) > 20
    again = tune(**settings)
    assert again.calls == 0 < resumed.calls
    assert (again.setting, again.share, again.bound) == (resumed.setting, resumed.share, resumed.bound)


def keys_of(folder: Path) -> list[str]:
    """Return the keys of what was measured, in its order."""
    return [json.loads(line)["key"] for line in (folder / tuning.JOURNAL).read_text().splitlines()]


def test_settings_that_share_the_beginning_of_a_prompt_are_the_same_as_without(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["methods"] = ["snapkv", "h2o", "expected_attention", "keydiff"]
    settings["budgets"] = (0.3,)
    made: list[Any] = []
    true = tuning.Trials
    monkeypatch.setattr(tuning, "Trials", lambda *args: made.append(true(*args)) or made[-1])
    tune(**settings)
    (trials,) = made
    shares = {arm.key: shared for arm, shared in trials._shares.items() if not arm.options}
    assert shares["snapkv"] and shares["keydiff"]
    assert not shares["h2o"] and not shares["expected_attention"]  # they need queries of the whole prompt
    some = [one for one in trials.measured if one.parts and all(part.layers is None for part in one.parts)]
    one, two = (trials.measure(some, range(4), "", shared=shared) for shared in (True, False))
    for setting in some:
        if one[setting].failed:  # an option that does not go with the policy's others
            assert two[setting].failed == one[setting].failed
            continue
        assert one[setting].lost == pytest.approx(two[setting].lost, abs=1e-4)
        assert one[setting].share == two[setting].share


def test_a_policy_that_cannot_run_is_left_out_with_its_reason(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.kv.knorm import KNorm

    monkeypatch.setattr(KNorm, "bind", lambda *_: [].pop())
    found = tune(**settings)
    assert any(one.setting.startswith("knorm") and "cannot run: IndexError" in one.verdict for one in found.tried)
    assert "knorm" not in found.setting


def test_a_task_on_which_nothing_can_be_lost_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match="the full cache scores 0 on the examples of the search"):
        tune(**{**settings, "score": "exact"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 1.0}, "keep=1.0 must be under 1"),
        ({"keep": 98}, "keep=98 must be in 0.0..1.0"),
        ({"level": 0.2}, "level=0.2 must be at least 0.5"),
        ({"search": 3}, "search=3 must be a whole number, at least 8"),
        ({"held_out": 0}, "held_out=0 must be"),
        ({"budgets": (0.2, 1.5)}, "must be shares of the full cache"),
        ({"budgets": ()}, "must be shares of the full cache"),
        ({"methods": ["snapvk"]}, 'unknown method "snapvk"'),
        ({"methods": ["token_select"]}, "token_select neither drops tokens"),
        ({"methods": ["hip"]}, "hip neither drops tokens"),
        ({"methods": ["full"]}, "full neither drops tokens"),
        ({"task": "absent.jsonl"}, "absent.jsonl"),
        ({"model": "absent/x/y"}, "absent/x/y"),
        ({"length": 100}, "length=100 goes with"),
    ],
)
def test_bad_input_is_refused_in_one_line(settings: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(FoveateError) as caught:
        tune(**{**settings, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (settings["out"] / "recipe.json").exists()


def test_too_few_examples_for_a_claim_are_said() -> None:
    made: dict[str, Any] = {
        "model": "lab", "task": "needle", "metric": "begins", "keep": 0.98, "level": 0.95, "setting": "snapkv at 0.2",
        "recipe": "r.json", "share": 0.21, "score": 1.0, "full_score": 1.0, "lost": 0.0, "bound": 0.072,
        "is_certain": False, "examples": 8, "held_out": 40, "calls": 3,
    }  # fmt: skip
    claim = Tuning(**made).claim()
    assert "it loses at most 7.2 % of the score" in claim and "too few held-out examples" in claim
    assert "keep" not in Tuning(**{**made, "is_certain": True}).claim()
    made["setting"] = "full cache"
    assert "in the search, so that none was tested on held-out examples: use the" in Tuning(**made).claim()
    made["tried"] = [Trial("snapkv at 0.2", 0.21, 0.5, 40, "failed", held_out=True)]
    assert "score on held-out examples: use the full cache." in Tuning(**made).claim()


@pytest.mark.slow
def test_on_the_lab_model_budgets_by_layer_are_cheaper_than_every_single_policy(tmp_path: Path) -> None:
    """At equal score, budgets by layer need fewer bytes than every policy of the space, with any of its options."""
    found = tune(methods=["keydiff"], search=20, held_out=8, out=tmp_path / "out")
    held = [one for one in found.tried if not one.held_out and one.verdict == "holds" and one.examples == 20]
    single = min(one.share for one in held if " in layer" not in one.setting)
    layered = min(one.share for one in held if " in layer" in one.setting)
    assert layered < 0.75 * single
    assert any(one.held_out for one in found.tried) and found.calls < 1500
    assert foveate.load(found.recipe, load(None)[0])
