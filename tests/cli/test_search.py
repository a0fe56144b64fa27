"""`foveate systems --search`: needs in plain words, and the systems that answer them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.cli.search import needs, needs_of, search, stem, stemmed, understood, unknown_words
from foveate.core.catalog import CATEGORIES, capabilities, system, systems
from foveate.core.catalog_rows import ROOMS

#: What people ask, the systems that have to be among the first so many, and what the first reason has to name.
CORPUS = [
    ("long context without retraining", 7, "token_select duo_attention", "long context"),
    ("smaller KV cache", 10, "razor_attention duo_attention knorm expected_attention", "small KV cache"),
    (
        "I run out of GPU memory with long prompts",
        6,
        "razor_attention duo_attention expected_attention",
        "small KV cache",
    ),
    ("faster decoding of a pretrained model", 4, "tidal_decode recycled_attention token_select", "fast decoding"),
    ("time to first token", 4, "flex_prefill sale vertical_slash hip", "time to first token"),
    ("images in linear time", 3, "inline_attention l2vit efficient_attention", "images"),
    ("an endless stream with constant memory", 3, "sliding_window sink_recent", "streaming"),
    ("a set of unordered elements", 1, "set_transformer", "sets"),
    ("point at positions of the input", 1, "pointer_network", "pointing at inputs"),
    ("sorting numbers", 1, "pointer_network", "pointing at inputs"),
    ("interpretability", 5, "pavlovian_attention scan_and_snap dependency_vit", "interpretability"),
    ("interpretabilty", 3, "pavlovian_attention", "interpretability"),
    ("recall facts with a small state", 2, "based", "recall"),
    ("machine translation", 1, "luong_attention", "translation"),
    (
        "works on longer inputs than it was trained on",
        4,
        "token_select monotonic_location_attention sink_recent",
        "lengths",
    ),
    ("camera poses", 1, "gta", "geometry"),
    ("reorder retrieved passages", 1, "attention_sorting", "document order"),
    ("layout of scanned documents", 1, "skim_attention", "document layout"),
    ("fewer parameters", 2, "mhe_attention super_attention", "few parameters"),
    ("a memory that learns at test time", 2, "titans miras", "learning at test time"),
    ("mixture of experts", 1, "moh", "mixture of experts"),
    ("good initialisation for little data", 2, "mimetic_init", "initial weights"),
    ("convert a trained softmax model to linear attention", 1, "hedgehog", "conversion"),
    ("fewer key value heads from a multi-head checkpoint", 1, "key_driven_gqa", "fewer key/value heads"),
    ("attention sinks", 5, "act_calibration sink_recent", "attention sinks"),
    ("exact attention with less memory", 1, "memory_efficient_attention", "exactness"),
    ("music", 1, "music_transformer", '"music"'),
    ("irregular time series with noise", 1, "adaptive_filter_attention", "irregular time series"),
    ("relational reasoning", 1, "dual_attention_transformer", "relations"),
    ("a benchmark of associative recall", 1, "zoology_mqar", "benchmarks"),
    ("better answers without training", 1, "act_calibration", "better answers"),
    ("recognize a speaker by the voice", 1, "ecapa_tdnn", "speakers"),
    ("click through rate prediction", 1, "autoint", "tables"),
    ("block sparse attention", 5, "s2_attention flex_prefill sale vertical_slash", "sparse patterns"),
    ("linear-time language model, cheaper than softmax", 8, "lightning_attention", "linear time"),
    ("sharper temperature", 1, "selective_self_attention", '"temperature"'),
    ("dependency trees", 1, "dependency_vit", '"dependency"'),
]


def keys(need: str) -> list[str]:
    return [match.system.key for match in search(need)]


@pytest.mark.parametrize(("need", "first", "expected", "reason"), CORPUS)
def test_needs_find_their_systems(need: str, first: int, expected: str, reason: str) -> None:
    matches = search(need)
    assert set(expected.split()) <= {match.system.key for match in matches[:first]}
    why = next(match.why for match in matches if match.system.key == expected.split(maxsplit=1)[0])
    assert any(text.startswith(reason) for text in why)


def test_rows_that_answer_all_of_a_need_come_before_those_that_answer_half() -> None:
    found = keys("long context without retraining")
    assert {row.room for key in found[:6] for row in [system(key)]} <= {"kv", "ops", "steer"}
    assert "act_calibration" not in found  # it needs no retraining, and has nothing to do with length
    assert "lightning_attention" not in found  # the other way round


def test_what_a_system_is_not_for_does_not_find_it() -> None:
    assert "s2_attention" not in keys("without retraining")  # its docstring: the wrong choice for a pretrained model
    assert "sliding_window" not in keys("an answer that may stand anywhere in the input")


def test_scores_fall_and_every_row_has_a_reason() -> None:
    matches = search("streaming images")
    assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)
    assert all(match.why for match in matches)
    assert 0 < len(matches) <= 10


def test_nothing_answers_what_is_not_there() -> None:
    assert search("zebra") == []
    assert search("") == []
    assert search("the of and") == []


def test_search_can_be_limited_to_some_rows() -> None:
    rows = [row for row in systems() if row.room == "nn"]
    assert {match.system.room for match in search("images", rows)} == {"nn"}
    one = replace(system("hip"), key="other", title="Zebras")
    assert [match.system.key for match in search("zebra", [one])] == ["other"]


@pytest.mark.parametrize(
    "forms",
    [
        "cache caches cached caching",
        "train trained training",
        "initialise initialize initialisation initialization",
        "stream streams streaming streamed",
        "pointer point points pointing",
        "image images",
        "interpret interpretable interpretability",
        "decode decodes decoder decoding",
        "memory memories",
        "run running runs",
        "pass passes",
    ],
)
def test_forms_of_a_word_share_a_stem(forms: str) -> None:
    assert len({stem(word) for word in forms.split()}) == 1


@pytest.mark.parametrize("pair", ["linear line", "state stop", "sets sinks", "less lens", "loss lose", "head hash"])
def test_different_words_stay_apart(pair: str) -> None:
    assert len({stem(word) for word in pair.split()}) == 2


def test_hyphens_accents_and_case_do_not_matter() -> None:
    assert stemmed("Long-Context") == stemmed("long context")
    assert stemmed("naïve") == stemmed("naive") or stemmed("naïve")[0].startswith("nai")


def test_the_longest_phrase_counts_and_a_word_only_once() -> None:
    found, others = understood("initialisation without training")
    assert [need.name for need in found] == ["initial weights", "no retraining"]
    assert others == []
    assert [need.name for need in understood("long documents")[0]] == ["long context"]
    assert understood("music in my cache")[1] == [stem("music")]


def test_the_table_of_needs_is_in_order() -> None:
    names = [need.name for need in needs()]
    assert len(names) == len(set(names)) >= 30
    owners: dict[str, set[str]] = {}
    for need in needs():
        for phrase in need.phrases:
            owners.setdefault(" ".join(stemmed(phrase)), set()).add(need.name)
    assert {phrase: names for phrase, names in owners.items() if len(names) > 1} == {}


def test_facts_of_the_table_exist() -> None:
    tags = {tag for row in systems() for tag in row.tags}
    known: dict[str, set[object]] = {"tag": tags, "room": set(ROOMS)}
    known |= {name: set(places) for name, places in CATEGORIES.items()}
    for name in ("state", "growth", "family", "kind"):
        known[name] = {capabilities(row.key).get(name) for row in systems()}
    for need in needs():
        for fact in (*need.strong, *need.weak):
            name, colon, value = fact.partition(":")
            assert not colon or value in known[name], f"{need.name}: {fact}"


def test_every_system_answers_some_need() -> None:
    without = [row.key for row in systems() if not needs_of(row)]
    assert len(without) <= 12, without  # what is a baseline or a study of scores is found by its words


# -- the command -------------------------------------------------------------------------------------------------------


def run(*args: str):
    return CliRunner().invoke(app, ["systems", *args])


def test_the_command_says_what_and_why() -> None:
    result = run("--search", "smaller KV cache")
    assert result.exit_code == 0
    assert "razor_attention" in result.stdout
    assert "small KV cache (tag" in result.stdout
    assert "of 52 systems, best first" in result.stdout or "systems, best first" in result.stdout
    assert "`foveate compare --model YOURS`" in result.stdout  # the need's hint


def test_the_command_with_filters_and_json() -> None:
    rows = json.loads(run("--search", "images", "--room", "ops", "--json").stdout)
    assert rows and {row["room"] for row in rows} == {"ops"}
    assert rows[0]["why"] and rows[0]["score"] > 0 and rows[0]["title"]
    assert json.loads(run("--search", "zebra", "--json").stdout) == []


def test_the_command_finds_nothing() -> None:
    result = run("--search", "zebra")
    assert result.exit_code == 0
    assert "nothing answers 'zebra'" in result.stdout
    assert "no system knows zebra" in result.stdout


def test_words_that_nothing_knows_are_said() -> None:
    assert unknown_words("a smaller cache by encryption") == ["encryption"]
    assert unknown_words("smaller caches for long contexts") == []
    assert "no system knows encryption" in run("--search", "key-value cache encryption").stdout


@pytest.mark.parametrize("words", ["cache quantization", "quantise the cache"])
def test_quantised_caches_are_found(words: str) -> None:
    keys = [row["key"] for row in json.loads(run("--search", words, "--json").stdout)]
    assert {"kivi", "turboquant"} <= set(keys[:6])


def test_no_need_and_unknown_tags_are_refused() -> None:
    assert run("--search", " ").exit_code != 0
    assert run("--tag", "nonsense").exit_code != 0


@pytest.mark.parametrize("more", [["hip"], ["--by", "room"]])
def test_the_command_refuses_what_does_not_go_together(more: list[str]) -> None:
    result = run("--search", "images", *more)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --search takes --room, --tag and --json beside it")


def test_it_answers_without_torch() -> None:
    code = (
        "import sys\nfrom foveate.cli import main\n"
        "try: main(['systems', '--search', 'long context without retraining'])\n"
        "except SystemExit as done: sys.exit(done.code or bool({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
