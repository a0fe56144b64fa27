"""The lab's recipe: batches contain copies and needles, and training repeats and leaves a checkpoint that loads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foveate.labs.lm import Recipe, Stage, data, recipe as making, train
from foveate.models.base import byte_tokenizer as tokenizer

TINY = Recipe(
    hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=32, context=512, warm_up=2,
    stages=(Stage(256, 2, 2), Stage(320, 2, 2)),
)  # fmt: skip


def test_batches_contain_copies_and_needles() -> None:
    ids, weights = data.batch(random.Random(0), 8, 320)
    assert ids.shape == weights.shape == (8, 320) and (ids[:, 0] == tokenizer.BOS).all() and (ids[:, 1:] < 128).all()
    needles, copies = (["".join(map(chr, row[1:])) for row in ids[kind::2].tolist()] for kind in (0, 1))
    for text, weight in zip(needles, weights[::2], strict=True):
        assert text.count("pass key of") >= 2
        answers = "".join(c for c, w in zip(text, weight[1:].tolist(), strict=True) if w > 1)
        assert answers.isdigit() and len(answers) >= 3
    for text in copies:
        words = [word for word in text.split(" ") if len(word) >= 8]
        assert any(words.count(word) > 1 for word in words)
    assert torch.equal(ids, data.batch(random.Random(0), 8, 320)[0])


def test_the_rate_warms_up_and_cools_down() -> None:
    rates = [Recipe().rate_at(step) for step in range(Recipe().steps)]
    assert rates[0] < rates[50] < rates[200] == rates[2000] == 2e-3 > rates[3000] > rates[-1] == pytest.approx(1e-4)


def test_training_leaves_a_standard_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "calibrate_heads", lambda *_: None)  # slow, and tested with DuoAttention
    monkeypatch.setattr(making, "scores", lambda model, length: {"needle 256": 0.0})
    seen: list[tuple[int, int]] = []
    record = train(tmp_path / "a", recipe=TINY, seed=3, progress=lambda step, steps, note: seen.append((step, steps)))
    train(tmp_path / "b", recipe=TINY, seed=3)
    assert seen == [(step, 4) for step in (1, 2, 3, 4)]
    assert record["seed"] == 3 and record["steps"] == 4 and len(str(record["corpus"])) == 64
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(TINY.model().parameters()))
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("x").input_ids == [tokenizer.BOS, ord("x")]
    assert json.loads((tmp_path / "a" / "recipe.json").read_text()) == record
