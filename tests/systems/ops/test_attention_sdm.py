"""Sparse Distributed Memory: the intersection of balls, the fitted softmax, and recall from noisy cues."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import integrate, special
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.ops.dense.attention_sdm import SparseDistributedMemory, cap_intersection, circle_intersection, fit_beta
from foveate.ops.dense.softmax import Softmax
from tests.ops.plans import score_products
from tests.support.tensors import assert_near, gradients, qkv


def bits(*shape: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() - 1


def memory(neurons: int, n: int = 16, radius: int = 4, seed: int = 0) -> SparseDistributedMemory:
    random = torch.Generator().manual_seed(seed)
    return SparseDistributedMemory(n, radius, "neurons", neurons=neurons, generator=random)


# -- the intersection of two balls -------------------------------------------------------------------------------------


def test_the_intersection_is_counted_exactly() -> None:
    for n, radius in itertools.product(range(1, 9), range(9)):
        for distance in range(n + 1):
            far = (1 << distance) - 1
            near = [x for x in range(2**n) if x.bit_count() <= radius and (x ^ far).bit_count() <= radius]
            assert circle_intersection(n, radius, distance) == len(near), (n, radius, distance)
    assert [circle_intersection(10, 3, distance) for distance in range(8)] == [176, 92, 92, 50, 50, 20, 20, 0]
    assert circle_intersection(64, 64, 7) == 2**64, "beyond what a float or an int64 holds"


def cap_by_the_beta_function(n: int, radius: int, cosine: float) -> float:
    """Return the same area by the released code's formula (Lee and Kim, 2014), with the constant that it drops."""
    reach, half = math.acos(1 - 2 * radius / n), math.acos(cosine) / 2
    if half >= reach:
        return -math.inf

    def ring(angle: float) -> float:
        share = special.betainc((n - 2) / 2, 0.5, 1 - (math.tan(half) / math.tan(angle)) ** 2)
        return math.sin(angle) ** (n - 2) * share

    area = math.log(2 * integrate.quad(ring, half, reach, epsabs=0, epsrel=1e-11, limit=500)[0])
    area += (n - 1) / 2 * math.log(math.pi) - special.loggamma((n - 1) / 2)
    return area - (math.log(2) + n / 2 * math.log(math.pi) - special.loggamma(n / 2))


@pytest.mark.parametrize(("n", "radius"), [(3, 1), (8, 3), (64, 5), (64, 11), (64, 15), (256, 60)])
def test_caps_on_the_sphere(n: int, radius: int) -> None:
    cosine = torch.tensor([0.999, 0.9, 0.6, 0.3, 0.1, -0.2, -0.9], dtype=torch.float64)
    ours = cap_intersection(n, radius, cosine)
    expected = torch.tensor([cap_by_the_beta_function(n, radius, x) for x in cosine.tolist()], dtype=torch.float64)
    assert torch.equal(ours == -math.inf, expected == -math.inf)
    met = ours > -math.inf
    assert 1 < met.sum() < 7
    assert_near(ours[met], expected[met], 1e-5 if n == 3 else 1e-10)
    assert (ours[met].diff() < 0).all()


def test_caps_that_share_a_centre_or_point_apart() -> None:
    whole = cap_intersection(3, 1, torch.tensor([1.0, 1 + 1e-9, -1.0], dtype=torch.float64))
    assert_near(
        whole[:2].exp(), torch.full((2,), 1 / 3, dtype=torch.float64), 1e-4, "a cap of height 2/3: (1 - 1/3) / 2"
    )
    assert whole[2] == -math.inf
    cosine = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(cap_intersection(64, 11, cosine).clamp(min=-1e9).sum(), cosine)
    assert grad.isfinite().all()
    assert grad[1] > 0
    assert not grad[2]


# -- the softmax near it -----------------------------------------------------------------------------------------------

BETAS = {
    (5, False): 32.95,
    (11, False): 19.34,
    (15, False): 13.79,
    (5, True): 31.12,
    (11, True): 14.91,
    (15, True): 9.66,
}
FITS = {
    (5, False): 0.970,
    (11, False): 0.965,
    (15, False): 0.949,
    (5, True): 0.934,
    (11, True): 0.976,
    (15, True): 0.985,
}


def r_squared(n: int, radius: int, near: bool, beta: float) -> float:
    distances = [d for d in range(n + 1) if circle_intersection(n, radius, d) and (not near or d <= radius)]
    y = torch.tensor([math.log(circle_intersection(n, radius, d)) for d in distances], dtype=torch.float64)
    left = y - beta * torch.tensor([1 - 2 * d / n for d in distances], dtype=torch.float64)
    return 1 - (left.var() / y.var()).item()


@pytest.mark.parametrize(("radius", "near"), BETAS)
def test_its_log_is_nearly_linear_in_the_cosine(radius: int, near: bool) -> None:
    beta = fit_beta(64, radius, near)
    assert abs(beta - BETAS[radius, near]) < 0.01
    found = r_squared(64, radius, near, beta)
    assert abs(found - FITS[radius, near]) < 1e-3
    assert found > max(r_squared(64, radius, near, 1.02 * beta), r_squared(64, radius, near, 0.98 * beta))


def test_beta_is_the_memorys_own() -> None:
    assert SparseDistributedMemory().beta == fit_beta(64, 11)
    assert SparseDistributedMemory(64, 5, "binary").beta == fit_beta(64, 5)


# -- the operator ------------------------------------------------------------------------------------------------------


def test_weights_by_counting() -> None:
    q, k, v = qkv(6, 9, width=12, value_width=5)
    op = SparseDistributedMemory(12, 4, "binary")
    ours = op.weights(q, k)
    for b, h, i in itertools.product(range(2), range(4), range(6)):
        distances = [int(((q[b, h, i] > 0) != (k[b, h // 2, j] > 0)).sum()) for j in range(9)]
        counts = torch.tensor([circle_intersection(12, 4, d) for d in distances], dtype=torch.float64)
        assert_near(ours[b, h, i], counts / counts.sum().clamp(min=1), 1e-12)
    assert_near(op(q, k, v), ours @ v.repeat_interleave(2, 1), 1e-12)


def test_continuous_weights() -> None:
    q, k, v = qkv(6, 9, width=8, value_width=5)
    op = SparseDistributedMemory(10, 4)
    cosine = F.cosine_similarity(q[:, :, :, None], k.repeat_interleave(2, 1)[:, :, None], dim=-1)
    share = cap_intersection(10, 4, cosine).exp()
    assert_near(op.weights(q, k), share / share.sum(-1, keepdim=True), 1e-9)
    assert_near(op.weights(3 * q, 0.1 * k), op.weights(q, k), 1e-9, "only directions count")
    assert_near(op(q, k, v), op.weights(q, k) @ v.repeat_interleave(2, 1), 1e-9)


def test_a_query_far_from_all_keys_reads_zeros() -> None:
    k = bits(1, 1, 3, 16)
    q = -k[:, :, :1]
    for op in (SparseDistributedMemory(16, 3, "binary"), memory(50, radius=3), SparseDistributedMemory(16, 3)):
        here = torch.cat([q, k[:, :, :1]], 2)
        for engine in ("reference", "chunked"):
            out = op(here, k[:, :, :1], k[:, :, :1], engine=engine)
            assert not out[:, :, 0].any(), op.mode
            if op.mode != "neurons":
                assert_near(out[:, :, 1:], k[:, :, :1], 1e-12)


def test_neurons_by_hand() -> None:
    op = memory(300, n=10, radius=3)
    q, k, _ = qkv(4, 5, batch=1, heads=2, kv_heads=1, width=10)
    ours, addresses = op.weights(q, k), op.addresses
    assert addresses.shape == (300, 10)
    assert set(addresses.unique().tolist()) == {-1.0, 1.0}
    near_k = [[int(((key > 0) != (a > 0)).sum()) <= 3 for a in addresses] for key in k[0, 0]]
    for h, i in itertools.product(range(2), range(4)):
        near_q = [int(((q[0, h, i] > 0) != (a > 0)).sum()) <= 3 for a in addresses]
        counts = [sum(one and other for one, other in zip(near_q, near, strict=True)) for near in near_k]
        counts = torch.tensor(counts, dtype=torch.float64)
        assert_near(ours[0, h, i], counts / counts.sum().clamp(min=1), 1e-9)


@pytest.mark.parametrize("mode", ["binary", "neurons", "continuous"])
def test_the_scale_is_a_power(mode: str) -> None:
    op = memory(500, n=8, radius=3) if mode == "neurons" else SparseDistributedMemory(8, 3, mode)
    q, k, _ = qkv(6)
    weights = op.weights(q, k)
    squared = weights**2 / (weights**2).sum(-1, keepdim=True).clamp(min=1e-9)
    assert_near(op.weights(q, k, scale=2.0), squared, 1e-9)


def test_the_same_generator_draws_the_same_neurons() -> None:
    assert torch.equal(memory(20).addresses, memory(20).addresses)
    assert not torch.equal(memory(20).addresses, memory(20, seed=1).addresses)
    assert "addresses" in memory(20).state_dict()


def test_gradients_of_the_modes() -> None:
    q, k, v = qkv(5, width=8, grad=True)
    continuous = gradients(SparseDistributedMemory(8, 3)(q, k, v), [q, k, v])
    assert all(grad.any() for grad in continuous)
    for op in (SparseDistributedMemory(8, 3, "binary"), memory(200, n=8, radius=3)):
        dq, dk, dv = gradients(op(q, k, v), [q, k, v])
        assert not dq.any() and not dk.any()
        assert dv.any()


@pytest.mark.parametrize("mode", ["binary", "neurons", "continuous"])
def test_engines_and_streaming(mode: str) -> None:
    op = memory(500, n=8, radius=3) if mode == "neurons" else SparseDistributedMemory(8, 3, mode)
    q, k, v = qkv(40)
    whole = op(q, k, v, causal=True, engine="reference")
    assert_near(op(q, k, v, causal=True, engine="chunked"), whole, 1e-10)
    state = op.init_state(2, 4, 2, 8, 8, dtype=torch.float64)
    for t in range(40):
        out, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        assert_near(out, whole[:, :, t : t + 1], 1e-10)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n=2"),
        ({"radius": 0}, "radius=0"),
        ({"radius": 2.5}, "radius=2.5"),
        ({"n": 64, "radius": 32}, "radius=32 must be below n / 2 = 32"),
        ({"n": 9, "radius": 5}, r"radius=5 must be below n / 2 = 4\.5"),
        ({"mode": "softmax"}, "mode='softmax'"),
        ({"mode": "neurons", "neurons": 5}, "needs neurons and a generator"),
        ({"mode": "neurons", "generator": torch.Generator()}, "needs neurons and a generator"),
        ({"mode": "neurons", "neurons": 0, "generator": torch.Generator()}, "neurons=0"),
        ({"mode": "binary", "neurons": 5}, 'no other takes them; got mode="binary"'),
        ({"generator": torch.Generator()}, 'no other takes them; got mode="continuous"'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SparseDistributedMemory(**options)


def test_bad_arguments() -> None:
    for distance in (-1, 11):
        with pytest.raises(OptionError, match=f"distance={distance} must be in 0..10"):
            circle_intersection(10, 3, distance)
    for n, radius, message in ((64, 0, "radius=0"), (64, 32, "radius=32"), (2, 1, "n=2")):
        with pytest.raises(OptionError, match=message):
            fit_beta(n, radius)
    with pytest.raises(OptionError, match="steps=0"):
        SparseDistributedMemory().recall(bits(1, 1, 1, 64), bits(1, 1, 2, 64), steps=0)
    for op in (SparseDistributedMemory(16, 4, "binary"), memory(10)):
        with pytest.raises(ShapeError, match="built for n=16 bits; got D=8"):
            op(*qkv(5))
    SparseDistributedMemory(16, 4)(*qkv(5))


# -- claims ------------------------------------------------------------------------------------------------------------


def flipped(patterns: Tensor, count: int, seed: int) -> Tensor:
    """Return every pattern with `count` of its bits flipped."""
    random = torch.Generator().manual_seed(seed)
    at = torch.rand(patterns.shape, generator=random).argsort(-1)[..., :count]
    return patterns.scatter(-1, at, -patterns.gather(-1, at))


def recalled(read: Tensor, patterns: Tensor) -> Tensor:
    """Return the pattern nearest to each query's reading, or -1 if the reading is no pattern."""
    cosine = F.normalize(read, dim=-1) @ F.normalize(patterns, dim=-1).mT
    best = cosine.max(-1)
    return torch.where(best.values > 0.9, best.indices, -1)[0, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_softmax_recalls_what_the_memory_recalls(seed: int, claim) -> None:
    patterns = bits(1, 1, 200, 64, seed=seed)
    cues, right = flipped(patterns, 8, seed), torch.arange(200)
    binary, sphere = SparseDistributedMemory(64, 11, "binary"), SparseDistributedMemory(64, 11)
    unit = F.normalize(cues, dim=-1), F.normalize(patterns, dim=-1)
    found = {
        "memory": recalled(binary(cues, patterns, patterns), patterns),
        "sphere": recalled(sphere(cues, patterns, patterns), patterns),
        "softmax": recalled(Softmax()(*unit, patterns, scale=binary.beta), patterns),
        "uniform": recalled(Softmax()(*unit, patterns, scale=0.0), patterns),
    }
    share = {name: (who == right).double().mean().item() for name, who in found.items()}
    agree = (found["memory"] == found["softmax"]).double().mean().item()
    claim(
        "softmax with the fitted beta recalls 64-bit patterns from cues with 8 wrong bits: share of 200 recalled "
        f"(seed {seed})",
        ours=share["softmax"], baseline=share["uniform"], better="higher", margin=0.95,
        baseline_name="uniform average", seed=seed,
    )  # fmt: skip
    assert share["memory"] >= 0.95
    assert share["sphere"] >= 0.95
    assert agree >= 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fitted_softmax_has_the_memorys_weights(seed: int, claim) -> None:
    """At a radius for noisy cues, which spreads weights, the fitted beta is nearer than larger or smaller ones."""
    patterns = bits(1, 1, 200, 64, seed=seed)
    cues, op = flipped(patterns, 8, seed), SparseDistributedMemory(64, 15, "binary")
    unit, weights = (F.normalize(cues, dim=-1), F.normalize(patterns, dim=-1)), op.weights(cues, patterns)

    def distance(other: Tensor) -> float:
        return (other - weights).abs().sum(-1).mean().item() / 2

    at = {factor: distance(Softmax().weights(*unit, scale=factor * op.beta)) for factor in (0.5, 0.8, 1.0, 2.0)}
    claim(
        f"softmax with the fitted beta has the weights of the memory: mean total variation (seed {seed})",
        ours=at[1.0], baseline=distance(Softmax().weights(cues, patterns)), better="lower", margin=0.3,
        baseline_name="scaled dot product", seed=seed,
    )  # fmt: skip
    assert at[1.0] < 0.6 * min(at[0.5], at[0.8], at[2.0])
    assert distance(SparseDistributedMemory(64, 15).weights(cues, patterns)) < 0.03, "so has the sphere"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_neurons_approximate_the_expected_weights(seed: int, claim) -> None:
    patterns = bits(1, 1, 12, 16, seed=seed)
    cues = flipped(patterns, 2, seed)
    expected = SparseDistributedMemory(16, 4, "binary").weights(cues, patterns)
    few, many = ((memory(r, seed=seed).weights(cues, patterns) - expected).abs().mean().item() for r in (10**3, 10**5))
    claim(
        f"random neurons approximate the expected weights: mean error of 100,000 neurons (seed {seed})",
        ours=many, baseline=few, better="lower", margin=2 / 3 * few, baseline_name="1,000 neurons", seed=seed,
    )  # fmt: skip


def test_recall_cleans_up_in_steps(claim) -> None:
    """Each reading has fewer wrong bits than the one before."""
    patterns = bits(1, 1, 100, 64)
    cues, op = flipped(patterns, 22, 0), SparseDistributedMemory(64, 15, "binary")

    def right(read: Tensor) -> float:
        return (read == patterns).all(-1).double().mean().item()

    once, often = (right(op.recall(cues, 3 * patterns, steps=steps)) for steps in (1, 5))
    claim(
        "repeated readings recall more of 100 patterns from cues with 22 of 64 bits wrong: share recalled",
        ours=often, baseline=once, better="higher", margin=0.15, baseline_name="one reading", seed=0,
    )  # fmt: skip
    assert right(cues) == 0
    sphere = SparseDistributedMemory(64, 15)
    read = sphere(cues, patterns, patterns)
    assert_near(sphere.recall(cues, patterns), read, 1e-12)
    assert_near(sphere.recall(cues, patterns, steps=2), sphere(read, patterns, patterns), 1e-12)


def test_the_cost_of_a_pair() -> None:
    random = torch.Generator().manual_seed(0)
    assert score_products(SparseDistributedMemory(16, 4, "neurons", neurons=40, generator=random)) == 40
    assert score_products(SparseDistributedMemory(16, 4, "binary")) == 16
