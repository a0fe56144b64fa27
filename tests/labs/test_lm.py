"""The lab language model: it retrieves, it models text, and cache policies differ on it."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from foveate.kv.duo_attention import DuoAttention
from foveate.kv.razor_attention import RazorAttention
from foveate.kv.sink_recent import SinkRecent
from foveate.labs import LABS
from foveate.labs.lm.recipe import needle_accuracy
from foveate.tasks.parts import corpus
from tests.support.lab import lab, lab_gates, lab_host, needles

BUDGET, LENGTH, COUNT = 0.35, 1024, 24


@pytest.fixture(scope="module")
def full() -> float:
    return needles(LENGTH, COUNT)[0]


def test_the_checkpoint_is_small_and_standard() -> None:
    folder = LABS["lm"].path
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.json"} <= {p.name for p in folder.iterdir()}
    assert LABS["lm"].size < 8e6
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model, _ = lab()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_one_token_is_one_byte() -> None:
    _, tokenizer = lab()
    text = "Grüße,\n\tworld"
    assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *text.encode()]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_lab_finds_most_needles(full: float) -> None:
    assert full >= 0.85, "the mean is higher; this is one seed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "count", "seeds", "least"), [(1024, 150, (101, 102, 103, 104), 0.95), (2048, 50, (201, 202, 203), 0.90)]
)
def test_the_lab_retrieves_needles(length: int, count: int, seeds: tuple[int, ...], least: float) -> None:
    """The mean over several seeds is high; single seeds vary: those here from 94 to 99 %, seed 77 gives 89 %."""
    scores = [needle_accuracy(lab()[0], length, count, seed) for seed in seeds]
    assert sum(scores) / len(scores) >= least, scores


def test_the_lab_models_text_better_than_a_trigram() -> None:
    model, tokenizer = lab()
    heldout = corpus.text("heldout")[:32_768].encode()
    with torch.no_grad():
        chunks = [
            torch.tensor([[tokenizer.bos_token_id, *heldout[i : i + 1024]]]) for i in range(0, len(heldout), 1024)
        ]
        ours = sum(model(ids, labels=ids).loss.item() for ids in chunks) / len(chunks) / math.log(2)
    assert ours < trigram_bits(corpus.text("train").encode(), heldout)


def trigram_bits(train: bytes, heldout: bytes) -> float:
    """Return the bits per byte of an interpolated trigram model with Witten-Bell smoothing."""
    counts = [Counter(train[i : i + n] for i in range(len(train) - n + 1)) for n in (1, 2, 3)]
    kinds = [Counter(gram[:-1] for gram in count) for count in counts]
    total = 0.0
    for i in range(2, len(heldout)):
        p = 1 / 256
        for n, count, kind in zip((1, 2, 3), counts, kinds, strict=True):
            history = heldout[i - n + 1 : i]
            seen = counts[n - 2][history] if n > 1 else len(train)
            if seen:
                p = (count[heldout[i - n + 1 : i + 1]] + kind[history] * p) / (seen + kind[history])
        total -= math.log2(p)
    return total / (len(heldout) - 2)


def test_sinks_and_a_window_lose_the_needle(full: float) -> None:
    score, kept = needles(LENGTH, COUNT, SinkRecent.at_budget(BUDGET, lab_host(), LENGTH))
    assert score < 0.5 * full and kept <= 0.40


@pytest.mark.parametrize("name", ["duo", "razor"])
def test_head_splits_keep_the_needle_at_the_same_budget(full: float, name: str) -> None:
    if name == "duo":
        method = DuoAttention.at_budget(BUDGET, lab_host(), LENGTH, gates=lab_gates())
    else:
        method = RazorAttention.at_budget(BUDGET, lab_host(), LENGTH)
    score, kept = needles(LENGTH, COUNT, method)
    assert score >= 0.9 * full and kept <= 0.40
