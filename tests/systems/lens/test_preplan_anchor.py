"""Preplan and anchor: closed forms, a model against its own maps, a planted rhythm, and credit that learns sooner."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError, OptionError, ShapeError
from foveate.host import weight_tiles
from foveate.lens import Rhythm, coupling, fai, preplan_anchor, rhythm_credit, split_heads, waad
from foveate.lens.heads.preplan_anchor import middle_layers
from foveate.lens.parts.rhythm_credit import turn
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, text, tiny
from tests.support.constructed import BOS, FILLER, KEYS, VALUES, induction_lm
from tests.support.tensors import assert_near

# -- closed forms ------------------------------------------------------------------------------------------------------


def test_distances_of_known_heads() -> None:
    n, window = 30, 10
    ends = torch.arange(n)
    previous, own, first = torch.zeros(3, n, n)
    previous[ends, (ends - 1).clamp_min(0)] = 1.0
    own[ends, ends] = 1.0
    first[:, 0] = 1.0
    assert waad(previous).tolist() == [0.0] + [1.0] * (n - 1)
    assert waad(own).tolist() == [0.0] * n
    assert waad(first, window).tolist() == ends.clamp_max(window).tolist()
    assert waad(first, None).tolist() == waad(first, n).tolist() == ends.tolist()
    assert_near(waad(first[12:20], 15, first=12), ends[12:20].clamp_max(15).float(), 1e-6)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("high", [7, None])
def test_influence_of_uniform_attention_is_a_mean_of_shares(closed: bool, high: int | None) -> None:
    n, low = 20, 3
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    found = fai(uniform, low, high, closed=closed, empty=-1.0)
    for s in range(n):
        last = n - 1 if high is None else min(n - 1, s + high - (not closed))
        rows = [1 / (t + 1) for t in range(s + low, last + 1)]
        assert math.isclose(float(found[s]), sum(rows) / len(rows) if rows else -1.0, abs_tol=1e-6)


def test_only_the_response_asks() -> None:
    weights = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).tril()
    response = torch.arange(16) >= 6
    found = fai(weights, 2, 5, response)
    for s in range(16):
        rows = [float(weights[t, s]) for t in range(max(6, s + 2), min(15, s + 5) + 1)]
        assert math.isclose(float(found[s]), sum(rows) / len(rows) if rows else 0.0, abs_tol=1e-6)


def test_heads_are_split_by_distance() -> None:
    distance = torch.tensor([5.0, 1.0, 9.0, 2.0, 7.0, 3.0, 8.0])
    for rounding, count in (("floor", 2), ("round", 2), ("ceil", 3)):
        near, far = split_heads(distance, 0.3, rounding)
        assert set(near.tolist()) == set([1, 3, 5][:count]) and set(far.tolist()) == set([2, 6, 4][:count])
    assert [len(x) for x in split_heads(distance[:3], 0.1)] == [1, 1]
    assert middle_layers(36) == [12, 15, 18, 21, 24] and middle_layers(2) == [0, 1] and middle_layers(1) == [0]


# -- a model -----------------------------------------------------------------------------------------------------------


def by_hand(maps: list[Tensor], response: Tensor, low: int, high: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distance of each head, and both measures, from whole matrices with loops over heads and sequences."""
    weights = torch.cat(maps, 1).double()
    n = weights.shape[-1]
    gaps = (torch.arange(n)[:, None] - torch.arange(n)).clamp_min(0).double()
    distance = torch.stack([(head * gaps).sum(-1)[response].mean() for head in weights.transpose(0, 1)])
    order = distance.argsort()
    near, far = order[:2], order[-2:]
    local = [waad(weights[b, near].mean(0), window) * response[b] for b in range(2)]
    influence = [fai(weights[b, far].mean(0), low, high, response[b]) * response[b] for b in range(2)]
    return distance, torch.stack(local), torch.stack(influence)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("tile", [1 << 20, 700])
def test_a_model_is_measured_as_from_its_maps(
    kind: str, padding: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_tiles, "TILE", tile)  # 700 weights are three rows of all heads
    model, inputs = tiny(kind), text(padding)
    response = (torch.arange(24) >= 9) & inputs["attention_mask"].bool()
    options: dict[str, Any] = {"low": 2, "high": 6, "window": 4}
    found = preplan_anchor(model, inputs["input_ids"], response, attention_mask=inputs["attention_mask"], **options)
    distance, local, influence = by_hand(eager_maps(model, inputs), response, **options)
    assert_near(found.distance.double(), distance, 1e-4)
    assert_near(found.waad.double(), local, 1e-4)
    assert_near(found.fai.double(), influence, 1e-5)
    order = [found.heads[i] for i in distance.argsort().tolist()]
    assert set(found.local_heads) == set(order[:2]) and set(found.global_heads) == set(order[-2:])


def recall_text(length: int = 60) -> tuple[Tensor, int]:
    """A text in which one key and its value stand early, and the key is asked for again and again."""
    ids = torch.randint(FILLER.start, FILLER.stop, (length,), generator=torch.Generator().manual_seed(0))
    ids[0], value = BOS, 8
    ids[[7, 20, 24, 28, 32, 36, 40]] = KEYS.start
    ids[value] = VALUES.start
    return ids[None], value


def test_the_matching_head_is_global_and_its_value_is_the_anchor() -> None:
    """The other heads look one token back: they are local, and influence is that of the head that matches."""
    ids, value = recall_text()
    found = preplan_anchor(
        induction_lm(kv_heads=4), ids, torch.ones_like(ids) > 0, layers=[1], fraction=0.25, low=10, high=40
    )
    assert found.global_heads == ((1, 0),) and (1, 0) not in found.local_heads
    assert int(found.fai[0, 1:20].argmax()) + 1 == value, "of the tokens before the first question"
    assert float(((found.waad[0] - 1).abs() < 0.05).float().mean()) > 0.7, "a few tokens look further, by coincidence"


# -- a planted rhythm --------------------------------------------------------------------------------------------------

CHUNK, CHUNKS, LENGTH = 6, 20, 120
STARTS, ANCHORS = torch.arange(0, LENGTH, CHUNK), torch.arange(1, LENGTH, CHUNK)


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Return a local and a global map: phrases of six tokens, whose first looks far and whose second is asked later."""
    draw = torch.Generator().manual_seed(seed)
    local, far = 0.02 * torch.rand(2, LENGTH, LENGTH, generator=draw)
    ends = torch.arange(LENGTH)
    local[ends, (ends - 1).clamp_min(0)] += 3.0
    local[STARTS, (STARTS - 9).clamp_min(0)] += 12.0
    far[:, ANCHORS] += 1.0
    return tuple(x.tril() / x.tril().sum(-1, keepdim=True) for x in (local, far))  # type: ignore[return-value]


def f1(x: Tensor, truth: Tensor) -> float:
    found = set(x.topk(len(truth)).indices.tolist())
    return len(found & set(truth.tolist())) / len(truth)


def test_a_planted_rhythm_is_found(claim: ClaimFixture) -> None:
    ours, shuffled, ratio = list[float](), list[float](), list[float]()
    for seed in range(5):
        local, far = planted(seed)
        order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(seed))
        distance, influence = waad(local), fai(far, 4, 50)
        # the first phrase has nothing before it, and the last tokens nobody after them
        ours += [f1(distance[CHUNK:], STARTS[1:] - CHUNK), f1(influence[:110], ANCHORS[ANCHORS < 110])]
        shuffled.append(f1(waad(local[order])[CHUNK:], STARTS[1:] - CHUNK))
        shuffled.append(f1(fai(far[:, order], 4, 50)[:110], ANCHORS[ANCHORS < 110]))
        found = coupling(distance[:110], influence[:110], reach=1, share=0.16)
        ratio.append(found.share / found.chance)
    assert min(ours) > 0.9 and min(ratio) > 2.5
    claim(
        "first and anchor tokens of planted phrases are found by WAAD and FAI: F1, the worst of 5 drawings",
        ours=min(ours), baseline=max(shuffled), better="higher", margin=0.4,
        baseline_name="shuffled rows and columns", seed=0,
    )  # fmt: skip


def test_coupling_by_hand() -> None:
    distance, influence = torch.zeros(2, 12)
    distance[[2, 8]] = 1.0
    influence[[3, 8, 6]] = torch.tensor([1.0, 2.0, 3.0])
    found = coupling(distance, influence, reach=1, share=0.25)
    assert found.share == pytest.approx(2 / 3) and found.chance == pytest.approx(4 / 12)
    assert coupling(distance, influence, reach=0, share=0.25).share == pytest.approx(1 / 3)
    assert coupling(distance, influence, reach=4, share=0.25).share == 1.0


# -- credit ------------------------------------------------------------------------------------------------------------


def signals(seed: int = 0, batch: int = 3, n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, batch, n, generator=draw).unbind())  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["local", "global", "coupled"])
def test_what_is_not_amplified_is_bit_identical(kind: str) -> None:
    advantages, distance, influence = signals()
    same = rhythm_credit(advantages, distance, influence, kind=kind, gain=1.0)
    assert torch.equal(same, advantages)
    given = -advantages.abs()
    assert torch.equal(rhythm_credit(given, distance, influence, kind=kind), given)
    assert not torch.equal(rhythm_credit(given, distance, influence, kind=kind, penalties=True), given)
    response = torch.arange(40).expand(3, -1) >= 25
    found = rhythm_credit(advantages, distance, influence, response, kind=kind)
    assert torch.equal(found[~response], advantages[~response])


def test_local_and_global_credit_go_to_the_top_share() -> None:
    _, distance, influence = signals()
    ones = torch.ones_like(distance)
    for kind, signal in (("global", influence), ("local", torch.stack([turn(row) for row in distance]))):
        found = rhythm_credit(ones, distance, influence, kind=kind, gain=1.5, share=0.4)
        for row in range(3):
            top = set(signal[row].topk(16).indices.tolist())
            assert {i for i in range(40) if found[row, i] == 1.5} == top
            assert set(found[row].tolist()) == {1.0, 1.5}
    assert torch.equal(turn(torch.tensor([1.0, 4.0, 2.0])), torch.tensor([3.0, 2.0, 0.0]))


def test_coupled_credit_by_hand() -> None:
    """The anchor at 5 is decided by its context: 4 introduced it. That at 9 has no turn near before it."""
    distance = torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    influence = torch.zeros(1, 10)
    influence[0, [5, 9]] = 1.0
    found = rhythm_credit(torch.ones(1, 10), distance, influence, gain=1.5, share=0.2, back=0.4, reach=2, jump=0.9)
    expected = torch.ones(1, 10)
    expected[0, 5], expected[0, 4], expected[0, 9] = 1.3, 1.2, 1.5
    assert_near(found, expected, 1e-6)


def test_coupled_credit_keeps_the_sum_where_introductions_differ() -> None:
    n, anchors = 60, torch.arange(4, 60, 6)
    distance, influence = torch.ones(2, 1, n).unbind()
    distance, influence = distance.clone(), torch.zeros(1, n)
    distance[0, anchors - 1], influence[0, anchors] = 5.0, 1.0
    options: dict[str, Any] = {"share": len(anchors) / n, "reach": 3, "jump": 0.7}
    whole = rhythm_credit(torch.ones(1, n), distance, influence, kind="global", **options)
    shared = rhythm_credit(torch.ones(1, n), distance, influence, kind="coupled", **options)
    assert not torch.equal(whole, shared)
    assert float((shared - 1).sum()) == pytest.approx(float((whole - 1).sum()), abs=1e-5)


def updates_to_learn(seed: int, credit: str) -> int:
    """Updates until twelve tokens, of which two decide the reward, are right nine times out of ten."""
    draw = torch.Generator().manual_seed(seed)
    n, words, decisive = 12, 4, torch.tensor([3, 8])
    far = torch.full((n + 4, n + 4), 0.1)
    far[:, decisive] = 1.0  # what the later tokens return to
    influence = fai((far.tril() / far.tril().sum(-1, keepdim=True)), 1, 4)[:n]
    logits = torch.zeros(n, words)
    for update in range(1, 2000):
        chances = logits.softmax(-1)
        if float(chances[decisive, 0].prod()) >= 0.9:
            return update
        tokens = torch.multinomial(chances.expand(64, -1, -1).flatten(0, 1), 1, generator=draw).view(64, n)
        reward = (tokens[:, decisive] == 0).all(-1).float()
        advantage = ((reward - reward.mean()) / (reward.std() + 1e-6))[:, None].expand(-1, n)
        if credit != "uniform":
            signal = influence.expand(64, -1) if credit == "anchors" else torch.rand(64, n, generator=draw)
            advantage = rhythm_credit(advantage, signal, signal, kind="global", share=2 / n)
        gradient = torch.nn.functional.one_hot(tokens, words) - chances
        logits = logits + 0.3 * (advantage[..., None] * gradient).mean(0)
    return 2000


def test_credit_at_anchors_learns_in_fewer_updates(claim: ClaimFixture) -> None:
    median = {
        credit: sorted(updates_to_learn(seed, credit) for seed in range(9))[4]
        for credit in ("uniform", "random", "anchors")
    }
    claim(
        "updates until two decisive tokens of twelve are right nine times out of ten, median of 9 seeds",
        ours=median["anchors"], baseline=min(median["uniform"], median["random"]), better="lower", margin=5.0,
        baseline_name="one credit for all tokens, or more for random ones", seed=0,
    )  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    model, ids = tiny("llama"), text()["input_ids"]
    response = torch.ones_like(ids, dtype=torch.bool)
    bad: list[tuple[type[FoveateError], str, Tensor, dict[str, Any]]] = [
        (ShapeError, "response must be bool", ids, {}),
        (OptionError, "marks no token", ~response, {}),
        (OptionError, "attending layers", response, {"layers": [5]}),
        (OptionError, "high=3", response, {"high": 3}),
        (OptionError, "window=0", response, {"window": 0}),
        (OptionError, "fraction=0.6", response, {"fraction": 0.6}),
        (OptionError, "rounding=", response, {"rounding": "up"}),
    ]
    for error, words, marks, options in bad:
        with pytest.raises(error, match=words):
            preplan_anchor(model, ids, marks, **options)
    x = torch.rand(1, 8)
    for name, value in (("kind", "both"), ("share", 1.5), ("back", -0.1), ("reach", 0), ("calm", 2.0), ("jump", 2.0)):
        with pytest.raises(OptionError, match=f"{name}="):
            rhythm_credit(x, x, x, **{name: value})
    with pytest.raises(ShapeError, match="one shape"):
        rhythm_credit(x, x[:, :4], x)
    with pytest.raises(OptionError, match="peak"):
        coupling(torch.zeros(5), torch.zeros(5))
    with pytest.raises(ShapeError, match="two tokens"):
        coupling(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ShapeError, match="two heads"):
        split_heads(torch.ones(1))
    assert isinstance(preplan_anchor(model, ids, response, layers=[0]), Rhythm)
