"""Joint pictures of queries and keys: attention stays as it is, and near comes to mean high attention."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import FoveateError
from foveate.lens import attention_view, attentionviz_matrix, joint_qk
from foveate.lens.views.joint_qk import separation
from foveate.lens.views.joint_scaling import GRID, correlation, key_shift, norm_scale, search_scale
from foveate.lens.views.projections import principal_components, projected
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, image, text, tiny
from tests.support.lab import lab, lab_ids
from tests.support.tensors import assert_near


def clouds(n: int = 120, d: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return queries, and keys whose mean is moved by 10 and whose spread is five times as large."""
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n, d, generator=draw, dtype=torch.float64).to(dtype)
    return q, 5 * k + 10


def clusters(n: int = 160, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys of four groups that match, keys moved and larger, and the groups."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.zeros(4, d)
    centres[:, :2] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    group = torch.arange(n) % 4
    q, k = (centres[group] + 0.3 * torch.randn(n, d, generator=draw) for _ in "qk")
    return q, 5 * k + 10, group


def attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


# -- the two maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["search", "norms", 0.2, 1.0, 5.0])
@pytest.mark.parametrize("shift", [True, False])
def test_attention_stays_as_it_is(scale: Any, shift: bool) -> None:
    q, k = clouds(dtype=torch.float64)
    found = joint_qk(q, k, scale=scale, shift=shift)
    assert (attention(found.q, found.k) - attention(q, k)).abs().max() < 1e-12
    small = joint_qk(q.float() / 4, k.float() / 4, scale=scale, shift=shift)
    assert (attention(small.q, small.k) - attention(q.float() / 4, k.float() / 4)).abs().max() < 1e-5
    assert_near(found.q, q * found.c, 1e-12)
    assert_near(found.k, (k + found.shift) / found.c, 1e-12)
    assert_near(found.shift, q.mean(0) - k.mean(0) if shift else torch.zeros_like(q[0]), 1e-12)


def test_means_come_together_and_norms_become_equal() -> None:
    q, k = clouds()
    found = joint_qk(q, k, scale="norms")
    assert_near(found.q.mean(0) / found.c, found.k.mean(0) * found.c, 1e-4)
    assert float(found.q.norm(dim=-1).median()) == pytest.approx(float(found.k.norm(dim=-1).median()), rel=1e-5)
    moved = k + key_shift(q, k)
    assert norm_scale(q, moved) == pytest.approx(
        float((moved.norm(dim=-1).median() / q.norm(dim=-1).median()).sqrt()), rel=1e-6
    )
    assert found.c == pytest.approx(5**0.5, rel=0.05), "the inverse of the ratio that the study words"


# -- the criterion -----------------------------------------------------------------------------------------------------


def test_the_correlation_matches_a_loop() -> None:
    q, k = (x.double() for x in clouds(12, 4))
    pairs = [(i, j) for i in range(12) for j in range(12)]
    far = torch.tensor([float((q[i] - k[j]).norm()) for i, j in pairs], dtype=torch.float64)
    near = torch.tensor([float(q[i] @ k[j]) for i, j in pairs], dtype=torch.float64)
    expected = torch.corrcoef(torch.stack([far, near]))[0, 1]
    assert correlation(q, k) == pytest.approx(float(expected), abs=1e-9)
    limit = far.sort().values[round(0.25 * 144) - 1]
    weight = (limit - far).clamp_min(0.0) ** 2
    assert int((weight > 0).sum()) == 35
    a, b = (x - (weight * x).sum() / weight.sum() for x in (far, near))
    own = (weight * a * b).sum() / ((weight * a**2).sum() * (weight * b**2).sum()).sqrt()
    assert correlation(q, k, "weighted", 0.25) == pytest.approx(float(own), abs=1e-9)
    assert correlation(torch.ones(3, 2), torch.ones(3, 2)) == 0.0
    assert correlation(torch.ones(9, 2), torch.ones(9, 2), "weighted") == 0.0


def test_the_search_takes_the_most_negative_correlation() -> None:
    """With its sign: the keys' factor with the largest correlation in size is positive here, and the worst."""
    q, k = clouds()
    k = k + key_shift(q, k)
    tried = {factor: correlation(q * factor, k / factor, "weighted") for factor in GRID}
    assert search_scale(q, k) == min(tried, key=tried.__getitem__)
    draw = torch.Generator().manual_seed(3)
    line = torch.linspace(1, 3, 40)[:, None] * F.normalize(torch.ones(1, 6), dim=-1)
    q, k = line + 0.01 * torch.randn(40, 6, generator=draw), 1.5 * line.flip(0)
    signed = {factor: correlation(q * factor, k / factor) for factor in GRID}
    assert max(signed.values()) > 0 > min(signed.values())
    largest = max(signed, key=lambda factor: abs(signed[factor]))
    assert signed[largest] > 0 and search_scale(q, k, criterion="plain") != largest


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_criteria_differ_on_a_head_with_one_tight_cluster(seed: int) -> None:
    """Its far pairs rule the plain correlation; the weighted one follows the other tokens, which lie closer."""
    q, k = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(seed))
    q[:30], k[:30] = 6 + 0.05 * q[:30], 1 + 0.05 * k[:30]
    k = k + key_shift(q, k)
    assert search_scale(q, k) >= 0.8 and search_scale(q, k, criterion="plain") == 0.4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_nearest_half_percent_of_pairs_holds_a_few_keys(seed: int) -> None:
    """So the other reading of the study's "0.5 percentile" chooses a factor by the keys with the smallest norms."""
    q, k = clouds(300, seed=seed)
    k = k + key_shift(q, k)
    by_norms = norm_scale(q, k)
    assert abs(search_scale(q, k) - by_norms) < 0.5, "the factor of the grid next to that of equal norms"
    other = search_scale(q, k, quantile=0.005)
    distance = torch.cdist(q * other, k / other)
    close = distance < distance.flatten().kthvalue(round(0.005 * 300 * 300)).values
    assert other in (0.2, 0.4, 0.8) and int(close.any(0).sum()) < 25 < 200 < int(close.any(1).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_distance_becomes_a_measure_of_attention(claim: ClaimFixture, seed: int) -> None:
    q, k = clouds(seed=seed)
    measures = joint_qk(q, k).measures()
    claim(
        "size of the correlation of distance and product, for keys moved by 10 and five times as large",
        ours=-measures["correlation_after"], baseline=abs(measures["correlation_before"]), better="higher", margin=0.3,
        baseline_name="queries and keys as they are", seed=seed,
    )  # fmt: skip
    assert measures["centroid_distance_before"] > 1 and measures["centroid_distance_after"] < 0.5
    assert measures["norm_ratio_before"] > 8 and 0.4 < measures["norm_ratio_after"] < 2.5
    assert measures["separation_before"] > 0.3 and abs(measures["separation_after"]) < 0.15


def nearest_share(q_xy: Tensor, k_xy: Tensor, group: Tensor) -> float:
    """Return how often the key nearest to a query is of its group."""
    return (group[torch.cdist(q_xy, k_xy).argmin(1)] == group).double().mean().item()


@pytest.mark.parametrize("method", ["pca", pytest.param("tsne", marks=pytest.mark.slow)])
def test_planted_clusters_meet(claim: ClaimFixture, method: Any) -> None:
    if method == "tsne":
        pytest.importorskip("sklearn")
    q, k, group = clusters()
    found = joint_qk(q, k, method)
    raw = joint_qk(q, k, method, scale=1.0, shift=False)
    assert raw.c == 1.0 and torch.equal(raw.q, q) and torch.equal(raw.k, k)
    ours, baseline = (nearest_share(each.q_xy, each.k_xy, group) for each in (found, raw))
    assert ours >= 0.9 and baseline < 0.6
    claim(
        f"share of queries whose nearest key in the picture ({method}) is of their own planted cluster",
        ours=ours, baseline=baseline, better="higher", margin=0.3, baseline_name="queries and keys as they are", seed=0,
    )  # fmt: skip


def test_separation_by_hand() -> None:
    q, k = torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]])
    expected = [(10.5 - 1) / 10.5, (9.5 - 1) / 9.5]
    assert separation(q, k) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert separation(q, k) == pytest.approx(separation(k, q))


# -- projections -------------------------------------------------------------------------------------------------------


def test_principal_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    ours, theirs = principal_components(points, 3), torch.from_numpy(decomposition.PCA(3).fit_transform(points.numpy()))
    for axis in range(3):
        sign = 1.0 if float((ours[:, axis] * theirs[:, axis]).sum()) > 0 else -1.0
        assert_near(ours[:, axis], sign * theirs[:, axis].float(), 1e-4)
    assert principal_components(points[:, :1], 2)[:, 1].abs().max() == 0.0


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("dim", [2, 3])
def test_equal_points_give_equal_pictures(method: Any, dim: int) -> None:
    if method == "tsne":
        pytest.importorskip("sklearn")
    q, k = clouds(30)
    first, second = joint_qk(q, k, method, dim), joint_qk(q, k, method, dim)
    assert first.q_xy.shape == first.k_xy.shape == (30, dim)
    assert torch.equal(first.q_xy, second.q_xy) and torch.equal(first.k_xy, second.k_xy)
    assert bool(torch.cat([first.q_xy, first.k_xy]).isfinite().all())


def test_the_metric_is_heard() -> None:
    pytest.importorskip("sklearn")
    points = torch.cat([x * y for x in (torch.eye(2)[:1], torch.eye(2)[1:]) for y in (0.5, 1.0, 9.0, 9.5)])
    points = points + 0.01 * torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    cosine, euclidean = (projected(points, "tsne", 2, metric) for metric in ("cosine", "euclidean"))
    near = [torch.cdist(each, each)[0, [2, 4]].argmin().item() for each in (cosine, euclidean)]
    assert near == [0, 1], "in one direction; in one place"
    assert torch.equal(projected(points, "pca", 2, "cosine"), projected(points, "pca", 2, "euclidean"))


@pytest.mark.parametrize(
    ("method", "module", "package"), [("tsne", "sklearn", "scikit-learn"), ("umap", "umap", "umap-learn")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, method: Any, module: str, package: str) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == module:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FoveateError) as caught:
        joint_qk(*clouds(8), method)
    assert str(caught.value) == f'method="{method}" needs the package {package}: pip install "foveate[views]"'


def test_umap_is_called_with_the_given_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is large, and its results are its own; the call is ours."""
    calls: list[dict[str, Any]] = []

    class UMAP:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def fit_transform(self, points: Any) -> Any:
            assert points.shape == (20, 16)
            return points[:, : calls[-1]["n_components"]]

    fake = types.ModuleType("umap")
    fake.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", fake)
    found = joint_qk(*clouds(10), "umap", 3, "euclidean")
    assert found.q_xy.shape == (10, 3)
    (options,) = calls
    assert (options["metric"], options["n_components"], options["random_state"]) == ("euclidean", 3, 0)
    assert options["init"].shape == (20, 3) and options["n_neighbors"] == 15


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_matrix_holds_every_heads_queries_and_keys() -> None:
    model, inputs = tiny("llama"), text("left")
    seen = attentionviz_matrix(model, inputs)
    assert set(seen.heads) == {(layer, head) for layer in range(2) for head in range(4)}
    assert len(seen.queries) == 17 + 24 and seen.keys is seen.queries and [len(t) for t in seen.texts] == [17, 24]
    stacks = [attention_view(model, inputs, item=item).stack() for item in range(2)]
    for (layer, head), found in seen.heads.items():
        assert_near(found.raw_q, torch.cat([each.products[layer].q[head] for each in stacks]), 1e-6)
        assert_near(found.raw_k, torch.cat([each.products[layer].k[head // 2] for each in stacks]), 1e-6)
    maps = eager_maps(model, inputs)[1][1, 3]  # the second text
    strongest = seen.strongest[1, 3]
    for query in (0, 7, 23):
        keys, weights = strongest.keys[17 + query], strongest.weights[17 + query]
        assert weights.tolist() == pytest.approx(maps[query].sort(descending=True).values[:8].tolist(), abs=1e-5)
        assert all(key >= 17 for key in keys.tolist())
        assert_near(maps[query, keys - 17], weights, 1e-5)
    rows = seen.measures()
    assert len(rows) == 8 * 9 and {row["measure"] for row in rows} >= {"c", "correlation_after", "separation_before"}
    assert next(row["value"] for row in rows if row["measure"] == "c") == seen.heads[0, 0].c


def test_points_are_chosen_from_all_texts() -> None:
    inputs = text()["input_ids"]
    whole = attentionviz_matrix(tiny("llama"), [inputs, {"input_ids": inputs}], layers=[1])
    assert len(whole.queries) == 96 and whole.queries.text.unique().tolist() == [0, 1, 2, 3] and len(whole.heads) == 4
    even = attentionviz_matrix(tiny("llama"), inputs, layers=[1], points=12)
    assert even.queries.place.tolist() == [0, 4, 8, 12, 16, 20] * 2
    drawn = [
        attentionviz_matrix(
            tiny("llama"), inputs, layers=[1], points=12, generator=torch.Generator().manual_seed(seed)
        ).queries.place.tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    few = attentionviz_matrix(tiny("llama"), inputs[:, :3], layers=[0])
    assert bool((few.strongest[0, 0].keys[:, 3:] == -1).all())


def test_images_and_encoder_decoders() -> None:
    seen = attentionviz_matrix(tiny("vit"), image(), layers=[0])
    assert seen.patches is not None and seen.patches.shape == (34, 3) and seen.queries.tokens[1] == "0,0"
    assert seen.patches[0].tolist() == [0.5] * 3
    pixels = image()["pixel_values"][1]
    scaled = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    assert_near(seen.patches[17 + 1 + 5], scaled[:, 8:16, 8:16].mean((1, 2)), 1e-5)
    from tests.systems.lens.test_bertviz import bart

    inputs = text() | {"decoder_input_ids": text()["input_ids"][:, :9]}
    cross = attentionviz_matrix(bart(), inputs, part="cross", layers=[1])
    assert len(cross.queries) == 18 and len(cross.keys) == 48
    assert cross.heads[1, 0].q_xy.shape == (18, 2) and cross.heads[1, 0].k_xy.shape == (48, 2)


def test_queries_and_keys_of_a_trained_decoder_meet(claim: ClaimFixture) -> None:
    """Its keys are no longer than its queries, so that distance tells as much of attention before, -0.57, as after."""
    model = lab()[0]
    texts = ["The garbage collector frees objects.", "It runs often, but never for long, and then it stops again."]
    seen = attentionviz_matrix(model, map(lab_ids, texts))
    mean = {
        name: torch.tensor([row["value"] for row in seen.measures() if row["measure"] == name]).mean().item()
        for name in ("correlation_before", "correlation_after", "separation_before", "separation_after")
    }
    claim(
        "separation of queries and keys, a mean over the lab's heads",
        ours=mean["separation_after"], baseline=mean["separation_before"], better="lower", margin=0.1,
        baseline_name="queries and keys as they are", seed=0,
    )  # fmt: skip
    assert mean["correlation_after"] == pytest.approx(mean["correlation_before"], abs=0.1)


# -- bad input ---------------------------------------------------------------------------------------------------------

Q, K = clouds(6, 4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: joint_qk(Q, K[:, :3]), "Q must be (n, d) and K (m, d)"),
        (lambda: joint_qk(Q[None], K[None]), "Q must be (n, d)"),
        (lambda: joint_qk(Q[:0], K), "Q must be (n, d)"),
        (lambda: joint_qk(Q[:1], K[:1]), "at least 4 queries and keys"),
        (lambda: joint_qk(Q, K, "lda"), "method='lda' must be one of"),  # type: ignore[arg-type]
        (lambda: joint_qk(Q, K, dim=4), "dim=4 must be one of 2, 3"),
        (lambda: joint_qk(Q, K, metric="l1"), "metric='l1' must be"),  # type: ignore[arg-type]
        (lambda: joint_qk(Q, K, scale="best"), "scale='best' must be"),  # type: ignore[arg-type]
        (lambda: joint_qk(Q, K, scale=0.0), "scale=0.0 must be"),
        (lambda: joint_qk(Q, K, shift=1), "shift=1 must be True or False"),  # type: ignore[arg-type]
        (lambda: joint_qk(Q, K, criterion="unweighted"), "criterion='unweighted' must be"),  # type: ignore[arg-type]
        (lambda: joint_qk(Q, K, quantile=2.0), "quantile=2.0 must be in"),
        (lambda: search_scale(Q, K, ()), "grid=() must be factors above 0"),
        (lambda: search_scale(Q, K, (1.0, -1.0)), "factors above 0"),
        (lambda: separation(Q[:1], K), "at least 2 queries"),
        (lambda: attentionviz_matrix(tiny("llama"), []), "at least one text or image"),
        (lambda: attentionviz_matrix(tiny("llama"), text(), points=3), "points=3 must be"),
        (lambda: attentionviz_matrix(tiny("llama"), {"ids": text()["input_ids"]}), "inputs must hold input_ids"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
