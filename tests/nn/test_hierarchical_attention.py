"""Hierarchical attention: two levels, each a GRU and a pool."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.pool.hierarchical_attention import AttentionPool, HierarchicalAttention
from tests.support.tensors import assert_near, gradients

LENGTHS = torch.tensor([[4, 2, 1], [3, 5, 0]])


def built(**options) -> HierarchicalAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = HierarchicalAttention(**{"dim": 3, "hidden": 2, **options}).double()
        for pool in (found.word_pool, found.sentence_pool):
            pool.align.b.data.normal_()
    return found


def words() -> torch.Tensor:
    return torch.randn(2, 3, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pooled(pool: AttentionPool, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool one sequence `(N, C)` by the formula."""
    align = pool.align
    logits = torch.stack([align.w[0] @ torch.tanh(align.w_k[0] @ token + align.b[0]) for token in x])
    weights = torch.softmax(logits, 0)
    return sum(w * token for w, token in zip(weights, x, strict=True)), weights


def test_word_by_word_and_sentence_by_sentence() -> None:
    layer, x = built(), words()
    ours = layer(x, LENGTHS)
    assert ours.document.shape == (2, 4)
    for b in range(2):
        sentences = []
        for s in range(3):
            n = LENGTHS[b, s]
            assert not ours.words[b, s, n:].any()
            if n:
                vector, weights = pooled(layer.word_pool, layer.word_encoder(x[b, s, :n])[0])
                assert_near(ours.words[b, s, :n], weights, 1e-12)
                sentences.append(vector)
        document, weights = pooled(layer.sentence_pool, layer.sentence_encoder(torch.stack(sentences))[0])
        assert_near(ours.document[b], document, 1e-12)
        assert_near(ours.sentences[b, : len(sentences)], weights, 1e-12)
        assert not ours.sentences[b, len(sentences) :].any()


def test_without_lengths_every_word_is_real() -> None:
    layer, x = built(), words()
    assert_near(layer(x).document, layer(x, torch.full((2, 3), 5)).document, 1e-12)


def test_garbage_past_the_lengths() -> None:
    layer, found = built(), []
    past = torch.arange(5) >= LENGTHS[..., None]
    for garbage in (float("nan"), 3.0):
        out = layer(words().masked_fill(past[..., None], garbage), LENGTHS).document
        found.append((out, *gradients(out, list(layer.parameters()))))
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-12)


def test_sizes() -> None:
    layer = HierarchicalAttention(7)
    assert layer.word_encoder.hidden_size == layer.sentence_encoder.hidden_size == 50
    assert layer.word_pool.align.hidden == layer.sentence_pool.align.hidden == 100
    assert AttentionPool(4, 9).align.hidden == 9


def test_an_empty_pool_is_zero() -> None:
    pool = AttentionPool(3)
    vector, weights = pool.read(torch.full((1, 2, 3), float("nan")), torch.zeros(1, 2, dtype=torch.bool))
    assert not vector.any()
    assert not weights.any()


def test_refusals() -> None:
    for options, message in (({"dim": 0}, "dim=0"), ({"hidden": 0}, "hidden=0")):
        with pytest.raises(OptionError, match=message):
            built(**options)
    with pytest.raises(ShapeError, match=r"x must be \(B, S, W, C=3\)"):
        built()(words()[0])
    with pytest.raises(ShapeError, match=r"x must be \(B, S, W, C=3\)"):
        built()(words()[..., :2])
    with pytest.raises(ShapeError, match=r"lengths must be \(2, 3\)"):
        built()(words(), LENGTHS[:, :2])
    with pytest.raises(ShapeError, match="lengths of 0 must come last"):
        built()(words(), LENGTHS.flip(1))


def test_it_finds_the_informative_sentence() -> None:
    """Trained on classes of noise documents with one informative word, both levels attend to that word."""
    random = torch.Generator().manual_seed(0)

    def documents(count: int):
        x = 0.3 * torch.randn(count, 4, 5, 8, generator=random)
        at, y = torch.randint(20, (count,), generator=random), torch.randint(3, (count,), generator=random)
        x.flatten(1, 2)[torch.arange(count), at] += 2 * F.one_hot(y, 8).float()
        return x, y, at

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = HierarchicalAttention(8, 8)
        head = torch.nn.Linear(16, 3)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(80):
        x, y, _ = documents(32)
        optimiser.zero_grad()
        F.cross_entropy(head(layer(x).document), y).backward()
        optimiser.step()
    x, y, at = documents(200)
    read = layer(x)
    assert (head(read.document).argmax(-1) == y).double().mean() > 0.9
    assert (read.sentences.argmax(-1) == at // 5).double().mean() > 0.8
