"""Successive halving: all policies on few examples, the better half of them on twice as many, and so on.

Non-stochastic Best Arm Identification and Hyperparameter Optimization (2015), arXiv 1502.07943. Here each arm, a policy
with its options, has one value: the bytes of its cheapest budget that loses no more than is allowed. That budget is
found by bisection, so that an arm is never judged at a budget that it cannot meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foveate.bench.tuning.setting import Arm, Setting
from foveate.bench.tuning.trials import Measured

#: Bytes within this ratio count as equal, so that time decides.
SAME = 1.005


class Measures(Protocol):
    """A measurement of settings on examples; see `Trials.measure`."""

    def measure(
        self, settings: Sequence[Setting], examples: Sequence[int], stage: str, *, shared: bool = True,
        most: float | None = None, damage: bool = False,
    ) -> dict[Setting, Measured]: ...  # fmt: skip


@dataclass(frozen=True)
class Found:
    """An arm's cheapest setting that holds, or None.

    Args:
        arm: the policy with its options.
        budget: the setting's budget; 1 if none holds.
        share: its bytes as a share of the full cache's; 1 if none holds.
        ms: milliseconds of a token.
        why: the reason if the arm cannot run.
    """

    arm: Arm
    budget: float = 1.0
    share: float = 1.0
    ms: float = float("inf")
    why: str = ""

    @property
    def setting(self) -> Setting:
        return Setting.of(self.arm, self.budget)


def holds(one: Measured, count: int, most: float) -> bool:
    """Return whether a setting was measured on all examples and loses no more than is allowed."""
    return not one.failed and len(one.outcomes) == count and one.lost <= most + 1e-9


def cheapest(
    trials: Measures, ladders: dict[Arm, Sequence[float]], examples: Sequence[int], most: float, stage: str
) -> list[Found]:
    """Return each arm's cheapest setting that holds, by bisection over its budgets; all arms go on together.

    A setting at a larger budget is taken to lose less. Where that is wrong, a cheaper one may be missed; what is
    returned was measured and holds.
    """
    found = {arm: Found(arm) for arm in ladders}
    bounds = {arm: (0, len(ladder)) for arm, ladder in ladders.items()}
    while active := {arm: (low + high) // 2 for arm, (low, high) in bounds.items() if low < high}:
        settings = {arm: Setting.of(arm, ladders[arm][middle]) for arm, middle in active.items()}
        measured = trials.measure(list(settings.values()), examples, stage, most=most)
        for arm, middle in active.items():
            one, (low, high) = measured[settings[arm]], bounds[arm]
            if one.failed:
                found[arm], bounds[arm] = Found(arm, why=one.failed), (0, 0)
            elif holds(one, len(examples), most):
                found[arm] = Found(arm, ladders[arm][middle], one.share, one.ms)
                bounds[arm] = low, middle
            else:
                bounds[arm] = middle + 1, high
    return list(found.values())


def ranked(found: Sequence[Found]) -> list[Found]:
    """Order arms by bytes; time decides between equal bytes."""
    ordered = sorted(found, key=lambda one: (one.share, one.ms))
    for at in range(len(ordered) - 1):
        one, two = ordered[at : at + 2]
        if two.share <= one.share * SAME and two.ms < one.ms:
            ordered[at : at + 2] = two, one
    return ordered


def halving(
    trials: Measures, ladders: dict[Arm, Sequence[float]], rungs: Sequence[Sequence[int]], most: float, stage: str,
    last: int,
) -> list[Found]:  # fmt: skip
    """Return the best arms, ranked on the examples of the last rung.

    Args:
        trials: measures settings.
        ladders: the budgets of each arm, from the smallest.
        rungs: the examples of each rung, each about twice as many as before.
        most: the mean loss that is allowed.
        stage: named in the progress.
        last: the arms that reach the last rung.
    """
    arms = list(ladders)
    found: list[Found] = []
    for number, examples in enumerate(rungs):
        name = f"{stage} {number + 1}/{len(rungs)}"
        found = ranked(cheapest(trials, {arm: ladders[arm] for arm in arms}, examples, most, name))
        if number + 1 < len(rungs):
            keep = max(last, (len(found) + 1) // 2) if number + 2 < len(rungs) else last
            arms = [one.arm for one in found if not one.why][:keep]
    return found
