"""Attention against gradients and LIME: closed forms, LIME by scikit-learn's ridge, and what each says of sentiment."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from foveate.core.errors import FoveateError, OptionError, ShapeError
from foveate.lens import agreement, attention_gradient, deletion_drop, explain, explain_all, lime_limit, text_lime
from foveate.models import ClsAttentionClassifier
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near

CLS, UNKNOWN = 0, 1


def classifier(seed: int = 0, vocabulary: int = 90, **options: Any) -> ClsAttentionClassifier:
    """A random model in float64."""
    torch.manual_seed(seed)
    return ClsAttentionClassifier(vocabulary, **options).double().eval().requires_grad_(False)


def small(seed: int = 0) -> ClsAttentionClassifier:
    """A random model with large weights, so that its heads are far from uniform."""
    model = classifier(seed, 40, classes=3, dim=16, heads=3, head_dim=8, value_dim=5, length=24)
    for linear in (model.q, model.k):
        linear.weight.mul_(8.0)
    return model


def text(length: int = 20, seed: int = 0) -> Tensor:
    """A text with words that come more than once, and unknown ones at its end."""
    ids = torch.randint(2, 12, (length,), generator=torch.Generator().manual_seed(seed))
    ids[0], ids[-3:] = CLS, UNKNOWN
    return ids


def by_hand(model: ClsAttentionClassifier, embedded: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a head's exponentiated scores, its values and its query, each computed token by token."""
    rows = [linear.weight.chunk(model.heads)[head] for linear in (model.q, model.k, model.v)]
    q = rows[0] @ embedded[0]
    g = torch.stack([(q @ (rows[1] @ token) / len(rows[1]) ** 0.5).exp() for token in embedded])
    return g, torch.stack([rows[2] @ token for token in embedded]), q


# -- the model and its explanations in closed form ---------------------------------------------------------------------


def test_the_model_is_its_definition() -> None:
    model, ids = small(), text()
    embedded = torch.zeros(20, 16, dtype=torch.float64)
    for t, token in enumerate(ids.tolist()):
        for c in range(16):
            angle = t / 10_000 ** ((c - c % 2) / 16)
            embedded[t, c] = model.embedding.weight[token, c] + (np.cos(angle) if c % 2 else np.sin(angle))
    assert_near(model.embed(ids[None])[0], embedded, 1e-6)
    scores = torch.zeros(3, dtype=torch.float64)
    for head in range(3):
        g, v, _ = by_hand(model, model.embed(ids[None])[0], head)
        scores += model.out.weight[:, head * 5 : head * 5 + 5] @ (g[:, None] * v).sum(0) / g.sum() / 3
    assert_near(model(ids[None])[0], scores, 1e-12)
    padded = model.padded(ids[1:8])
    assert padded.tolist() == [CLS, *ids[1:8].tolist(), *[UNKNOWN] * 16]
    assert model.padded(torch.arange(2, 40)).tolist() == [CLS, *range(2, 25)]


def test_attention_is_the_mean_or_the_largest_weight_of_the_heads() -> None:
    model, ids = small(), text()
    weights = torch.stack([(g := by_hand(model, model.embed(ids[None])[0], head)[0]) / g.sum() for head in range(3)])
    assert weights.std(0).max() > 0.02
    assert_near(explain(model, ids, "attn_mean"), weights.mean(0), 1e-12)
    assert_near(explain(model, ids, "attn_max"), weights.max(0).values, 1e-12)


@pytest.mark.parametrize("target", [0, 2])
def test_the_gradient_in_closed_form_is_autograds(target: int) -> None:
    model, ids = small(), text()
    embedded = model.embed(ids[None]).requires_grad_()
    (slope,) = torch.autograd.grad(model.read(embedded)[0, target], embedded)
    found = attention_gradient(model, ids, target)
    assert_near(found, slope[0], 1e-12)
    single = small().float()
    assert_near(attention_gradient(single, ids, target), slope[0].float(), 1e-6)
    expected = {
        "grad_mean": slope[0].mean(1), "grad_l1": slope[0].abs().sum(1), "grad_l2": slope[0].square().sum(1).sqrt(),
        "grad_input": (slope[0] * embedded[0].detach()).sum(1),
    }  # fmt: skip
    for how, each in expected.items():
        assert_near(explain(model, ids, how, target), each, 1e-12)  # type: ignore[arg-type]


def test_the_limit_of_lime_is_its_formula() -> None:
    model, ids = small(), text()
    masked = torch.full_like(ids, UNKNOWN)
    masked[0] = CLS
    parts = torch.zeros(20, dtype=torch.float64)
    for head in range(3):
        row = model.out.weight[2, head * 5 : head * 5 + 5]
        g, v, q = by_hand(model, model.embed(ids[None])[0], head)
        _, v_masked, same = by_hand(model, model.embed(masked[None])[0], head)
        key = model.k.weight.chunk(3)[head]
        g_masked = torch.stack([(q @ (key @ token) / 8**0.5).exp() for token in model.embed(masked[None])[0]])
        assert_near(q, same, 1e-12)
        for t in range(20):
            parts[t] += 3 / 2 / 3 * row @ (g[t] / g.sum() * v[t] - g_masked[t] / g_masked.sum() * v_masked[t])
    expected = torch.stack([parts[ids == token].sum() for token in ids])
    expected[0], expected[-3:] = 0.0, 0.0
    assert len(set(ids.tolist())) < 14
    assert_near(lime_limit(model, ids, 2), expected, 1e-12)
    assert torch.equal(explain(model, ids, "lime_limit", 2), lime_limit(model, ids, 2))


def test_without_keys_all_explanations_are_those_of_a_linear_model() -> None:
    model, ids = small(), text()
    model.k.weight.zero_()
    value = torch.einsum("hdc,hd->c", model.v.weight.view(3, 5, 16), model.out.weight[1].view(3, 5)) / 3 / 20
    masked = torch.where(ids > UNKNOWN, UNKNOWN, ids)
    parts = (model.embed(ids[None]) - model.embed(masked[None]))[0] @ value
    linear = torch.stack([parts[ids == token].sum() for token in ids])
    assert_near(explain(model, ids, "attn_mean"), torch.full((20,), 1 / 20, dtype=torch.float64), 1e-12)
    assert_near(attention_gradient(model, ids)[1:], value.expand(19, -1), 1e-12)
    draw = torch.Generator().manual_seed(0)
    assert_near(explain(model, ids, "lime", samples=200, ridge=0.0, generator=draw), linear, 1e-9)
    assert_near(lime_limit(model, ids), 1.5 * linear, 1e-12)


# -- LIME --------------------------------------------------------------------------------------------------------------


def test_lime_is_scikit_learns_ridge_with_the_packages_kernel() -> None:
    model, ids = small(), text()
    seen: list[Tensor] = []

    def score(texts: Tensor) -> Tensor:
        seen.append(texts.clone())
        return model(texts)[:, 1].exp()

    found = text_lime(
        score, ids, UNKNOWN, kept=[CLS], samples=500, batch=77, generator=torch.Generator().manual_seed(0)
    )
    texts = torch.cat(seen)
    words = sorted(set(ids.tolist()) - {CLS, UNKNOWN})
    present = torch.stack([(texts == word).any(1) for word in words], 1)
    assert torch.equal(texts[0], ids) and len(texts) == 500
    for column, word in enumerate(words):  # a word is masked at all of its places
        assert torch.equal(
            texts[:, ids == word], torch.where(present[:, [column]], word, UNKNOWN).expand(-1, (ids == word).sum())
        )
    data = present.double().numpy()
    distances = pairwise_distances(data, data[:1], metric="cosine").ravel() * 100
    weights = np.sqrt(np.exp(-(distances**2) / 25**2))
    fit = Ridge(alpha=1.0).fit(data, score(texts).numpy(), sample_weight=weights)
    expected = torch.tensor([0.0 if token < 2 else fit.coef_[words.index(token)] for token in ids.tolist()])
    assert_near(found, expected.double(), 1e-7)
    assert found[ids > 1].abs().min() > 1e-4


def test_copies_mask_any_number_of_any_words_alike() -> None:
    ids, seen = torch.tensor([CLS, *range(2, 10)]), list[Tensor]()
    text_lime(
        lambda texts: (seen.append(texts), texts.double().sum(1))[1], ids, UNKNOWN, kept=[CLS], samples=8001,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    gone = torch.cat(seen)[1:, 1:] == UNKNOWN
    counts = torch.bincount(gone.sum(1), minlength=9) / 8000
    assert counts[0] == 0.0 and (counts[1:] - 1 / 8).abs().max() < 0.015
    assert (gone.double().mean(0) - 9 / 16).abs().max() < 0.02
    again, same = (
        text_lime(
            lambda texts: texts.double().sum(1), ids, UNKNOWN, kept=[CLS], samples=50,
            generator=torch.Generator().manual_seed(3),
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(again, same)


def documents(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.cat([torch.tensor([CLS]), 2 + torch.randperm(88, generator=draw)[:60]]) for _ in range(count)]


def correlations(hows: list[Any], count: int, **options: Any) -> list[list[float]]:
    """Pearson's correlation of explanations with LIME by 5,000 samples, for some texts of 60 words."""
    model, found = classifier(**options).float(), list[list[float]]()
    for place, ids in enumerate(documents(count)):
        sampled = explain(model, ids, "lime", generator=torch.Generator().manual_seed(place))[1:]
        found.append([float(pearsonr(explain(model, ids, how)[1:], sampled).statistic) for how in hows])
    return found


def test_the_limit_is_near_lime_and_attention_is_not(claim: ClaimFixture) -> None:
    found = correlations(["lime_limit", "attn_mean"], 3, dim=64, heads=3, head_dim=32)
    ours, attention = min(each[0] for each in found), max(abs(each[1]) for each in found)
    assert ours > 0.9
    claim(
        "correlation with LIME by 5,000 samples of the limit in closed form, least of 3 random texts of 60 words",
        ours=ours, baseline=attention, better="higher", margin=0.4,
        baseline_name="the mean attention weight, best of the texts", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_the_limit_is_near_lime_on_ten_texts_of_the_papers_model() -> None:
    assert min(each[0] for each in correlations(["lime_limit"], 10)) > 0.9


# -- a model that is trained on sentiment ------------------------------------------------------------------------------

NEUTRAL, POSITIVE, NEGATIVE = range(2, 42), range(42, 52), range(52, 62)


def reviews(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts of 24 words, of which seven are positive or negative; the label says which are more."""
    ids = torch.randint(NEUTRAL.start, NEUTRAL.stop, (count, 25), generator=draw)
    good = torch.rand(count, 7, generator=draw) < torch.rand(count, 1, generator=draw)
    words = torch.randint(10, (count, 7), generator=draw) + torch.where(good, POSITIVE.start, NEGATIVE.start)
    ids.scatter_(1, torch.rand(count, 24, generator=draw).argsort(1)[:, :7] + 1, words)
    ids[:, 0] = CLS
    return ids, (good.sum(1) > 3).long()


@cache
def trained() -> ClsAttentionClassifier:
    torch.manual_seed(0)
    model, draw = ClsAttentionClassifier(62, dim=32, heads=3, head_dim=16, length=25), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        ids, labels = reviews(64, draw)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def test_signs_of_words_are_lost_in_attention(claim: ClaimFixture) -> None:
    model, (ids, labels) = trained(), reviews(200, torch.Generator().manual_seed(9))
    assert (model(ids).argmax(1) == labels).float().mean() > 0.9
    right: dict[str, list[bool]] = {how: [] for how in ("lime", "lime_limit", "grad_input", "attn_mean")}
    for row in ids[:12]:
        found = explain_all(model, row, hows=list(right), samples=1000, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        for how, each in found.items():
            right[how] += [bool((each[row == word] > 0).all()) for word in set(row.tolist()) if word in POSITIVE]
            right[how] += [bool((each[row == word] < 0).all()) for word in set(row.tolist()) if word in NEGATIVE]
        assert (found["attn_mean"] > 0).all()
    share = {how: sum(hits) / len(hits) for how, hits in right.items()}
    assert min(share["lime"], share["lime_limit"], share["grad_input"]) > 0.9, share
    claim(
        "share of positive and negative words with the right sign: LIME", ours=share["lime"],
        baseline=share["attn_mean"], better="higher", margin=0.3, baseline_name="attention weights", seed=0,
    )  # fmt: skip


def test_deleting_what_lime_names_lowers_the_score_more(claim: ClaimFixture) -> None:
    model, (ids, _) = trained(), reviews(100, torch.Generator().manual_seed(9))
    drops = {
        how: [deletion_drop(lambda texts: model(texts)[:, 1], row, explain(model, row, how), 3, UNKNOWN) for row in ids]
        for how in ("lime_limit", "attn_mean")
    }  # type: ignore[misc]
    claim(
        "fall of the score of the positive class when the three words with the largest importance are masked",
        ours=float(np.mean(drops["lime_limit"])), baseline=float(np.mean(drops["attn_mean"])), better="higher",
        margin=0.5, baseline_name="words with the largest attention weights", seed=0,
    )  # fmt: skip


# -- encoders of transformers, and measures ----------------------------------------------------------------------------


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_an_encoder_is_explained_too() -> None:
    model, ids = bert(), text()
    found = explain_all(
        model, ids, 2, unknown=UNKNOWN, kept=[CLS], samples=300, generator=torch.Generator().manual_seed(0)
    )
    assert list(found) == ["attn_mean", "attn_max", "grad_mean", "grad_l1", "grad_l2", "grad_input", "lime"]
    caught: list[Tensor] = []
    words = model.bert.embeddings.word_embeddings
    handle = words.register_forward_hook(lambda *call: (caught.append(call[2]), call[2].retain_grad())[0])
    model(ids[None]).logits[0, 2].backward()
    handle.remove()
    slope = caught[0].grad[0]
    assert_near(found["grad_mean"], slope.mean(1), 1e-5)
    assert_near(found["grad_l2"], slope.norm(dim=1), 1e-5)
    assert_near(found["grad_input"], (slope * words.weight[ids]).sum(1).detach(), 1e-5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids[None], output_attentions=True).attentions[-1][0, :, 0]
    assert_near(found["attn_mean"], weights.mean(0), 1e-5)
    assert_near(found["attn_max"], weights.amax(0), 1e-5)
    with torch.no_grad():
        again = text_lime(
            lambda texts: model(texts).logits[:, 2], ids, UNKNOWN, kept=[CLS], samples=300,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert_near(found["lime"], again, 1e-5)
    with pytest.raises(OptionError, match='try how="lime"'):
        explain(model, ids, "lime_limit")
    with pytest.raises(OptionError, match="unknown must be the token"):
        explain(model, ids, "lime")


def test_agreement_by_hand() -> None:
    ids, draw = text(), torch.Generator().manual_seed(0)
    given = {
        "a": torch.randn(20, generator=draw),
        "b": torch.rand(20, generator=draw),
        "c": torch.randn(20, generator=draw),
    }
    found = agreement(given, ids)
    free = ids > 1
    table = np.stack([each[free].numpy() for each in given.values()])
    assert found.names == ("a", "b", "c")
    assert_near(found.ranks, torch.tensor(spearmanr(table.T).statistic), 1e-9)
    expected = torch.tensor([[np.mean(np.sign(x) == np.sign(y)) for y in table] for x in table])
    assert_near(found.signs, expected.double(), 1e-12)


def test_a_deletion_by_hand() -> None:
    ids = torch.tensor([CLS, 5, 7, 6, UNKNOWN])
    importance = torch.tensor([9.0, 1.0, 3.0, 2.0, 8.0])
    drop = deletion_drop(lambda texts: texts.double().square().sum(1), ids, importance, 2, UNKNOWN)
    assert drop == 49 + 36 - 2
    assert deletion_drop(lambda texts: texts.double().sum(1), ids, importance, 10, UNKNOWN) == 18 - 3


def test_bad_input_is_refused() -> None:
    model, ids = small(), text()
    bad: list[tuple[type[FoveateError], str, Any]] = [
        (OptionError, "how='attention' must be one of", lambda: explain(model, ids, "attention")),  # type: ignore[arg-type]
        (OptionError, "target=3 must be a class in 0..2", lambda: explain(model, ids, "grad_l1", 3)),
        (OptionError, "target=True", lambda: explain(model, ids, "lime_limit", True)),
        (OptionError, "target=-1", lambda: explain(model, ids, "lime", -1, samples=2)),
        (OptionError, "takes no samples", lambda: explain(model, ids, "attn_max", samples=3)),
        (OptionError, "samples=1", lambda: explain(model, ids, "lime", samples=1)),
        (OptionError, "width=0", lambda: explain(model, ids, "lime", width=0)),
        (OptionError, "ridge=-1", lambda: explain(model, ids, "lime", ridge=-1)),
        (ShapeError, r"ids must be the token ids \(T,\)", lambda: explain(model, ids[None], "attn_mean")),
        (ShapeError, "ids must be the token ids", lambda: explain(model, ids.float(), "lime")),
        (ShapeError, "may be masked", lambda: lime_limit(model, torch.tensor([CLS, UNKNOWN]))),
        (ShapeError, "at most length=24", lambda: explain(model, text(25), "attn_mean")),
        (ShapeError, "for each text", lambda: text_lime(model, ids, UNKNOWN, samples=5)),
        (ShapeError, r"explanations\['a'\] must be \(20,\)", lambda: agreement({"a": torch.ones(19)}, ids)),
        (OptionError, "at least one", lambda: agreement({}, ids)),
        (ShapeError, "explanation must be", lambda: deletion_drop(lambda x: x, ids, torch.ones(3), 1, UNKNOWN)),
        (OptionError, "dim=5 must be even", lambda: ClsAttentionClassifier(10, dim=5)),
        (OptionError, "heads=0", lambda: ClsAttentionClassifier(10, heads=0)),
        (ShapeError, r"ids must be token ids \(B, T\)", lambda: model(ids)),
    ]
    for error, words, call in bad:
        with pytest.raises(error, match=words):
            call()
