"""Pruned heads of a ViT, hops, and patterns: limits by hand, and what the ranking says of a trained ViT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.host import cut_heads
from foveate.lens import (
    HeadImportance,
    attention_maps,
    attention_patterns,
    expected_hop,
    hop_profile,
    pruning_importance,
    uniform_hops,
)
from foveate.lens.parts.k_means import k_means
from tests.conftest import ClaimFixture
from tests.lens.digit_vit import accuracy, classifier, heldout, untrained
from tests.support.tensors import assert_near

NAMES = ("prob_drop", "loss_rise", "jsd", "cls_shift", "acc_drop")


def lively() -> Any:
    """An untrained classifier with large weights, so that its heads differ."""
    model = untrained(2, 4, 2, 0)
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(model: Any, heads: list[tuple[int, int]], y: Tensor) -> Tensor:
    """Return the five metrics of some heads' removal, `(images, 5)`, with scipy's divergence."""
    with torch.no_grad():
        a, b = (each(pixel_values=images(), output_hidden_states=True) for each in (model, cut_heads(model, heads)))
    p, q = (each.logits.double().softmax(-1) for each in (a, b))
    one = torch.arange(len(y))
    z, w = (each.hidden_states[-1][:, 0].double() for each in (a, b))
    divergence = [jensenshannon(left, right) ** 2 for left, right in zip(p.numpy(), q.numpy(), strict=True)]
    right = [(each.argmax(-1) == y).double() for each in (p, q)]
    return torch.stack([
        p[one, y] - q[one, y], p[one, y].log() - q[one, y].log(), torch.tensor(divergence),
        1 - (z * w).sum(-1) / (z.norm(dim=-1) * w.norm(dim=-1)), right[0] - right[1],
    ], -1)  # fmt: skip


def test_importance_is_what_removing_a_head_changes() -> None:
    model, y = lively(), torch.tensor([3, 1, 4, 1, 5, 9])
    found = pruning_importance(model, [(images()[:4], y[:4]), (images()[4:], y[4:])])
    assert found.metrics == NAMES and found.values.shape == (6, 2, 4, 5)
    for layer, head in ((0, 2), (1, 1)):
        assert_near(found.values[:, layer, head], by_hand(model, [(layer, head)], y), 1e-5)
    alone = pruning_importance(model, [(images(), y)], prune="all but one")
    assert_near(alone.values[:, 1, 3], by_hand(model, [(1, 0), (1, 1), (1, 2)], y), 1e-5)
    own = pruning_importance(model, [(images(), None)], ["prob_drop"])
    assert torch.equal(own.labels, model(pixel_values=images()).logits.argmax(-1))
    assert_near(own.values[:, 0, 2, 0], by_hand(model, [(0, 2)], own.labels)[:, 0], 1e-5)


def test_a_head_that_writes_nothing_has_no_importance() -> None:
    model = lively()
    model.vit.layers[1].attention.o_proj.weight.data[:, 16:32] = 0.0
    found = pruning_importance(model, [(images(), None)]).values
    assert_near(found[:, 1, 1], torch.zeros(6, 5), 1e-6)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 1] = False
    assert (found[:, others][..., 1:4].abs() > 1e-6).all()


def test_tables_by_class_and_agreement() -> None:
    values = torch.rand(7, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    values[:, :, :, 3] = -values[:, :, :, 0].exp()
    values = values.round(decimals=1)
    found = HeadImportance(values, torch.tensor([0, 1, 0, 2, 2, 2, 1]), ("a", "b", "c", "d"))
    assert_near(found.mean(), values.mean(0), 1e-6)
    assert_near(found.mean(2), values[3:6].mean(0), 1e-6)
    table = values[[1, 6]].mean(0)[..., 1]
    assert found.top("b", 2, label=1) == [divmod(int(n), 3) for n in table.flatten().sort(descending=True)[1][:2]]
    expected = spearmanr(values.mean(0).flatten(0, 1).numpy()).statistic
    assert_near(found.agreement(), torch.tensor(expected), 1e-6)


def test_hops_in_closed_form() -> None:
    grid, draw = (3, 4), torch.Generator().manual_seed(0)
    attn = torch.rand(2, 1, 3, 13, 13, generator=draw)
    attn[:, :, 0, 1:, 1:] = torch.eye(12)
    attn[:, :, 1, 1:, 1:] = 0.02
    attn = attn / attn.sum(-1, keepdim=True)
    inner = attn[..., 1:, 1:] / attn[..., 1:, 1:].sum(-1, keepdim=True)
    expected, pairs = torch.zeros(3, 4), torch.zeros(4)
    for query in range(12):
        for key in range(12):
            hop = max(abs(query // 4 - key // 4), abs(query % 4 - key % 4))
            expected[:, hop] += inner[:, 0, :, query, key].mean(0)
            pairs[hop] += 1
    found = hop_profile(attn, grid)[0]
    assert_near(found, expected / 12, 1e-6)
    assert_near(found.sum(-1), torch.ones(3), 1e-6)
    assert_near(found[0], torch.tensor([1.0, 0.0, 0.0, 0.0]), 1e-6)
    assert_near(found[1], pairs / 144, 1e-6)
    assert_near(uniform_hops(grid), pairs / 144, 1e-6)
    assert_near(hop_profile(attn, grid, per="patch")[0], expected / pairs, 1e-6)
    assert_near(hop_profile(attn, grid, per="patch")[0, 1], torch.full((4,), 1 / 12), 1e-6)
    assert_near(expected_hop(found), (found * torch.arange(4)).sum(-1), 1e-6)


def planted(noise: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return maps `(count, 1, 4, 16, 16)` of four families under noise, and their families `(count, 1, 4)`.

    The families: the query itself, the token after it, one key for all, and uniform.
    """
    draw = torch.Generator().manual_seed(seed)
    eye = torch.eye(16)
    pure = torch.stack([eye, eye.roll(1, 1), eye[[5]].expand(16, 16), torch.full((16, 16), 1 / 16)])
    gamma = -torch.rand(count, 1, 4, 16, 16, generator=draw).log()  # exponential draws, normalised: a flat Dirichlet
    return (1 - noise) * pure + noise * gamma / gamma.sum(-1, keepdim=True), torch.arange(4).expand(count, 1, 4)


def purity(clusters: Tensor, families: Tensor) -> float:
    """Return the share of maps that are in the most frequent family of their cluster."""
    table = torch.zeros(int(clusters.max()) + 1, 4)
    table.index_put_((clusters.flatten(), families.flatten()), torch.tensor(1.0), accumulate=True)
    return float(table.amax(1).sum() / table.sum())


def test_patterns_that_were_planted_are_found(claim: ClaimFixture) -> None:
    ours, pixels = [], []
    for seed in range(3):
        attn, families = planted(0.7, 60, seed)
        atlas = attention_patterns(attn, 0, latent=8, clusters=4, steps=150, seed=seed)
        ours.append(purity(atlas.clusters, families))
        draw = torch.Generator().manual_seed(seed)
        some = attn.flatten(0, 2).flatten(1)[:, torch.randperm(256, generator=draw)[:16]]
        pixels.append(purity(k_means(some, 4, generator=draw)[0], families))
    assert min(ours) >= 0.9
    claim(
        "purity of the clusters of planted attention patterns",
        ours=sum(ours) / 3, baseline=sum(pixels) / 3, better="higher", margin=0.1,
        baseline_name="k-means on 16 random pixels", seed=0,
    )  # fmt: skip


def test_an_atlas_shows_each_heads_pattern() -> None:
    attn, _ = planted(0.3, 40, 0)
    atlas = attention_patterns(attn, 0, latent=8, clusters=4, steps=400)
    common = atlas.common()[0].tolist()
    assert sorted(common) == [0, 1, 2, 3]
    assert_near(atlas.shares().sum(-1), torch.ones(1, 4), 1e-6)
    for head, cluster in enumerate(common):
        distance = (atlas.prototypes - attn[:, 0, head].mean(0)).abs().mean((1, 2))
        assert int(distance.argmin()) == cluster
        assert atlas.shares()[0, head, cluster] >= 0.9
    assert atlas.points.shape == (40, 1, 4, 2) and atlas.codes.shape == (40, 1, 4, 8)
    spread = atlas.codes.flatten(0, 2).var(0).sum()
    assert 0.5 * spread < atlas.points.flatten(0, 2).var(0).sum() <= spread * 1.001
    less = attention_patterns(attn, 0, latent=8, clusters=4, steps=0)
    assert atlas.error < less.error / 3
    again = attention_patterns(attn, 0, latent=8, clusters=4, steps=400)
    assert torch.equal(again.codes, atlas.codes) and torch.equal(again.clusters, atlas.clusters)
    assert attention_patterns(attn, 0, latent=4, clusters=3, size=5, steps=5).prototypes.shape == (3, 5, 5)


def test_a_trained_vit_end_to_end(claim: ClaimFixture) -> None:
    (x, y), first = heldout(), slice(0, None, 2)
    ranked, random = [], []
    for seed in (0, 1):
        model = classifier(2, 4, 2, seed, 300)
        whole = accuracy(model, x[1::2], y[1::2])
        assert whole >= 0.85
        top = pruning_importance(model, [(x[first], y[first])], ["prob_drop"]).top("prob_drop", 2)
        ranked.append(whole - accuracy(cut_heads(model, top), x[1::2], y[1::2]))
        draw = torch.Generator().manual_seed(seed)
        for _ in range(5):
            pair = [divmod(number, 4) for number in torch.randperm(8, generator=draw)[:2].tolist()]
            random.append(whole - accuracy(cut_heads(model, pair), x[1::2], y[1::2]))
    attn = attention_maps(model, x[:32])
    assert_near(hop_profile(attn).sum(-1), torch.ones(2, 4), 1e-5)
    assert attention_patterns(attn, clusters=3, steps=20).common().shape == (2, 4)
    claim(
        "accuracy lost on held-out digits without the two heads with the largest drop in probability",
        ours=sum(ranked) / len(ranked), baseline=sum(random) / len(random), better="higher", margin=0.1,
        baseline_name="two random heads", seed=0,
    )  # fmt: skip


ATTN = torch.rand(1, 1, 1, 17, 17)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: pruning_importance(model, []), "batches"),
        (lambda model: pruning_importance(model, [], ["drop"]), 'unknown metric "drop"'),
        (lambda model: pruning_importance(model, [], prune="two"), "prune="),
        (lambda model: pruning_importance(model, [(images(), torch.tensor([1]))]), "labels must be (6,)"),
        (lambda model: pruning_importance(model, [(images(), None)], ["jsd"]).top("prob_drop", 1), "unknown metric"),
        (lambda model: pruning_importance(model, [(images(), None)], ["jsd"]).mean(99), "label=99"),
        (lambda _: hop_profile(ATTN, (3, 4)), "grid=(3, 4)"),
        (lambda _: hop_profile(ATTN, per="pair"), "per="),
        (lambda _: attention_patterns(ATTN, latent=0), "latent="),
        (lambda _: attention_patterns(ATTN[0]), "attn must be"),
        (lambda _: attention_patterns(ATTN, clusters=2, steps=0), "clusters=2 must be in 1..1"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make(lively())
    assert message in str(caught.value) and "\n" not in str(caught.value)
