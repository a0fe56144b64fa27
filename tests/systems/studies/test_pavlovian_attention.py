"""Pavlovian conditioning: retrieval and capacity of a Hebbian memory, and the report on a real model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.host.entry import apply
from foveate.host.method import Method
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from foveate.studies.hebbian_capacity import capacity_curve, error_propagation, retrieval_snr
from foveate.studies.pavlovian_attention import _measure_head, conditioning, conditioning_report, hebbian_retrieval
from tests.lens.models import text, tiny
from tests.support.tensors import assert_near

RULES = ("hebb", "delta", "oja", "decay")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(rule: str, q: Tensor, k: Tensor, v: Tensor, eta: float, decay: float, causal: bool) -> Tensor:
    """Update one memory per head, pair by pair."""
    s, states = torch.zeros(*v.shape[:2], v.shape[3], k.shape[3], dtype=k.dtype), []
    for t in range(k.shape[2]):
        key, value = k[:, :, t], v[:, :, t]
        write = torch.einsum("bhv,bhk->bhvk", value, key)
        if rule == "delta":
            write = write - torch.einsum("bhvj,bhj,bhk->bhvk", s, key, key)
        elif rule == "oja":
            write = write - s * key[:, :, None] ** 2
        s = (1 - decay if rule == "decay" else 1) * s + eta * write
        states.append(s)
    past = k.shape[2] - q.shape[2]
    memories = [states[past + i] if causal else s for i in range(q.shape[2])]
    return torch.stack([torch.einsum("bhvk,bhk->bhv", state, q[:, :, i]) for i, state in enumerate(memories)], 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [3, 9, 12])
def test_each_rule_matches_its_recurrence(rule: str, causal: bool, queries: int) -> None:
    if causal and queries > 9:
        return
    q, k, v = draw(2, 3, queries, 4), 0.3 * draw(2, 3, 9, 4, seed=1), draw(2, 3, 9, 5, seed=2)
    found = hebbian_retrieval(q, k, v, rule, eta=0.4, decay=0.2, causal=causal)
    assert_near(found, reference(rule, q, k, v, 0.4, 0.2, causal), 1e-12)


def test_hebb_is_linear_attention_and_delta_is_deltanet() -> None:
    q, k, v = draw(2, 3, 20, 6), draw(2, 3, 20, 6, seed=1), draw(2, 3, 20, 5, seed=2)
    assert_near(hebbian_retrieval(q, k, v, causal=True), LightningAttention2([1.0] * 3)(q, k, v, causal=True), 1e-6)
    k, out, s = F.normalize(k, dim=-1), [], torch.zeros(2, 3, 5, 6, dtype=torch.float64)
    for t in range(20):  # DeltaNet with beta = 1 replaces the key's old value by the new one
        key, value = k[:, :, t], v[:, :, t]
        old = (s @ key[..., None])[..., 0]
        s = s + (value - old)[..., None] * key[:, :, None]
        out.append((s @ q[:, :, t, :, None])[..., 0])
    assert_near(hebbian_retrieval(q, k, v, "delta", causal=True), torch.stack(out, 2), 1e-6)


@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_orthonormal_keys_are_retrieved_exactly(rule: str) -> None:
    k = torch.linalg.qr(draw(16, 16))[0][None, None]
    v = draw(1, 1, 16, 5, seed=1)
    assert_near(hebbian_retrieval(k, k, v, rule), v, 1e-6)
    found = retrieval_snr(k, v)
    assert found.error.max() < 1e-6
    assert_near(found.signal, v, 1e-12)


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_signal_and_interference_match_their_sums() -> None:
    k, v = draw(2, 7, 4), draw(2, 7, 5, seed=1)
    found = retrieval_snr(k, v)
    for b in range(2):
        for j in range(7):
            signal = v[b, j] * (k[b, j] @ k[b, j])
            noise = sum(v[b, i] * (k[b, i] @ k[b, j]) for i in range(7) if i != j)
            assert_near(found.signal[b, j], signal, 1e-12)
            assert_near(found.interference[b, j], noise, 1e-12)
            assert_near(found.snr[b, j], signal @ signal / (noise @ noise), 1e-10)
            assert_near(found.error[b, j], noise.norm() / signal.norm(), 1e-10)
    energy = [x.flatten(1).norm(dim=1) ** 2 for x in (found.signal, found.interference)]
    assert_near(found.overall, energy[0] / energy[1], 1e-10)
    retrieved = hebbian_retrieval(k[:, None], k[:, None], v[:, None])[:, 0]
    assert_near(found.signal + found.interference, retrieved, 1e-12)
    with pytest.raises(ShapeError, match="k and v must share all but their width"):
        retrieval_snr(k, v[:, 1:])


@pytest.mark.parametrize("d_k", [16, 64, 256])
def test_random_keys_have_the_snr_of_a_random_walk(d_k: int) -> None:
    n = d_k // 2
    k, v = (F.normalize(draw(3200 // d_k, n, d_k, seed=s), dim=-1) for s in (0, 1))
    found = retrieval_snr(k, v)
    overall = (found.signal.square().sum() / found.interference.square().sum()).item()
    assert overall == pytest.approx(d_k / (n - 1), rel=0.15)


def slope(case: str, widths: tuple[int, ...], candidates, eps: float = 0.5) -> float:
    """Return the exponent with which the capacity grows with the width, by least squares in logarithms."""
    fits = []
    for d_k in widths:
        g = torch.Generator().manual_seed(0)
        fits.append(capacity_curve(d_k, candidates(d_k), eps, case=case, trials=8, generator=g).largest)
    assert min(fits) > 1
    x, y = (torch.tensor([math.log(value) for value in values]) for values in (widths, fits))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def test_capacity_grows_with_the_width_on_average_and_its_root_at_worst(claim) -> None:
    average = slope("average", (32, 64, 128), lambda d: range(d // 5, d // 3))
    worst = slope("worst", (64, 128, 256, 512), lambda d: range(2, 2 * math.isqrt(d)))
    assert average == pytest.approx(1, abs=0.15)
    assert worst == pytest.approx(0.5, abs=0.1)
    claim(
        "how the number of associations within an error of 0.5 grows with the width: the exponent",
        ours=average, baseline=worst, better="higher", margin=0.3,
        baseline_name="keys whose overlaps all have one sign", seed=0,
    )  # fmt: skip


def test_errors_of_the_worst_case_add_up_linearly() -> None:
    found = capacity_curve(64, [1, 2, 5, 9, 63], 0.51, case="worst")
    assert found.lengths == (1, 2, 5, 9, 63)
    for n, error in zip(found.lengths, found.errors, strict=True):
        assert error == pytest.approx((n - 1) / 8, abs=1e-9)
    assert found.largest == 5
    assert capacity_curve(64, [9, 20], 0.5, case="worst").largest == 0
    average = capacity_curve(64, [17], trials=100, generator=torch.Generator().manual_seed(0))
    assert average.errors[0] == pytest.approx(math.sqrt(16 / 64), rel=0.05)
    again = capacity_curve(64, [17], trials=100, generator=torch.Generator().manual_seed(0))
    assert again == average


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"case": "best"}, "case='best' must be one of 'average', 'worst'"),
        ({"lengths": []}, r"lengths=\[\] must each be at least 1"),
        ({"lengths": [0, 3]}, r"lengths=\[0, 3\] must each be at least 1"),
        ({"lengths": [16], "case": "worst"}, "below d_k=16"),
        ({"trials": 0}, "trials=0"),
        ({"eps": -1}, "eps=-1"),
        ({"d_k": 1}, "d_k=1"),
    ],
)
def test_bad_arguments_of_curves_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        capacity_curve(**{"d_k": 16, "lengths": [2], **options})


# -- depth and redundancy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.0, 0.5, 1.3])
def test_averaged_errors_match_their_recurrence(gain: float) -> None:
    noise, expected = 0.0, []
    for _ in range(6):
        noise = gain**2 * noise + 0.3**2 / 4
        expected.append(math.sqrt(noise))
    found = error_propagation(6, 4, 0.3, gain=gain)
    assert_near(found.error, torch.tensor(expected, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5])
def test_votes_match_an_enumeration(heads: int) -> None:
    eps, fails = 0.2, 0.0
    for outcome in range(2**heads):
        wrong = outcome.bit_count()
        if not heads - wrong > heads / 2:
            fails += eps**wrong * (1 - eps) ** (heads - wrong)
    found = error_propagation(5, heads, eps, combine="vote")
    assert_near(found.error, torch.tensor([1 - (1 - fails) ** (i + 1) for i in range(5)], dtype=torch.float64), 1e-12)


def test_redundant_heads_allow_more_layers(claim) -> None:
    # noise exceeds the signal after heads / eps² layers
    depths = {heads: error_propagation(1000, heads, 0.5).depth for heads in (1, 4, 16)}
    assert depths == {1: 5, 4: 17, 16: 65}
    assert error_propagation(64, 16, 0.5).depth is None
    assert error_propagation(3, 1, 0.3, combine="vote").depth == 2  # 0.7² < 1 / 2
    votes = {heads: error_propagation(100, heads, 0.1, combine="vote") for heads in (1, 5)}
    assert votes[1].depth == 7
    assert votes[5].depth == 81
    claim(
        "layers until a network has more likely failed than not, each head failing one time in ten",
        ours=votes[5].depth, baseline=votes[1].depth, better="higher", margin=50, baseline_name="one head a layer",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers=0"),
        ({"heads": 0}, "heads=0"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": 1.1, "combine": "vote"}, "eps=1.1 must be in 0..1"),
        ({"combine": "max"}, "combine='max' must be one of 'average', 'vote'"),
        ({"gain": -1}, "gain=-1"),
    ],
)
def test_bad_arguments_of_propagation_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        error_propagation(**{"layers": 2, "heads": 2, "eps": 0.1, **options})


# -- conditioning ------------------------------------------------------------------------------------------------------


def test_the_delta_rule_shows_blocking(claim) -> None:
    found = {rule: conditioning(rule) for rule in RULES}
    assert found["hebb"].blocked > 0.8
    claim(
        "response to B after A, then A with B, were followed by the stimulus: a learner from surprise blocks it",
        ours=found["delta"].blocked, baseline=found["hebb"].blocked, better="lower", margin=0.6,
        baseline_name="Hebb's rule",
    )  # fmt: skip
    assert found["delta"].blocked < 0.2


def test_the_rules_match_their_closed_forms() -> None:
    found = {rule: conditioning(rule, eta=0.5, decay=0.2, trials=10) for rule in RULES}
    assert found["hebb"].acquired == pytest.approx(5)  # without bound
    assert found["hebb"].extinguished == pytest.approx(5)
    assert found["delta"].acquired == pytest.approx(1 - 0.5**10)
    assert found["delta"].extinguished == pytest.approx((1 - 0.5**10) * 0.5**10)
    assert found["oja"].acquired == pytest.approx(1 - 0.5**10)
    assert found["decay"].acquired == pytest.approx(0.5 * sum(0.8**t for t in range(10)))
    assert found["decay"].extinguished == pytest.approx(found["decay"].acquired * 0.8**10)
    assert found["delta"].blocked < 0.01
    assert found["hebb"].blocked == pytest.approx(5)
    assert found["hebb"].interference == pytest.approx(2.5)
    assert found["delta"].interference == pytest.approx(0.5 * (1 - (1 - 0.5 * 1.25) ** 10) / 1.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "bcm"}, "rule='bcm' must be one of 'hebb', 'delta', 'oja', 'decay'"),
        ({"eta": -1.0}, "eta=-1.0"),
        ({"decay": 1.5}, "decay=1.5 must be in 0..1"),
        ({"rule": "oja", "eta": 1.01}, "eta=1.01 must give eta k² of at most 1"),
        ({"trials": 0}, "trials=0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        conditioning(**{"rule": "hebb", **options})


# -- a real model ------------------------------------------------------------------------------------------------------


class KeepKeysAndValues(Method):
    """A method that stores keys and values by layer."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def read(self, site, out) -> None:
        self.seen[site.layer] = site.k.double(), site.v.double()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_report_matches_a_direct_computation(padding: str) -> None:
    model, inputs, keep = tiny("llama"), text(padding), KeepKeysAndValues()
    rows = conditioning_report(model, inputs)
    with torch.no_grad(), apply(model, keep):
        model(**inputs)
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in range(2) for head in range(2)]
    for row in rows:
        expected: dict[str, list[float]] = {"tokens": [], "coherence": [], "snr": [], "effective": []}
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            k, v = (x[b, row["head"]][real] for x in keep.seen[row["layer"]])
            n = len(k)
            cosines = [F.cosine_similarity(k[i], k[j], dim=0).item() for i in range(n) for j in range(n) if i != j]
            found = retrieval_snr(k, v)
            snr = (found.signal.norm() / found.interference.norm()).item() ** 2
            expected["tokens"].append(n)
            expected["coherence"].append(math.sqrt(sum(c**2 for c in cosines) / len(cosines)))
            expected["snr"].append(snr)
            expected["effective"].append(1 + 8 / snr)
        for name, values in expected.items():
            assert row[name] == pytest.approx(sum(values) / 2, rel=1e-6), name


def test_random_keys_have_their_expected_report() -> None:
    """For random unit keys, the effective number is their number, and the coherence is `d_k ** -0.5`."""
    k, v = (F.normalize(draw(2000, 64, seed=s), dim=-1) for s in (0, 1))
    row = _measure_head(k, v)
    assert row["effective"] == pytest.approx(2000, rel=0.05)
    assert row["coherence"] == pytest.approx(1 / 8, rel=0.02)
    assert row["snr"] == pytest.approx(64 / 1999, rel=0.05)


def test_the_report_takes_layers_and_inputs() -> None:
    model, inputs = tiny("llama"), text()
    some = conditioning_report(model, inputs["input_ids"], layers=[1])
    assert {row["layer"] for row in some} == {1}
    whole = [row for row in conditioning_report(model, inputs) if row["layer"] == 1]
    assert some == whole
    assert len(conditioning_report(model, input_ids=inputs["input_ids"])) == 4
    with pytest.raises(OptionError, match=r"layers: 2 must be in 0..1"):
        conditioning_report(model, inputs, layers=[2])
