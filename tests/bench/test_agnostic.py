"""The query-agnostic score: a context is read and compressed once, before any of its questions is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from foveate.bench.comparison.agnostic import SharedContext, answer, shared_contexts
from foveate.bench.comparison.encoding import Prompt
from foveate.bench.comparison.run import JOURNAL, compare
from foveate.core.errors import Interrupted, OptionError
from foveate.host import apply
from foveate.kv import SinkRecent, SnapKV
from foveate.report import table
from foveate.tasks.base.task import Example
from tests.bench.conftest import Watch
from tests.support.constructed import BOS, FILLER, KEYS, VALUES, accuracy, induction_lm

N = 120


def facts(count: int = 4) -> SharedContext:
    """One text with `count` keys and their values, and a question about each key."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(FILLER.start, FILLER.stop, (1, N), generator=draw)
    ids[0, 0] = BOS
    for number in range(count):
        ids[0, 10 + 20 * number : 13 + 20 * number] = torch.tensor([KEYS.start + number, *values(number)])
    questions = tuple(torch.tensor([[FILLER.start, KEYS.start + number]]) for number in range(count))
    return SharedContext(ids, tuple(range(count)), questions, (2,) * count)


def values(number: int) -> list[int]:
    return [VALUES.start + 2 * number, VALUES.start + 2 * number + 1]


def right(records: list[dict]) -> list[bool]:  # type: ignore[type-arg]
    return [record["ids"] == values(number) for number, record in enumerate(records)]


def prompt(ids: list[int], context: int, new_tokens: int = 2) -> Prompt:
    return Prompt(Example("p", "a"), torch.tensor([ids]), new_tokens, None, None, context)


def test_equal_contexts_are_grouped() -> None:
    prompts = [
        prompt([1, 2, 3], 2),
        prompt([1, 5, 3], 2),
        prompt([1, 2, 4, 4], 2),
        prompt([1, 2], 0),
        prompt([1, 2], 2),
    ]
    first, second = shared_contexts(prompts, None)
    assert first.indices == (0, 2) and second.indices == (1,)
    assert first.ids.tolist() == [[1, 2]] and [q.tolist() for q in first.questions] == [[[3]], [[4, 4]]]
    assert first.identity(0) != first.identity(1) and first.forced is None
    too_long = Prompt(Example("p", "a"), torch.tensor([[1, 2, 3]]), 2, 4, None, 2)
    assert shared_contexts([too_long], None) == []


def test_the_context_is_read_once_for_all_questions() -> None:
    model, shared, read = induction_lm(), facts(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0].shape[1]), with_kwargs=True)
    records = answer(model, (SinkRecent(4, 40),), shared)
    assert [size for size in read if size == N] == [N]
    assert sorted(size for size in read if size != N) == [1] * 4 + [2] * 4  # a question, and one decoded token
    assert all(record["cache_kept"] == pytest.approx(44 / N, abs=0.02) for record in records)


def test_questions_do_not_see_each_other() -> None:
    """The cache is the same before each question, so that their order does not matter."""
    model, shared = induction_lm(), facts()
    whole = answer(model, (), shared)
    assert all(right(whole))
    turned = SharedContext(shared.ids, shared.indices, shared.questions[::-1], shared.steps)
    assert [record["ids"] for record in answer(model, (), turned)] == [record["ids"] for record in whole][::-1]
    assert [r["ids"] for r in answer(model, (SinkRecent(4, N),), shared)] == [r["ids"] for r in whole]


def test_a_policy_that_needs_the_question_loses_what_it_asks_for() -> None:
    """SnapKV keeps what its last queries look for: the key of the question if it is there, and noise if not."""
    model, shared = induction_lm(), facts()
    policy = SnapKV(share=0.2, recent=2, pool=3)
    unseen = sum(right(answer(model, (policy,), shared)))
    with apply(model, policy):
        aware = [
            accuracy(model, torch.cat([shared.ids, question], 1), torch.tensor([values(number)]))
            for number, question in enumerate(shared.questions)
        ]
    assert aware == [1.0] * len(shared.questions) and unseen <= 1


def test_losses_of_forced_answers_are_measured() -> None:
    model, shared = induction_lm(), facts(2)
    forced = SharedContext(shared.ids, shared.indices, shared.questions, shared.steps, (values(0), values(5)))
    good, bad = answer(model, (), forced)
    assert good["loss"] < 0.1 < 5 < bad["loss"] and math.isfinite(bad["loss"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two questions on one context, and a prompt that is not divided."""
    row = {
        "id": 0,
        "context": "some words " * 20,
        "multi_turns": [{"input": "One?", "answer": "a"}, {"input": "Two?", "answer": "b"}],
    }
    file = tmp_path / "scbench_kv.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "word " * 40, "answer": "c"}))
    return file


def test_compare_has_a_column_for_each_kind_of_query(decoder: Path, rows: Path, tmp_path: Path) -> None:
    options = {"model": str(decoder), "task": str(rows), "new_tokens": 3, "methods": ["sink_recent"], "budget": 0.4}
    watch = Watch()
    found = compare(**options, out=tmp_path / "out", progress=watch)  # type: ignore[arg-type]
    full, sink = found.rows
    assert math.isfinite(full.agnostic_score) and math.isfinite(sink.agnostic_score) and not sink.error
    assert [math.isnan(answer.agnostic_score) for answer in sink.answers] == [False, False, True]
    assert [answer.agnostic_output for answer in full.answers[:2]] == [answer.output for answer in full.answers[:2]]
    assert watch.labels.count("sink_recent, query-agnostic") == 2  # two answers, though both are made at once
    assert len(watch.labels) == watch.total
    text = table.markdown(found)
    assert "query-agnostic" in text.splitlines()[0]
    again = Watch()
    compare(**options, out=tmp_path / "out", progress=again)  # type: ignore[arg-type]
    assert again.labels == [] and again.total == 0
    plain = compare(**options, out=tmp_path / "aware", query="aware")  # type: ignore[arg-type]
    assert math.isnan(plain.rows[1].agnostic_score) and "query-agnostic" not in table.markdown(plain)
    with pytest.raises(OptionError, match="query='agnostic' must be one of"):
        compare(**options, out=tmp_path / "x", query="agnostic")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_progress_and_an_interrupt_count_the_same_answers(decoder: Path, rows: Path, tmp_path: Path) -> None:
    """Two methods answer three prompts, and one of them two questions whose context it compressed before."""
    options = {"model": str(decoder), "task": str(rows), "new_tokens": 3, "methods": ["sink_recent"], "budget": 0.4}
    for stop_at, kept in ((3, 2), (7, 6), (8, 8)):  # in a prompt; in the context, whose answers come together; after it
        watch, out = Watch(stop_at=stop_at), tmp_path / str(stop_at)
        with pytest.raises(Interrupted) as stopped:
            compare(**options, out=out, progress=watch)  # type: ignore[arg-type]
        assert watch.total == stopped.value.total == 8 and len(watch.labels) == stop_at
        assert stopped.value.done == sum('"ids"' in line for line in (out / JOURNAL).read_text().splitlines())
        assert stopped.value.done >= kept
        rest = Watch()
        compare(**options, out=out, progress=rest)  # type: ignore[arg-type]
        assert len(rest.labels) == rest.total == 8 - stopped.value.done
