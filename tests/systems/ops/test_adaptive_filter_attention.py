"""Adaptive filter attention: measurements of a noisy linear system, carried to one time and weighed by precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from foveate.core import oracle
from foveate.core.call import AttentionCall
from foveate.core.engines import chunked
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.dense.adaptive_filter_attention import AdaptiveFilterAttention
from foveate.ops.dense.softmax import Softmax
from foveate.ops.functional import rotary
from foveate.ops.functional.linear_sde import Dynamics, mean_decay
from tests.support.tensors import assert_near, gradients, qkv

NUMBERS = {"mu": -0.3, "sigma2": 0.7, "eta2": 0.4, "gamma2": 0.2, "nu": 1.7, "tau": 0.8}


def build(heads: int = 4, head_dim: int = 8, value_dim: int | None = None, **options) -> AdaptiveFilterAttention:
    random = torch.Generator().manual_seed(1)
    op = AdaptiveFilterAttention(heads, head_dim, value_dim, generator=random, length=20, **options).double()
    with torch.no_grad():
        for name in ("nu", "tau"):
            if isinstance(getattr(op, name), torch.nn.Parameter):
                getattr(op, name).add_(0.3 * torch.randn(heads, generator=random))
    return op


def system(dynamics: Dynamics, head: int, paired: bool) -> tuple[torch.Tensor, dict[str, float]]:
    """Return a head's complex rates `λ (C,)` and its other numbers from the parameters."""
    numbers = dict(dynamics.fixed)
    for name, raw in dynamics.raw.items():
        numbers[name] = F.softplus(raw[head]).item() + (0 if name == "sigma2" else 1e-5)
        if name == "mu":
            numbers[name] = (1 / (1 + math.exp(-raw[head].item())) - 1) * 10 / (2 * 20) - 1e-5
    omega = dynamics.omega[head] if dynamics.omega.dim() == 2 else dynamics.omega
    if paired:
        omega = torch.stack([omega, -omega], 1).reshape(-1) * 10 * 2 * math.pi / (2 * 20)
    return torch.complex(torch.full_like(omega.double(), numbers["mu"]), omega.double()), numbers


def variance(gap: float, mu: float, sigma2: float, eta2: float, gamma2: float) -> float:
    spread = sigma2 * gap if mu == 0 else sigma2 * (1 - math.exp(2 * mu * gap)) / (-2 * mu)
    return spread + eta2 * math.exp(2 * mu * gap) + gamma2


def by_hand(op: AdaptiveFilterAttention, q, k, v, t=None, scale: float = 1.0, paired: bool = False) -> torch.Tensor:
    """Compute the output pair by pair in complex numbers: each key and value times `e^{λ (t_i - t_j)}`."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    t = torch.arange(k.shape[2])[None, None].expand(q.shape[0], 1, -1) if t is None else t
    q, k, v = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k, v))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            rate, numbers = system(op.key_dynamics, h, paired)
            value_rate, value_numbers = system(op.value_dynamics, h, paired)
            nu = op.nu if isinstance(op.nu, float) else F.softplus(op.nu[h]).item() + 1e-5
            tau = op.tau if isinstance(op.tau, float) else op.tau[h].item()
            times, kv = t[b, h % t.shape[1]], h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                place = k.shape[2] - q.shape[2] + i
                logits, values = [], []
                for j in range(place + 1):
                    gap = (times[place] - times[j]).item()
                    carried = torch.exp(rate * gap) * k[b, kv, j]
                    misfit = (q[b, h, i] - carried).abs().square().sum().item()
                    if not op.residual:
                        misfit = -2 * (q[b, h, i].conj() * carried).real.sum().item()
                    misfit /= nu * q.shape[3] * variance(gap, **numbers)
                    misfit = math.log(1 + misfit) if op.robust else misfit
                    logits.append(scale * tau**2 * (-math.log(variance(gap, **value_numbers)) - misfit))
                    rotation = value_rate if op.rotate_values else value_rate.real
                    values.append(torch.exp(rotation * gap) * v[b, kv, j])
                weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
                out[b, h, i] = torch.view_as_real((weights[:, None] * torch.stack(values)).sum(0)).flatten()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"robust": False},
        {"robust": False, "residual": False},
        {"omega": "learned"},
        {"separate": True, "omega": "learned", "value_dim": 6},
        {"rotate_values": False, "separate": True},
        {"variant": "release"},
        {"variant": "release", "omega": "learned"},
        {"omega": [0.3, -0.2, 1.1, 0.0], **NUMBERS},
        {"mu": 0.0, "sigma2": 1.3},
    ],
    ids=str,
)
def test_pair_by_pair(options: dict) -> None:
    op, paired = build(**options), options.get("variant") == "release"
    q, k, v = qkv(7, value_width=options.get("value_dim"))
    assert_near(op(q, k, v, causal=True), by_hand(op, q, k, v, paired=paired), 1e-9)
    assert_near(op(q[:, :, 4:], k, v, causal=True, scale=2.5), by_hand(op, q[:, :, 4:], k, v, None, 2.5, paired), 1e-9)


@pytest.mark.parametrize("heads", [1, 4])
def test_times_may_be_irregular(heads: int) -> None:
    op, (q, k, v) = build(omega="learned"), qkv(7)
    t = (3 * torch.rand(2, heads, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).cumsum(2)
    expected = by_hand(op, q, k, v, t)
    assert_near(op(q, k, v, causal=True, t=t), expected, 1e-9)
    assert_near(op(q, k, v, causal=True, t=t + 1000), expected, 1e-9)
    assert_near(op(q[:, :, 5:], k, v, causal=True, t=t), expected[:, :, 5:], 1e-9)
    assert_near(op(q, k, v, causal=True, t=t[:1]), by_hand(op, q, k, v, t[:1].expand(2, -1, -1)), 1e-9)
    state = op.init_state(2, 4, 2, 8, 8, dtype=torch.float64)
    for at in (slice(n, n + 1) for n in range(7)):
        out, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, t=t[:, :, at])
        assert_near(out, expected[:, :, at], 1e-9)
    first, state = op.prefill(q[:, :, :5], k[:, :, :5], v[:, :, :5], t=t[:, :, :5])
    assert_near(first, expected[:, :, :5], 1e-9)
    at = slice(5, 6)
    assert_near(op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, t=t[:, :, at])[0], expected[:, :, at], 1e-9)


def test_a_stream_may_continue_with_times_per_head() -> None:
    op, (q, k, v) = build(omega="learned"), qkv(6)
    t = torch.arange(6.0, dtype=torch.float64).expand(2, 4, 6).clone()
    t[:, :, 3:] += torch.rand(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, state = op.prefill(q[:, :, :3], k[:, :, :3], v[:, :, :3])
    for at in (slice(n, n + 1) for n in range(3, 6)):
        out, state = op.step(q[:, :, at], k[:, :, at], v[:, :, at], state, t=t[:, :, at])
    assert_near(out, by_hand(op, q, k, v, t)[:, :, 5:], 1e-9)


def test_the_limit_is_rotary_attention() -> None:
    """Without decay and process noise, unit vectors give softmax attention with rotary positions, also on values.

    The system carries a key forward to the query's time, so that angles have the opposite sign of most rotary models.
    """
    nu, eta2, gamma2 = 0.7, 0.15, 0.1
    q, k, v = (F.normalize(x, dim=-1) for x in qkv(32, kv_heads=4))
    op = AdaptiveFilterAttention(
        4, 8, robust=False, mu=0.0, sigma2=0.0, eta2=eta2, gamma2=gamma2, nu=nu, tau=1.0, variant="paper"
    )
    angles = -rotary.rotary_angles(torch.arange(32), 8)
    rotated = [rotary.rotate(x, angles, "interleaved") for x in (q, k)]
    weights = oracle.attention(*rotated, torch.eye(32).expand(2, 4, 32, 32).double(), causal=True,
                               scale=2 / (nu * 4 * (eta2 + gamma2)))  # fmt: skip
    back = rotary.rotate(weights @ rotary.rotate(v, angles, "interleaved"), -angles, "interleaved")
    assert_near(op(q, k, v, causal=True), back, 1e-10)
    still = AdaptiveFilterAttention(
        4, 8, robust=False, mu=0.0, sigma2=0.0, eta2=eta2, gamma2=gamma2, nu=nu, tau=1.0, omega=[0.0] * 4
    )
    plain = oracle.attention(q, k, v, causal=True, scale=2 / (nu * 4 * (eta2 + gamma2)))
    assert_near(still(q, k, v, causal=True), plain, 1e-10)


def test_weights_exist_without_rotated_values() -> None:
    q, k, v = qkv(9)
    op = build(rotate_values=False, separate=True, omega="learned")
    weights = op.weights(q, k, causal=True)
    assert_near(weights @ v.repeat_interleave(2, 1), op(q, k, v, causal=True), 1e-12)
    assert (weights.sum(-1)[:, :, 1:] < 1).all(), "what has decayed is missing from the sum"
    with pytest.raises(UnsupportedPattern, match="has no matrix of weights"):
        build().weights(q, k, causal=True)


def one(**numbers) -> Dynamics:
    defaults = {"mu": -0.3, "sigma2": 0.7, "eta2": 0.4, "gamma2": 0.2}
    return Dynamics(1, 2, {**defaults, **numbers}, [0.0], 10, "paper", None)


def test_the_variance_solves_the_lyapunov_equation() -> None:
    """The variance equals Euler steps of `dV/ds = 2 μ V + σ²` from the key's noise, plus the query's own noise."""
    for mu in (-0.3, -1e-7, 0.0):
        solved, steps = 0.4, 200_000
        for _ in range(steps):
            solved += (2 * mu * solved + 0.7) * 3.0 / steps
        found = one(mu=mu).variance(torch.tensor([3.0], dtype=torch.float64)).item()
        assert found == pytest.approx(solved + 0.2, abs=1e-4)
    assert one(mu=-1e-7).variance(torch.tensor([3.0])) == pytest.approx(0.7 * 3 + 0.6, abs=1e-4)
    gaps = torch.tensor([0.0, 1e30], dtype=torch.float64)
    assert_near(one().variance(gaps), torch.tensor([0.6, 0.7 / 0.6 + 0.2]).double(), 1e-7)
    assert one(sigma2=0.0, gamma2=0.0).variance(gaps).log().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_decay_is_stable(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e-8, 5e-4, 0.999e-3, 1.001e-3, 0.1, 3.0, 1e4], dtype=dtype, requires_grad=True)
    exact, slope = [], []
    for value in x.tolist():
        terms = [(-value) ** n / math.factorial(n + 1) for n in range(30)]
        slopes = [-n * (-value) ** (n - 1) / math.factorial(n + 1) for n in range(1, 30)]
        large = value > 4
        exact.append(-math.expm1(-value) / value if large else sum(terms))
        slope.append(math.exp(-value) / value - (1 - math.exp(-value)) / value**2 if large else sum(slopes))
    tight = 1e-6 if dtype == torch.float32 else 1e-12
    found = mean_decay(x)
    assert_near(found, torch.tensor(exact, dtype=dtype), tight)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert_near(gradient, torch.tensor(slope, dtype=dtype), 3e-4 if dtype == torch.float32 else 1e-10)


def test_starts_and_bounds() -> None:
    op = AdaptiveFilterAttention(3, 8, length=50, omega="learned", generator=torch.Generator().manual_seed(0))
    names = {name for name, _ in op.named_parameters()}
    assert names == {"nu", "tau", *(f"key_dynamics.{x}" for x in ("omega", *(f"raw.{n}" for n in
                     ("mu", "sigma2", "eta2", "gamma2"))))}  # fmt: skip
    assert torch.equal(op.nu, torch.ones(3))
    assert torch.equal(op.tau, torch.ones(3))
    assert all(p.shape[0] == 3 for p in op.parameters())
    same = AdaptiveFilterAttention(3, 8, length=50, omega="learned", generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(op.parameters(), same.parameters(), strict=True))
    gap = torch.ones(1)
    for raw, mu in ((-50.0, -5 / 50 - 1e-5), (0.0, -2.5 / 50 - 1e-5), (50.0, -1e-5)):
        with torch.no_grad():
            op.key_dynamics.raw["mu"].fill_(raw)
        assert_near(op.key_dynamics.decay(gap).log(), torch.full((3, 1, 1), mu), 1e-6)
    both = AdaptiveFilterAttention(3, 8, separate=True, mu=-0.1)
    assert {name for name, _ in both.named_parameters() if name.startswith("own_dynamics")} == {
        f"own_dynamics.raw.{n}" for n in ("sigma2", "eta2", "gamma2")
    }
    angles = AdaptiveFilterAttention(3, 8, mu=-0.1).key_dynamics.angles(torch.tensor([[[2.0]]]))
    assert_near(angles, 2 * 10000.0 ** -(torch.arange(4).double() / 4)[None, None, None], 1e-12)
    paired = AdaptiveFilterAttention(3, 8, variant="release", length=50).key_dynamics.angles(torch.tensor([[[2.0]]]))
    unit = 10 * 2 * math.pi / (2 * 50)
    assert_near(paired[0, 0, 0], 2 * unit * torch.tensor([1, -1, 0.01, -0.01]).double(), 1e-9)


def test_chunks_add_up_with_gradients_of_times() -> None:
    q, k, v = qkv(50, heads=2, kv_heads=1, grad=True)
    op = build(2, separate=True, omega="learned")
    gaps = torch.rand(2, 1, 50, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))

    def run(engine: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = op(q, k, v, causal=True, t=gaps.cumsum(2), engine=engine)
        return out, gradients(out, [q, k, v, gaps, *op.parameters()])

    (ours, grads), (plain, expected) = run("chunked"), run("reference")
    assert_near(ours, plain, 1e-12)
    for one_grad, other in zip(grads, expected, strict=True):
        assert_near(one_grad, other, 1e-10)
        assert one_grad.any()
    t = gaps.cumsum(2).detach()
    problem = AttentionCall(*(x.detach() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), 1.0,
                      causal=True, scoring=op.scoring(t))  # fmt: skip
    assert_near(chunked.attend(problem, 16, 16), chunked.attend(problem, 50, 50), 1e-12)


def test_long_gaps_stay_finite() -> None:
    q, k, v = qkv(6, dtype=torch.float32, grad=True)
    t = torch.tensor([[[0.0, 1.0, 1e4, 1e6, 1e8, 1e8 + 10]]])
    for options in ({}, {"sigma2": 0.0, "gamma2": 0.0}, {"robust": False}):
        op = AdaptiveFilterAttention(4, 8, generator=torch.Generator().manual_seed(0), **options)
        out = op(q, k, v, causal=True, t=t)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in gradients(out, (q, k, v, *op.parameters())))


def test_rounding_makes_no_negative_residuals() -> None:
    """Keys that the dynamics carry exactly onto large queries, with almost no noise, give no NaN in float32."""
    q = 300 * qkv(40, kv_heads=4, dtype=torch.float32)[0][:, :, :1].expand(-1, -1, 40, -1)
    op = AdaptiveFilterAttention(4, 8, mu=0.0, omega=[0.0] * 4, sigma2=0.0, eta2=1e-7, gamma2=1e-7, nu=1.0, tau=1.0)
    expected = q.cumsum(2) / torch.arange(1, 41)[:, None]
    assert_near(op(q, q, q, causal=True), expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"head_dim": 2.0}, r"head_dim=2\.0"),
        ({"head_dim": 7}, "width 7 must be a multiple of 2: channels are complex"),
        ({"head_dim": 6, "variant": "release"}, "width 6 must be a multiple of 4"),
        ({"value_dim": 4}, "value_dim=4 must be head_dim=8 unless separate=True"),
        ({"value_dim": 0}, "value_dim=0"),
        ({"length": 0}, "length=0"),
        ({"robust": "yes"}, "robust='yes'"),
        ({"rotate_values": 3}, "rotate_values=3"),
        ({"residual": None}, "residual=None"),
        ({"separate": "k"}, "separate='k'"),
        ({"residual": False}, "residual=False must come with robust=False"),
        ({"variant": "arxiv"}, "variant='arxiv'"),
        ({"mu": 0.1}, r"mu=0\.1 must be at most 0"),
        ({"mu": float("nan")}, "mu=nan must be a finite number"),
        ({"sigma2": -1.0}, r"sigma2=-1\.0 must be at least 0"),
        ({"eta2": "small"}, "eta2='small'"),
        ({"eta2": 0.0, "gamma2": 0}, "eta2=0 and gamma2=0 give a token no variance"),
        ({"nu": 0.0}, r"nu=0\.0 must be above 0"),
        ({"tau": True}, "tau=True"),
        ({"tau": -1.0}, r"tau=-1\.0 must be at least 0"),
        ({"omega": "random"}, "omega='random'"),
        ({"omega": [0.1]}, r"omega=\[0\.1\] must be 4 finite numbers"),
        ({"omega": [0.1, 0.2, 0.3, float("inf")]}, "must be 4 finite numbers"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AdaptiveFilterAttention(**{"heads": 4, "head_dim": 8, **options})


def test_calls_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv(5)
    with pytest.raises(ShapeError, match="built for Hq=2; got 4"):
        build(2)(q, k, v, causal=True)
    with pytest.raises(ShapeError, match="built for D=6; got 8"):
        build(4, 6)(q, k, v, causal=True)
    with pytest.raises(ShapeError, match="built for Dv=8; got 6"):
        build()(*qkv(5, value_width=6), causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        build()(q, k, v)
    for t in (torch.zeros(2, 5), torch.zeros(2, 1, 4), torch.zeros(3, 1, 5), torch.zeros(2, 2, 5), [0.0]):
        with pytest.raises(ShapeError, match=r"t must be \(B, 1 or Hq, Nk\)=\(2, 4, 5\)"):
            build()(q, k, v, causal=True, t=t)


TRUE = {"mu": -0.02, "omega": [0.4], "sigma2": 0.02, "eta2": 0.5, "gamma2": 0.5, "nu": 1.0, "tau": 1.0}


def measurements(seed: int, count: int = 16, length: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw states `(B, 1, N, 2)` of a noisy decaying rotation from its stationary distribution, and measurements."""
    random = torch.Generator().manual_seed(seed)

    def noise(variance: float, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=random) * variance**0.5

    step = torch.exp(torch.tensor(complex(TRUE["mu"], TRUE["omega"][0]), dtype=torch.complex128))
    stationary = TRUE["sigma2"] / (-2 * TRUE["mu"])
    states = [noise(stationary, count)]
    for _ in range(length - 1):
        states.append(step * states[-1] + noise(stationary * (1 - step.abs().item() ** 2), count))
    path = torch.stack(states, 1)
    seen = path + noise(TRUE["eta2"], count, length)
    return torch.view_as_real(path)[:, None], torch.view_as_real(seen)[:, None]


def error(estimate: torch.Tensor, truth: torch.Tensor) -> float:
    return (estimate - truth).square().sum(-1).mean().item()


def test_it_filters(claim) -> None:
    """With the true dynamics it filters. It treats measurements as independent: a Kalman filter gets 0.09 here."""
    truth, seen = measurements(0)
    ours = error(AdaptiveFilterAttention(1, 2, **TRUE)(seen, seen, seen, causal=True), truth)
    raw, softmax = error(seen, truth), min(
        error(Softmax()(seen, seen, seen, causal=True, scale=scale), truth) for scale in (0.25, 0.5, 1.0, 2.0)
    )  # fmt: skip
    claim(
        "the operator with the true dynamics filters measurements of a noisy decaying rotation: error of the estimate",
        ours=ours, baseline=softmax, better="lower", margin=0.02,
        baseline_name="softmax attention at the best of four scales", seed=0,
    )  # fmt: skip
    assert ours <= 0.6 * raw
    for wrong in ({"omega": [0.0]}, {"omega": [-0.4]}, {"mu": -1.0}):
        lost = AdaptiveFilterAttention(1, 2, **{**TRUE, **wrong})(seen, seen, seen, causal=True)
        assert error(lost, truth) > 1.3 * ours, "the dynamics have to be the right ones"


def test_outliers_have_less_influence(claim) -> None:
    """10 % of the measurements, in queries, keys and values, are 20 times too large."""
    rises: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(5):
        truth, seen = measurements(seed)
        bad = torch.rand(seen.shape[:3], generator=torch.Generator().manual_seed(100 + seed)) < 0.1
        corrupt = torch.where(bad[..., None], 20 * seen, seen)
        for robust, found in rises.items():
            op = AdaptiveFilterAttention(1, 2, robust=robust, **TRUE)
            clean, spoilt = (error(op(x, x, x, causal=True), truth) for x in (seen, corrupt))
            found.append(spoilt - clean)
    assert all(ours < 0.85 * theirs for ours, theirs in zip(rises[True], rises[False], strict=True))
    ours, theirs = (sum(rises[robust]) / 5 for robust in (True, False))
    claim(
        "outliers in 10% of the measurements raise the error less under robust logits: increase, mean of 5 seeds",
        ours=ours, baseline=theirs, better="lower", margin=0.2 * theirs, baseline_name="Gaussian logits", seed=0,
    )  # fmt: skip
