"""The survey's attention: alignments, distributions, a local window, and the four categories of the catalogue."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, oracle
from foveate.core.catalog import CATEGORIES, systems
from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import Tile
from foveate.ops.dense.attention_taxonomy import SurveyAttention
from foveate.ops.functional.alignment import ALIGNMENTS, Additive, Alignment, ScaledDot
from foveate.ops.functional.normalizers import DISTRIBUTIONS, entmax, sparsemax
from tests.ops.plans import score_products
from tests.support.tensors import assert_near, gradients, qkv

HEADS, WIDTH = 4, 8
INNER = ("similarity", "dot", "scaled_dot", "general", "biased_general", "kernel")


def built(alignment: str | Alignment = "scaled_dot", distribution="softmax", **options) -> SurveyAttention:
    if alignment == "location":
        options = {"positions": 12, **options}
    if alignment in ("additive", "concat", "deep", "feature"):
        options = {"hidden": 5, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        op = SurveyAttention(alignment, distribution, heads=HEADS, head_dim=WIDTH, **options).double()
        for parameter in op.parameters():
            parameter.data.normal_()
    return op


def plain_logits(op: SurveyAttention, q: Tensor, k: Tensor) -> Tensor:
    """Return the alignment's logits, with keys repeated for every query head."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    n_queries, n_keys = q.shape[2], k.shape[2]
    at = Tile(torch.arange(n_keys - n_queries, n_keys), torch.arange(n_keys), n_keys, n_queries, False)
    logits = op.alignment.score(*op.alignment.prepare(q, k), at)
    return logits * default_scale(op)


def default_scale(op: SurveyAttention) -> float:
    return WIDTH**-0.5 if isinstance(op.alignment, ScaledDot) else 1.0


# -- limits ------------------------------------------------------------------------------------------------------------


def test_initially_it_is_scaled_dot_product_attention() -> None:
    q, k, v = qkv(9, 12, value_width=5)
    k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    assert_near(SurveyAttention()(q, k, v), F.scaled_dot_product_attention(q, k4, v4), 1e-12)


def test_limits() -> None:
    q, k, v = qkv(9)
    expected = oracle.attention(q, k, v, causal=True)
    for op in (
        built("scaled_dot", "entmax", alpha=1),
        built(window=math.inf),
        built(window=1e9),
        built(Identity()),
    ):
        scale = WIDTH**-0.5 if isinstance(op.alignment, Identity) else None
        assert_near(op(q, k, v, causal=True, scale=scale), expected, 1e-10)
    two = built("dot", "entmax", alpha=2)(q, k, v)
    assert_near(two, built("dot", "sparsemax")(q, k, v), 1e-12)
    general = built("general")
    with torch.no_grad():
        general.alignment.w.copy_(torch.eye(WIDTH))
    assert_near(general(q, k, v), built("dot")(q, k, v), 1e-12)


class Identity(Alignment):
    """A custom alignment."""

    def score(self, q: Tensor, k: Tensor, at: Tile) -> Tensor:
        return torch.einsum("bhqd,bhkd->bhqk", q, k)


# -- any alignment with any distribution -------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "entmax"])
def test_weights_are_the_distribution_of_the_logits(alignment: str, distribution: str) -> None:
    q, k, v = qkv(9, 12, value_width=5)
    op = built(alignment, distribution)
    logits = plain_logits(op, q, k)
    p = entmax if distribution == "entmax" else DISTRIBUTIONS[distribution]
    for causal, scale in ((False, None), (True, 0.3)):
        factor = 1.0 if scale is None else scale / default_scale(op)
        seen = masks.causal(9, 12) if causal else torch.ones(9, 12, dtype=torch.bool)
        expected = p((factor * logits).masked_fill(~seen, -math.inf))
        assert_near(op.weights(q, k, causal=causal, scale=scale), expected, 1e-10)
        out = op(q, k, v, causal=causal, scale=scale)
        assert_near(out, expected @ v.repeat_interleave(2, 1), 1e-10)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("options", [{}, {"distribution": "entmax", "window": 3.0}], ids=["softmax", "local entmax"])
def test_engines_and_streaming(alignment: str, options: dict) -> None:
    q, k, v = qkv(12, grad=True)
    op = built(alignment, **options)
    wanted = [q, k, v, *op.parameters()]
    whole, chunks = (op(q, k, v, causal=True, engine=engine) for engine in ("reference", "chunked"))
    assert_near(chunks, whole, 1e-10)
    for one, other in zip(gradients(chunks, wanted), gradients(whole, wanted), strict=True):
        assert_near(one, other, 1e-9)
    state = op.init_state(2, HEADS, 2, WIDTH, WIDTH, dtype=torch.float64)
    for t in range(12):
        out, state = op.step(*(x.detach()[:, :, t : t + 1] for x in (q, k, v)), state)
        assert_near(out, whole[:, :, t : t + 1], 1e-10)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_hidden_tokens_have_no_effect(alignment: str) -> None:
    found = []
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[..., 4] = mask[1, ..., 0] = False
    for garbage in (float("nan"), 7.0):
        q, k, v = qkv(9, 12)
        k[:, :, 4], v[:, :, 4] = garbage, garbage
        op = built(alignment)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = op(*leaves, mask=mask)
        found.append((out, *gradients(out, [*leaves, *op.parameters()])))
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-12)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_inner_products_run_on_fused_kernels(alignment: str) -> None:
    tensors = qkv(12)
    assert (built(alignment).plan(*tensors).engine == "fused") == (alignment in INNER)
    assert built(alignment, "sparsemax").plan(*tensors).engine == "reference"
    assert built(alignment, window=2).plan(*tensors).engine == "reference"


def test_only_a_softmax_is_merged_tile_by_tile() -> None:
    """The chunked engine reads 1,024 keys at a time, which would be wrong for a normalizer of whole rows."""
    q, k, v = qkv(4, 1100, heads=4)
    k = 3 * k
    for op in (built("additive"), built("dot", "sparsemax"), built(window=700)):
        assert_near(op(q, k, v, engine="chunked"), op(q, k, v, engine="reference"), 1e-10)


# -- local and hard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_local_window_by_hand(causal: bool) -> None:
    """The local window is a softmax over keys near the predicted position, times a Gaussian, not normalized again."""
    q, k, _ = qkv(9, 12)
    op = built(window=2, sigma=1.3)
    ours, logits = op.weights(q, k, causal=causal), plain_logits(op, q, k)
    for b, h, i in itertools.product(range(2), range(HEADS), range(9)):
        seen = i + 3 + 1 if causal else 12
        p = seen * torch.sigmoid(op.local.v[h] @ torch.tanh(op.local.w[h] @ q[b, h, i])).item()
        near = [s for s in range(seen) if abs(s - p) <= 2]
        soft = torch.softmax(logits[b, h, i, near], -1)
        expected = torch.zeros(12, dtype=torch.float64)
        for weight, s in zip(soft, near, strict=True):
            expected[s] = weight * math.exp(-((s - p) ** 2) / (2 * 1.3**2))
        assert_near(ours[b, h, i], expected.detach(), 1e-12)


def test_the_window_learns() -> None:
    """The Gaussian passes a gradient to the prediction."""
    q, k, v = qkv(9)
    op = built(window=3)
    assert all(grad.any() for grad in gradients(op(q, k, v), list(op.local.parameters())))


def test_hard_attention() -> None:
    q, k, v = qkv(9, grad=True)
    op = built("general", "argmax")
    best = plain_logits(op, q, k).argmax(-1)
    expected = v.repeat_interleave(2, 1).gather(2, best[..., None].expand(-1, -1, -1, WIDTH))
    out = op(q, k, v)
    assert_near(out, expected, 1e-12)
    assert not any(grad.any() for grad in gradients(out, [q, k, op.alignment.w]))


def sampler(seed: int, **options) -> SurveyAttention:
    return built("dot", "sample", generator=torch.Generator().manual_seed(seed), **options)


def test_samples() -> None:
    q, k, v = qkv(9, grad=True)
    out = sampler(0)(q, k, v, causal=True)
    assert torch.equal(sampler(0)(q, k, v, causal=True), out)
    assert not torch.equal(sampler(1)(q, k, v, causal=True), out)
    weights = sampler(0).weights(q, k, causal=True)
    assert (weights.max(-1).values == 1).all() and (weights.sum(-1) == 1).all()
    assert_near(out, weights @ v.repeat_interleave(2, 1), 1e-12)
    (expected,) = gradients(out, [v])
    chunks = sampler(0)(q, k, v, causal=True, engine="chunked")
    assert_near(chunks, out, 1e-12, "what was drawn")
    (grad,) = gradients(chunks, [v])
    assert_near(grad, expected, 1e-12, "drawn once, though chunks are computed twice")
    op = sampler(0)
    mean = sum(op.weights(0.5 * q, k) for _ in range(400)) / 400
    assert (mean - torch.softmax(0.5 * plain_logits(op, q, k), -1)).abs().mean() < 0.02
    assert op.capabilities.streaming == "own"
    assert built().capabilities.streaming == "exact"


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "aditive"}, "did you mean"),
        ({"alignment": "additive"}, "needs heads and head_dim"),
        ({"alignment": "dot", "hidden": 4}, "takes no hidden"),
        ({"alignment": Identity(), "hidden": 4, "depth": 2}, "depth, hidden must come with an alignment's name"),
        ({"distribution": "sofmax"}, "distribution='sofmax' must be one of"),
        ({"distribution": "entmax", "alpha": 0.5}, "alpha=0.5"),
        ({"alpha": 1.5}, 'alpha=1.5 must come with distribution="entmax"'),
        ({"distribution": "sample"}, "generator must come with distribution"),
        ({"generator": torch.Generator()}, "generator must come with distribution"),
        ({"sigma": 1.0}, "sigma=1.0 must come with a window"),
        ({"window": 2}, "window=2 must come with heads and head_dim"),
        ({"window": 2, "heads": 2}, "window=2 must come with heads and head_dim"),
        ({"window": 0, "heads": 2, "head_dim": 4}, "window=0"),
        ({"window": 2, "sigma": -1, "heads": 2, "head_dim": 4}, "sigma=-1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SurveyAttention(**options)


def test_a_call_of_another_size_is_refused() -> None:
    for op in (built("general"), built("additive")):
        with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=4, D=6"):
            op(*qkv(5, width=6))
    with pytest.raises(ShapeError, match="positions=12; got Nk=13"):
        built("location")(*qkv(13))


def test_pluggable_parts() -> None:
    q, k, v = qkv(9)
    mine = SurveyAttention(Additive(HEADS, WIDTH).double(), sparsemax)
    again = SurveyAttention(mine.alignment, "sparsemax")
    assert_near(mine(q, k, v), again(q, k, v), 1e-12)
    assert {name for name, _ in mine.named_parameters()} == {f"alignment.{part}" for part in ("w", "b", "w_q", "w_k")}
    kept = [built("dot", "entmax", alpha=alpha).weights(q, k).count_nonzero() for alpha in (1.2, None, 2.0)]
    assert kept[0] > kept[1] > kept[2]


# -- the catalogue by category -----------------------------------------------------------------------------------------


def of(**places: str) -> set[str]:
    return {row.key for row in systems() if all(place in getattr(row.taxonomy, name) for name, place in places.items())}


def test_every_row_has_values_in_all_four_categories() -> None:
    for row in systems():
        for name, known in CATEGORIES.items():
            places = getattr(row.taxonomy, name)
            assert places, row.key
            assert set(places) <= set(known), row.key


@pytest.mark.parametrize(
    ("places", "known", "strangers"),
    [
        (
            {"sequences": "co-attention", "positions": "soft"},
            {"attention_taxonomy"},
            {"softmax", "hip", "duo_attention"},
        ),
        ({"positions": "hard"}, {"hip", "token_select", "tidal_decode", "recycled_attention"}, {"softmax", "hedgehog"}),
        ({"positions": "local"}, {"sliding_window", "sink_recent", "s2_attention"}, {"softmax", "sigmoid_attention"}),
        ({"positions": "soft", "sequences": "distinctive"}, {"softmax", "sigmoid_attention"}, {"hip", "titans"}),
        ({"levels": "multi"}, {"attention_taxonomy"}, {"softmax"}),
        ({"representations": "multi-dimensional"}, {"attention_taxonomy"}, {"softmax", "sliding_window"}),
    ],
    ids=lambda value: "-".join(map(str, sorted(value.values() if isinstance(value, dict) else value))),
)
def test_queries(places: dict[str, str], known: set[str], strangers: set[str]) -> None:
    found = of(**places)
    assert known <= found
    assert not found & strangers


# -- a comparison of alignments
# ----------------------------------------------------------------------------------------------------------


class Needle:
    """A task whose queries are rotated keys: find the key of a query among the first `places` of n keys."""

    def __init__(self, seed: int, places: int = 64, width: int = 8, n: int = 64) -> None:
        self.random, self.places, self.n, self.width = torch.Generator().manual_seed(seed), places, n, width
        self.rotation = torch.linalg.qr(torch.randn(width, width, generator=self.random))[0]

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        k = F.normalize(torch.randn(size, 1, self.n, self.width, generator=self.random), dim=-1)
        at = torch.randint(self.places, (size,), generator=self.random)
        return (k[torch.arange(size), :, at] @ self.rotation)[:, :, None], k, at


def found_share(alignment: str, seed: int, places: int = 64, steps: int = 100) -> float:
    """Return the share of needles with the largest weight, after training on the weights' log-likelihood."""
    task = Needle(seed, places)
    options = {"positions": 64} if alignment == "location" else {"hidden": 32} if alignment == "additive" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        op = SurveyAttention(alignment, heads=1, head_dim=8, **options)
    sharpness = nn.Parameter(torch.tensor(1.0))  # the dot product learns only its temperature
    optimiser = torch.optim.Adam([sharpness, *op.parameters()], lr=2e-2)
    for _ in range(steps):
        q, k, at = task.batch(64)
        loss = F.nll_loss(op.weights(sharpness.exp() * q, k)[:, 0, 0].clamp(min=1e-12).log(), at)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    q, k, at = task.batch(1000)
    return (op.weights(sharpness.exp() * q, k)[:, 0, 0].argmax(-1) == at).double().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learned_alignments_bridge_two_bases(seed: int, claim) -> None:
    dot = found_share("dot", seed)
    for name in ("general", "additive"):
        claim(
            f"the {name} alignment finds needles among 64 keys in another basis than the queries' (seed {seed})",
            ours=found_share(name, seed), baseline=dot, better="higher", margin=0.5, baseline_name="dot product",
            seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_locations_cannot_find_a_moving_needle(seed: int) -> None:
    assert abs(found_share("location", seed) - 1 / 64) < 0.015
    assert found_share("location", seed, places=1) > 0.4, "one that stays is: W q has its sign, half the time"


@pytest.mark.parametrize(
    ("alignment", "options", "products"),
    [("additive", {}, 5), ("deep", {"depth": 3}, 5 + 2 * 25), ("feature", {}, 0)],
)
def test_the_cost_of_a_pair(alignment: str, options: dict[str, int], products: int) -> None:
    """The cost of a pair is a read-out of 5 hidden numbers, plus 2 layers for "deep", and less for "feature"."""
    assert score_products(SurveyAttention(alignment, heads=2, head_dim=16, hidden=5, **options)) == products
