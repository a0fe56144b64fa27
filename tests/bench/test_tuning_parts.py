"""The parts of a search, on constructed cases: halving, budgets by layer, bounds and the split of the examples."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from foveate.bench.tuning import bounds, holdout, layers as by_layer
from foveate.bench.tuning.examples import split
from foveate.bench.tuning.halving import Found, cheapest, halving, ranked
from foveate.bench.tuning.search import Search
from foveate.bench.tuning.setting import Arm, Part, Setting
from foveate.bench.tuning.space import policies, variants
from foveate.bench.tuning.trials import FULL, Measured, Outcome
from foveate.core.errors import OptionError, TaskError
from foveate.tasks.files.prompts import Prompts
from foveate.tasks.text.needle import Needle
from tests.bench.conftest import write_prompts

LAYERS = range(6)
LEVELS = (0.1, 0.2, 0.4, 0.7)

Budgets = dict[int, float]


def budgets_of(setting: Setting) -> Budgets:
    """Return the share that each layer keeps: the smallest of the parts that act on it."""
    return {
        layer: min([1.0, *(part.budget for part in setting.parts if part.layers is None or layer in part.layers)])
        for layer in LAYERS
    }


class World:
    """Measures settings by a rule instead of a model: the share of a layer's tokens says what is lost.

    Args:
        loses: the loss of a setting on an example; that on the first example is its damage too.
    """

    def __init__(self, loses: Callable[[Setting, int], float]) -> None:
        self.loses = loses
        self.measured: list[tuple[Setting, int]] = []

    def measure(
        self, settings: Sequence[Setting], examples: Sequence[int], stage: str, *, shared: bool = True,
        most: float | None = None, damage: bool = False,
    ) -> dict[Setting, Measured]:  # fmt: skip
        found = {}
        for setting in settings:
            share = sum(budgets_of(setting).values()) / len(LAYERS)
            if setting.codec is not None:
                share *= dict(setting.codec.options)["bits"] / 32
            found[setting] = Measured()
            for number in examples:
                self.measured.append((setting, number))
                lost = self.loses(setting, number)
                more = self.loses(setting, 0) if damage else 0.0
                found[setting].outcomes[number] = Outcome(1 - lost, lost, share, 1.0, more)
        return found


def one_layer_needs_everything(setting: Setting, number: int) -> float:
    return float(budgets_of(setting)[3] < 1.0)


def test_policies_that_act_together_on_all_layers_are_not_the_best_single_policy() -> None:
    def loses(setting: Setting, number: int) -> float:
        keys = {part.arm.key for part in setting.parts}
        return float(keys == {"knorm"} and any(share < 0.7 for share in budgets_of(setting).values()))

    search = searched(World(loses), [Arm("duo_attention"), Arm("knorm")])
    assert all(len(one.parts) == 1 for one in search.uniform)
    path = search.candidates()
    assert all(len(one.parts) == 1 for one in path) and path[-1] == search.best and len(path) <= 3


# -- budgets by layer --------------------------------------------------------------------------------------------------


def searched(
    world: World, arms: Sequence[Arm] = (Arm("snapkv"), Arm("knorm")), codecs: Sequence[Sequence[Arm]] = ()
) -> Search:
    search = Search(world, range(12), 0.0, LEVELS, LAYERS, codecs)
    search.run(arms)
    return search


def test_one_layer_needs_everything_and_the_others_nothing() -> None:
    """No policy at one budget can drop anything; by layer, five of six layers are dropped to the smallest budget."""
    world = World(lambda setting, n: float(budgets_of(setting)[3] < 1.0))
    assert not searched(world).uniform
    # with a budget of 0.7 just enough for that layer, there is a setting of one policy, and a much cheaper one by layer
    world = World(lambda setting, n: float(budgets_of(setting)[3] < 0.7))
    search = searched(world)
    assert math.isclose(search.uniform[search.best].share, 0.7)
    best = min(search.layered, key=lambda one: search.layered[one].share)
    assert budgets_of(best) == {layer: 0.7 if layer == 3 else 0.1 for layer in LAYERS}
    assert search.layered[best].share == pytest.approx((0.7 + 5 * 0.1) / 6)
    # every single policy of the space at fewer bytes loses everything
    for arm in (Arm("snapkv"), *variants(Arm("snapkv")), Arm("knorm"), *variants(Arm("knorm"))):
        for level in LEVELS:
            one = world.measure([Setting.of(arm, level)], range(12), "check")[Setting.of(arm, level)]
            assert one.lost == 1.0 or one.share > 2 * search.layered[best].share
    path = search.candidates()
    assert path[-1] == best and path[0] == search.best
    shares = [{**search.uniform, **search.layered}[one].share for one in path]
    assert len(path) == 2 and shares == sorted(shares, reverse=True)


def test_layers_that_need_different_budgets() -> None:
    needs = {0: 0.1, 1: 0.4, 2: 0.1, 3: 0.7, 4: 0.2, 5: 0.1}
    world = World(lambda setting, n: float(any(share < needs[layer] for layer, share in budgets_of(setting).items())))
    search = searched(world)
    best = min(search.layered, key=lambda one: search.layered[one].share)
    assert budgets_of(best) == needs


def test_refinement_lowers_each_layer_as_far_as_it_holds() -> None:
    needs, tried = {0: 0.1, 1: 0.4, 2: 0.7}, []

    def is_held(setting: Setting) -> bool:
        tried.append(setting)
        return all(share >= needs.get(layer, 0.0) for layer, share in budgets_of(setting).items())

    start = dict.fromkeys(needs, 1.0)
    assert by_layer.refine(Arm("snapkv"), FULL, start, LEVELS, is_held, 50) == needs
    tried.clear()
    by_layer.refine(Arm("snapkv"), FULL, start, LEVELS, is_held, 3)
    assert len(tried) == 3


def test_a_loss_on_one_example_of_twelve_is_too_much_if_none_is_allowed() -> None:
    world = World(lambda setting, n: float(budgets_of(setting)[3] < 0.7 and n == 11))
    search = searched(world)
    assert search.uniform[search.best].share == pytest.approx(0.7)
    assert all(one.lost == 0.0 for one in (*search.uniform.values(), *search.layered.values()))


def known(damage: dict[int, list[float]]) -> by_layer.Sensitivities:
    shares = {layer: [level / len(damage) for level in (*LEVELS, 1.0)] for layer in damage}
    return by_layer.Sensitivities((*LEVELS, 1.0), damage, shares)


def test_the_programme_gives_the_least_damage_within_the_bytes() -> None:
    """The integer programme agrees with trying all allocations; the greedy path may not."""
    draw = random.Random(1)
    damage = {layer: [*sorted((draw.random() for _ in range(4)), reverse=True), 0.0] for layer in range(4)}
    table = known(damage)
    every = [dict(enumerate((a, b, c, d))) for a in range(5) for b in range(5) for c in range(5) for d in range(5)]

    def total(chosen: dict[int, int]) -> float:
        return sum(damage[layer][level] for layer, level in chosen.items())

    for most in (0.15, 0.3, 0.5, 0.8, 1.0):
        found = by_layer.programme(table, most)
        assert found is not None and table.total(found) <= most + 1e-9
        assert total(found) == pytest.approx(min(total(one) for one in every if table.total(one) <= most + 1e-9))
        path = [one for one in by_layer.greedy(table) if table.total(one) <= most + 1e-9]
        assert total(path[0]) >= total(found) - 1e-9
    assert by_layer.programme(table, 0.05) is None


def test_greedy_lowers_the_cheapest_layer_first() -> None:
    damage = {layer: [5.0, 4.0, 3.0, 2.0, 0.0] for layer in range(3)} | {1: [0.0] * 5}
    path = list(by_layer.greedy(known(damage)))
    assert path[3] == {0: 4, 1: 0, 2: 4} and len(path) == 12 and path[-1] == {0: 0, 1: 0, 2: 0}


def test_without_scipy_the_greedy_search_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(OptionError, match=r"pip install .foveate\[search\]."):
        by_layer.programme(known({0: [1.0, 1.0, 1.0, 1.0, 0.0]}), 1.0)
    search = searched(World(lambda setting, n: float(budgets_of(setting)[3] < 0.7)))
    assert "greedy search ran alone" in search.notes[0]
    assert min(one.share for one in search.layered.values()) == pytest.approx(0.2)


def test_noise_in_the_damage_has_no_part() -> None:
    assert by_layer._falling([0.3, -0.1, 0.2]) == [0.3, 0.2, 0.2]


def test_a_base_beside_which_layers_have_budgets() -> None:
    """The best policy splits heads and cannot act on layers; another one drops more of what it leaves, by layer."""

    def loses(setting: Setting, number: int) -> float:
        keys, shares = {part.arm.key for part in setting.parts}, budgets_of(setting)
        if keys == {"knorm"}:
            return float(any(share < 0.7 for share in shares.values()))
        return float(shares[3] < 0.4 or ("knorm" in keys and shares[0] < 0.2))

    search = searched(World(loses), [Arm("duo_attention"), Arm("knorm")])
    assert search.best.parts[0].arm.key == "duo_attention" and search.best.parts[0].budget == pytest.approx(0.4)
    best = min(search.layered, key=lambda one: search.layered[one].share)
    assert (
        len(search.best.parts) == 1
        and best.parts[0] == search.best.parts[0]
        and {part.arm.key for part in best.parts[1:]} == {"knorm"}
    )
    assert budgets_of(best) == {0: 0.2, 1: 0.1, 2: 0.1, 3: 0.4, 4: 0.1, 5: 0.1}


# -- codecs ------------------------------------------------------------------------------------------------------------


def ladder(key: str, *bits: int) -> list[Arm]:
    return [Arm(key, (("bits", width),)) for width in bits]


def test_codes_are_narrowed_as_long_as_the_setting_holds() -> None:
    def loses(setting: Setting, number: int) -> float:
        width = 32 if setting.codec is None else dict(setting.codec.options)["bits"]
        least = 8 if setting.codec is not None and setting.codec.key == "kivi" else 3
        return float(width < least or any(share < 0.2 for share in budgets_of(setting).values()))

    world = World(loses)
    search = searched(world, codecs=[ladder("turboquant", 4, 3, 2, 1), ladder("kivi", 4, 2)])
    tried = {one.codec.options[0][1] for one, _ in world.measured if one.codec and one.codec.key == "turboquant"}
    assert tried == {4, 3, 2}  # 1 bit is not tried, since 2 lost
    assert {one.codec for one in search.encoded} == set(ladder("turboquant", 4, 3))
    codec, best = Arm("turboquant", (("bits", 3),)), search.best
    path = search.candidates()
    safer = [Setting.of(best.parts[0].arm, budget) for budget in (0.7, 0.4)]
    assert path == [safer[0], *(replace(each, codec=codec) for each in (*safer, best))]


def test_budgets_by_layer_are_tested_with_the_codec_too() -> None:
    world = World(lambda setting, n: float(budgets_of(setting)[3] < 0.7))
    search = searched(world, codecs=[ladder("kivi", 4)])
    last = search.candidates()[-1]
    assert last.codec == Arm("kivi", (("bits", 4),)) and budgets_of(last)[3] == 0.7 and budgets_of(last)[0] == 0.1


def test_a_codec_alone_is_the_result_where_nothing_may_be_dropped() -> None:
    world = World(lambda setting, n: float(bool(setting.parts)))
    search = searched(world, codecs=[ladder("kivi", 4, 2)])
    assert not search.uniform
    assert search.candidates() == [Setting(codec=Arm("kivi", (("bits", 2),)))]
    assert searched(world).candidates() == []


def test_settings_with_a_codec() -> None:
    codec = Arm("kivi", (("bits", 4),))
    made = replace(Setting.of(Arm("snapkv"), 0.2), codec=codec)
    assert made.label == "snapkv at 0.2 + kivi, bits=4" and Setting(codec=codec).label == "kivi, bits=4"
    assert made.identity({}) != Setting.of(Arm("snapkv"), 0.2).identity({})
    assert made.identity({}) != replace(made, codec=Arm("kivi", (("bits", 2),))).identity({})
    assert made.recipe({}).entries[-1] == {"method": "kivi", "options": {"bits": 4}}


# -- halving -----------------------------------------------------------------------------------------------------------


def test_each_arm_is_judged_at_the_cheapest_budget_that_holds() -> None:
    needs = {"snapkv": 0.4, "knorm": 0.2, "tova": 2.0}
    world = World(lambda setting, n: float(setting.parts[0].budget < needs[setting.parts[0].arm.key]))
    ladders = {Arm(key): LEVELS for key in needs}
    found = {one.arm.key: one.budget for one in cheapest(world, ladders, range(4), 0.0, "")}
    assert found == {"snapkv": 0.4, "knorm": 0.2, "tova": 1.0}
    assert [one.arm.key for one in halving(world, ladders, [range(2), range(4)], 0.0, "", 2)] == ["knorm", "snapkv"]


def test_later_rungs_have_fewer_arms_and_more_examples() -> None:
    world = World(lambda setting, n: 0.0)
    arms = [Arm("snapkv").with_option("pool", n) for n in range(1, 17)]
    halving(world, dict.fromkeys(arms, (0.5,)), [range(2), range(4), range(8)], 0.0, "", 3)
    counts = [sum(1 for setting, number in world.measured if number == at) for at in (1, 3, 7)]
    assert counts == [16 + 8 + 3, 8 + 3, 3]


def test_time_decides_between_equal_bytes() -> None:
    slow, fast, small = (
        Found(Arm(key), 0.5, share, ms) for key, share, ms in (("a", 0.5, 3), ("b", 0.501, 2), ("c", 0.4, 9))
    )
    assert [one.arm.key for one in ranked([slow, fast, small])] == ["c", "b", "a"]


def test_options_are_those_that_the_policy_declares() -> None:
    labels = {one.label for one in variants(Arm("snapkv"))}
    assert {"snapkv, pooling=max", "snapkv, group=sum", "snapkv, heads=adaptive", "snapkv, pool=1"} <= labels
    assert not any("safeguard" in label or "share" in label or "layers" in label for label in labels)
    adaptive = {one.label for one in variants(Arm("snapkv").with_option("heads", "adaptive"))}
    assert "snapkv, heads=adaptive, safeguard=0.0" in adaptive
    assert "adakv, base=expected_attention" in {one.label for one in variants(Arm("adakv"))}
    assert "random_keep" not in policies() and {"snapkv", "sink_recent"} <= set(policies())
    assert "token_select" not in policies()


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_by_layer() -> None:
    arm = Arm("snapkv")
    made = Setting.by_layer(arm, {0: 0.1, 1: 1.0, 2: 0.1, 3: 0.5})
    assert made.parts == (Part(arm, 0.1, (0, 2)), Part(arm, 0.5, (3,)))
    assert made.label == "snapkv at 0.1 in layers 0, 2, 0.5 in layer 3"
    assert Setting.by_layer(arm, {0: 0.1, 1: 0.1}) == Setting.of(arm, 0.1)
    assert Setting.by_layer(arm, {0: 1.0, 1: 1.0}) == FULL and FULL.label == "full cache"
    entry = Part(Arm("adakv").with_option("base", "expected_attention"), 0.3, (1,)).entry({})
    assert entry == {
        "method": "adakv", "budget": 0.3,
        "options": {"base": {"method": "expected_attention", "budget": 0.3}, "layers": [1]},
    }  # fmt: skip


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_bound_of_lost_answers_is_the_exact_binomial_one() -> None:
    for lost, count in ((0, 149), (1, 60), (7, 40)):
        expected = stats.beta.ppf(0.95, lost + 1, count - lost)
        assert bounds.upper([1.0] * lost + [0.0] * (count - lost)) == pytest.approx(expected, abs=1e-9)
    assert bounds.upper([1.0] * 5) == 1.0
    assert bounds.needed(0.02) == 149 and bounds.upper([0.0] * 149) <= 0.02 < bounds.upper([0.0] * 148)


def test_gains_do_not_make_up_for_losses() -> None:
    assert bounds.upper([1.0, -1.0, *[0.0] * 58]) == bounds.upper([1.0, 0.0, *[0.0] * 58])


def test_the_bound_of_shares_lies_between_and_holds_as_often_as_it_says() -> None:
    assert bounds.upper([0.0] * 50 + [0.5] * 4) < bounds.upper([0.0] * 50 + [1.0] * 4)
    draw, missed = random.Random(0), 0
    for _ in range(400):
        sample = [draw.choice([0.0, 0.0, 0.0, 0.5]) for _ in range(40)]
        missed += bounds.upper(sample) < 0.125
    assert missed <= 0.05 * 400


def test_the_bound_of_next_token_losses_is_students() -> None:
    sample = [0.01, 0.03, -0.01, 0.02, 0.015, 0.0]
    expected = stats.t.ppf(0.95, 5) * stats.sem(sample) + sum(sample) / 6
    assert bounds.upper(sample, bounded=False) == pytest.approx(expected, rel=1e-2)
    assert bounds.upper([0.1], bounded=False) == math.inf


# -- the test on held-out examples -------------------------------------------------------------------------------------


def test_settings_are_tested_from_safe_to_cheap_up_to_the_first_failure() -> None:
    arm = Arm("snapkv")
    path = [Setting.of(arm, share) for share in (0.7, 0.4, 0.2, 0.1)]
    world = World(lambda setting, n: float(setting.parts[0].budget < 0.3 and n % 10 == 0))
    tests = holdout.test(world, path, range(160), 0.02, 0.95, True)
    assert [test.passed for test in tests] == [True, True, False] and len(tests) == 3
    assert tests[1].bound == pytest.approx(bounds.upper([0.0] * 160)) and tests[2].bound > 0.1


def test_one_lost_answer_of_150_is_not_enough_for_two_percent() -> None:
    world = World(lambda setting, n: float(n == 7))
    (one,) = holdout.test(world, [Setting.of(Arm("snapkv"), 0.5)], range(150), 0.02, 0.95, True)
    assert one.measured.lost < 0.02 and not one.passed
    # with too few examples for any claim, the mean decides; `tune` says so
    (one,) = holdout.test(world, [Setting.of(Arm("snapkv"), 0.5)], range(60), 0.02, 0.95, True)
    assert one.passed and one.bound > 0.02 and not holdout.is_certain(60, 0.02, 0.95, True)


# -- examples ----------------------------------------------------------------------------------------------------------


def test_no_example_is_in_both_parts(tmp_path: Path) -> None:
    search, held_out = split(Needle(length=300, count=60), 20, 40, 0)
    assert (len(search), len(held_out)) == (20, 40)
    assert not {one.prompt for one in search} & {one.prompt for one in held_out}
    file = write_prompts(tmp_path / "mine.jsonl", [f"prompt {n % 40}" for n in range(80)])
    search, held_out = split(Prompts(file), 20, 40, 0)
    assert (len(search), len(held_out)) == (10, 30)  # 40 differ; a quarter is for the search
    assert not {one.prompt for one in search} & {one.prompt for one in held_out}
    assert [one.prompt for one in search] != [f"prompt {n}" for n in range(10)]  # they are shuffled
    assert search != split(Prompts(file), 20, 40, 1)[0]
    with pytest.raises(TaskError, match="holds 12 different examples; at least 16 are needed"):
        split(Prompts(write_prompts(tmp_path / "few.jsonl", [f"prompt {n}" for n in range(12)])), 20, 40, 0)
