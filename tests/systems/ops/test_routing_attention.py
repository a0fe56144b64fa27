"""Routing attention: equal to a loop written from the paper, its clusters, its updates, and what routing finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core import oracle
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import Rotary, RoutingSelfAttention
from foveate.ops import RoutingAttention, SlidingWindow
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near, qkv


def made(
    heads: int, width: int, clusters: int, window: int | None = None, seed: int = 0, **options
) -> RoutingAttention:  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(seed)
    return RoutingAttention(heads, width, clusters, window, generator=random, **options).double()


def normal(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def by_the_paper(
    q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, window: int, causal: bool, shared: bool, self_mask: bool
) -> Tensor:
    """One head, `(N, D)`: a dictionary of outputs for each query, cluster by cluster and token by token."""
    q, k = normal(q), normal(q if shared else k)
    outputs: dict[int, list[Tensor]] = {i: [] for i in range(len(q))}
    for mu in centroids:
        mine = (q @ mu).argsort(descending=True)[:window].tolist()
        theirs = mine if causal or shared else (k @ mu).argsort(descending=True)[:window].tolist()
        for i in mine:
            seen = [j for j in theirs if not causal or j <= i]
            if self_mask and seen != [i]:
                seen = [j for j in seen if j != i]
            if seen:
                weights = torch.softmax(k[seen] @ q[i] / math.sqrt(q.shape[1]), 0)
                outputs[i].append(weights @ v[seen])
    return torch.stack([torch.stack(each).mean(0) if each else torch.zeros_like(v[0]) for each in outputs.values()])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"shared_qk": True}, {"shared_qk": True, "self_mask": True}])
@pytest.mark.parametrize("window", [1, 6, 9])
def test_it_is_the_paper(causal: bool, options: dict[str, bool], window: int) -> None:
    q, k, v = qkv(24)
    op = made(4, 8, 4, window, **options)
    shared, self_mask = options.get("shared_qk", False), options.get("self_mask", False)
    expected = torch.stack([
        torch.stack([
            by_the_paper(q[b, h], k[b, h // 2], v[b, h // 2], op.centroids[h], window, causal, shared, self_mask)
            for h in range(4)
        ])
        for b in range(2)
    ])  # fmt: skip
    assert_near(op(q, k, v, causal=causal), expected, 1e-10)
    assert_near(op(q, k, v, causal=causal, engine="reference"), expected, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_is_attention_of_the_normalized_tokens(causal: bool) -> None:
    q, k, v = qkv(21)
    for op, keys in ((made(4, 8, 1), k), (made(4, 8, 3, 21), k)):
        expected = oracle.attention(normal(q), normal(keys), v, causal=causal)
        assert_near(op(q, k, v, causal=causal), expected, 1e-10)
    shared = made(4, 8, 1, shared_qk=True)
    expected = oracle.attention(normal(q), normal(q), v.repeat_interleave(2, 1), causal=causal)
    assert_near(shared(q, k, v, causal=causal), expected, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window, expected", [(None, 7), (5, 5), (99, 34)])
def test_every_cluster_has_as_many_tokens_in_order(causal: bool, window: int | None, expected: int) -> None:
    q, k, _ = qkv(34)
    queries, keys = made(4, 8, 5, window)._clusters(q, k, None, causal)
    assert queries.shape == keys.shape == (2, 4, 5, expected)
    assert (queries.diff(dim=-1) > 0).all() and (keys.diff(dim=-1) > 0).all()
    assert torch.equal(queries, keys) == (causal or expected == 34)


def test_no_weight_is_on_a_later_key() -> None:
    q, k, _ = qkv(40)
    weights = made(4, 8, 6).weights(q, k, causal=True)
    assert not weights.triu(1).any()
    rows = weights.sum(-1)
    assert torch.allclose(rows[rows > 0], torch.ones(()).double()), "a row sums to 1, or is empty"
    assert (rows == 0).any() and (rows > 0).double().mean() > 0.5


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys_take_no_place_in_a_cluster(causal: bool) -> None:
    """In a causal call the real tokens of a padded sequence are routed as without padding."""
    q, k, v = qkv(20)
    real = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    real[1, ..., :4] = False
    op = made(4, 8, 4, 4)
    queries, keys = op._clusters(q, k, real, causal)
    assert (keys[1] >= 4).all() and (keys[0] < 4).any()
    assert (queries[1] >= 4).all() == causal
    if causal:
        alone = op(*(x[1:, :, 4:] for x in (q, k, v)), causal=True)
        assert_near(op(q, k, v, mask=real, causal=True)[1:, :, 4:], alone, 1e-10)


def test_a_query_counts_the_clusters_in_which_it_sees_a_key() -> None:
    q, k, v = qkv(16)
    mask, op = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2, made(4, 8, 4, 8)
    weights = op.weights(q, k, mask=mask)
    assert_near(op(q, k, v, mask=mask), weights @ v.repeat_interleave(2, 1), 1e-10)
    rows = weights.sum(-1)
    assert torch.allclose(rows[rows > 0], torch.ones(()).double())


# -- centroids ---------------------------------------------------------------------------------------------------------


def planted(clusters: int, n: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make tokens `(1, 1, N, D)` around directions, shuffled, and the number of the direction of each."""
    random = torch.Generator().manual_seed(seed)
    centres = normal(torch.randn(clusters, width, generator=random, dtype=torch.float64))
    label = (torch.arange(n) % clusters)[torch.randperm(n, generator=random)]
    noise = spread * torch.randn(n, width, generator=random, dtype=torch.float64)
    return (centres[label] + noise)[None, None], label


def test_an_update_is_the_papers() -> None:
    q, k, _ = qkv(12, heads=2, kv_heads=1)
    op = made(2, 8, 3, decay=0.7)
    before, (x, y) = op.centroids.clone(), (normal(q), normal(k))
    op.update(q, k)
    for h in range(2):
        for c in range(3):
            moved = 0.7 * before[h, c]
            for tokens in (x[:, h].flatten(0, 1), y[:, 0].flatten(0, 1)):
                mine = (tokens @ before[h].T).argmax(1) == c
                moved = moved + 0.15 * tokens[mine].sum(0)
            assert_near(op.centroids[h, c], moved / moved.norm() * math.sqrt(8), 1e-10)
    frozen, twice = made(2, 8, 3, decay=1.0), made(2, 8, 3, decay=0.7)
    frozen.update(q, k)
    assert_near(frozen.centroids, before, 1e-6)
    twice.update(torch.cat([q, 0 * q], 2), k)
    assert_near(twice.centroids, op.centroids, 1e-12)


def test_updates_find_planted_clusters(claim: ClaimFixture) -> None:
    """Drawn tokens leave some of 8 clusters without a centroid. Updates find more, but not all: some settle between."""
    found: dict[int, list[int]] = {0: [], 50: []}
    for seed in range(8):
        x, label = planted(8, 256, 32, 0.1, seed)
        for updates, each in found.items():
            op = made(1, 32, 8, decay=0.9)
            op.start(x, torch.Generator().manual_seed(seed))
            for _ in range(updates):
                op.update(x)
            taken = label[op._clusters(x, x)[0][0, 0]]
            each.append(len({int(row.bincount().argmax()) for row in taken}))
    claim(
        "50 updates move centroids that start at drawn tokens to more of 8 planted clusters: clusters with a centroid",
        ours=sum(found[50]) / 8, baseline=sum(found[0]) / 8, better="higher", margin=0.8,
        baseline_name="the drawn tokens", seed=0,
    )  # fmt: skip


def test_centroids_that_start_near_their_clusters_take_all_of_them() -> None:
    for seed in range(3):
        x, label = planted(8, 256, 32, 0.1, seed)
        op = made(1, 32, 8, decay=0.9)
        first = torch.stack([x[0, 0, label == c][0] for c in range(8)])
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
        op.centroids.copy_((first + 1.2 * noise)[None])

        start = op.centroids.clone()
        for _ in range(50):
            op.update(x)
        centres = torch.stack([normal(x)[0, 0, label == c].mean(0) for c in range(8)])
        before, after = (F.cosine_similarity(mu[0], centres, dim=-1) for mu in (start, op.centroids))
        assert before.max() < 0.9 and after.min() > 0.9999
        taken = label[op._clusters(x, x)[0][0, 0]]
        assert all(set(row.tolist()) == {c} for c, row in enumerate(taken)), "32 tokens of one cluster, all of them"


def test_the_start_is_at_tokens() -> None:
    x = qkv(9, heads=4)[0]
    op = made(4, 8, 5)
    op.start(x)
    tokens = normal(x).transpose(0, 1).flatten(1, 2)
    nearest = torch.cdist(op.centroids, tokens)
    assert (nearest.min(-1).values < 1e-6).all()
    assert all(len(set(row.tolist())) == 5 for row in nearest.argmin(-1))
    with pytest.raises(ShapeError, match="at least 5 tokens"):
        op.start(x[:1, :, :4])


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_routing_finds_what_a_window_does_not(claim: ClaimFixture) -> None:
    """256 keys in 16 directions, anywhere; sharp attention; 16 keys for each query."""
    x, _ = planted(16, 256, 32, 0.1)
    v = torch.randn(1, 1, 256, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = oracle.attention(normal(x), normal(x), v, scale=8 / math.sqrt(32))
    op = made(1, 32, 16, 16, decay=0.9)
    op.start(x, torch.Generator().manual_seed(0))
    for _ in range(50):
        op.update(x)
    at = torch.arange(256)
    near = ((at[:, None] - at).abs() <= 8)[None, None]

    def error(out: Tensor) -> float:
        return ((out - target).norm() / target.norm()).item()

    claim(
        "16 routed keys of 256 hold the weights of sharp attention to 16 scattered directions: error of the output",
        ours=error(op(x, x, v, scale=8 / math.sqrt(32))),
        baseline=0.35 * error(oracle.attention(normal(x), normal(x), v, scale=8 / math.sqrt(32), mask=near)),
        better="lower", baseline_name="0.35 x that of the 17 nearest positions", seed=0,
    )  # fmt: skip


def test_only_pairs_inside_clusters_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, *rest, **options) -> Tensor:  # type: ignore[no-untyped-def]
        seen.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return real(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v = qkv(256, batch=1)
    op = made(4, 8, 16)
    op(q, k, v)
    assert seen == [4 * op.pairs(256, 256, False)] == [4 * 16 * 16 * 16]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clusters": 0}, "clusters=0"), ({"window": 0}, "window=0"), ({"decay": 1.5}, "decay=1.5"),
        ({"self_mask": True}, "needs shared_qk=True"), ({"heads": 0}, "heads=0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        RoutingAttention(**{"heads": 4, "head_dim": 8, **options})  # type: ignore[arg-type]


def test_bad_calls_are_refused() -> None:
    for op in (RoutingAttention(2, 8), RoutingAttention(4, 6)):
        with pytest.raises(ShapeError, match="built for Hq="):
            op(*qkv(12))
        with pytest.raises(ShapeError, match="built for Hq="):
            op.update(qkv(12)[0])
    with pytest.raises(UnsupportedPattern, match="cross"):
        RoutingAttention(4, 8, shared_qk=True)(*qkv(9, 12))


def test_hidden_tokens_reach_nothing_where_queries_are_keys() -> None:
    q, k, v = qkv(20)
    real = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    real[..., 7] = False
    op = made(4, 8, 3, 20, shared_qk=True)
    seen = [i for i in range(20) if i != 7]
    q[:, :, 7] = 0.0
    for mask in (real, torch.zeros(real.shape, dtype=q.dtype).masked_fill(~real, float("-inf"))):
        clean = op(q, k, v, mask=mask)[:, :, seen]
        dirty = q.clone()
        dirty[:, :, 7] = float("nan")
        assert_near(op(dirty, k, v, mask=mask)[:, :, seen], clean, 1e-12)


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_the_layer_is_its_two_kinds_of_heads() -> None:
    torch.manual_seed(0)
    layer = RoutingSelfAttention(32, 4, 1, 3, 8, local_window=4, position=Rotary()).double().eval()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    q, k, v = layer.project(x, x, None)
    at = torch.arange(20)
    q, k = layer.position.rotate(q, at), layer.position.rotate(k, at)
    near = SlidingWindow(4)(q[:, :1], k[:, :1], v[:, :1], causal=True)
    far = layer.op(q[:, 1:], k[:, 1:], v[:, 1:], causal=True)
    expected = layer.out(torch.cat([near, far], 1).transpose(1, 2).flatten(2))
    assert_near(layer(x, causal=True), expected, 1e-12)


def test_centroids_move_in_training_alone_and_hidden_tokens_do_not_move_them() -> None:
    torch.manual_seed(0)
    layer, x = RoutingSelfAttention(16, 4, clusters=3).double(), torch.randn(2, 20, 16, dtype=torch.float64)
    start = layer.op.centroids.clone()
    layer.eval()(x, causal=True)
    assert torch.equal(layer.op.centroids, start)
    real = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    real[..., 15:] = False
    moved = []
    for garbage in (0.0, 9.0):
        layer.op.centroids.copy_(start)
        x[:, 15:] = garbage
        layer.train()(x, mask=real, causal=True).sum().backward()
        moved.append(layer.op.centroids.clone())
    assert not torch.equal(moved[0], start)
    assert_near(moved[0], moved[1], 1e-12)
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("local", [4, 7, -1])
def test_some_head_has_to_route(local: int) -> None:
    with pytest.raises(OptionError, match="local_heads"):
        RoutingSelfAttention(16, 4, local)
