"""A budget for each layer: what each layer's compression costs is measured, and the bytes go where they are needed.

The damage of a layer at a budget is the increase of the next-token loss of the full cache's own answer, with all other
layers as they were. Damages are taken to add up. That is an estimate: each allocation that it gives is measured on the
task itself, and only what holds there is used. A base is a policy that acts on all layers beside it, such as one that
splits heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from foveate.bench.tuning.halving import Measures
from foveate.bench.tuning.setting import Arm, Setting
from foveate.core.errors import OptionError

Budgets = dict[int, float]


@dataclass(frozen=True)
class Sensitivities:
    """The cost and the damage of each layer at each level.

    Args:
        levels: budgets, from the smallest to 1.
        damage: by layer, one number for each level; 0 at the last.
        bytes: by layer and level, numbers that add up to the share of the full cache's bytes that is stored.
    """

    levels: tuple[float, ...]
    damage: dict[int, list[float]]
    bytes: dict[int, list[float]]

    def total(self, chosen: dict[int, int]) -> float:
        """Return the bytes of an allocation, which gives each layer the number of its level."""
        return sum(self.bytes[layer][level] for layer, level in chosen.items())

    def budgets(self, chosen: dict[int, int]) -> Budgets:
        return {layer: self.levels[level] for layer, level in chosen.items()}


def sensitivities(
    trials: Measures, arm: Arm, base: Setting, layers: Sequence[int], levels: Sequence[float],
    examples: Sequence[int], stage: str,
) -> Sensitivities | None:  # fmt: skip
    """Measure each layer at each level beside the base; None if the arm cannot act on single layers."""
    alone = {
        (layer, level): Setting.by_layer(arm, {other: level if other == layer else 1.0 for other in layers}, base)
        for layer in layers
        for level in levels
    }
    measured = trials.measure([base, *alone.values()], examples, stage, damage=True)
    if any(one.failed for one in measured.values()):
        return None
    top, start = measured[base].share, measured[base].damage
    damage = {
        layer: [*_falling([measured[alone[layer, level]].damage - start for level in levels]), 0.0] for layer in layers
    }
    even = top / len(layers)  # only sums matter, so that the base's bytes may be shared out in any way
    share = {layer: [*(even - top + measured[alone[layer, level]].share for level in levels), even] for layer in layers}
    return Sensitivities((*levels, 1.0), damage, share)


def _falling(costs: Sequence[float]) -> list[float]:
    """Return damages that never rise with the level, and are not negative: noise has no part in an allocation."""
    found: list[float] = []
    for cost in reversed(costs):
        found.append(max(0.0, cost, found[-1] if found else 0.0))
    return found[::-1]


def greedy(known: Sensitivities) -> Iterator[dict[int, int]]:
    """Yield allocations from the base down: each lowers the layer that loses least for each byte that it frees."""
    top = len(known.levels) - 1
    chosen = dict.fromkeys(known.damage, top)
    while steps := [(_price(known, layer, level), layer) for layer, level in chosen.items() if level > 0]:
        _, layer = min(steps)
        chosen = {**chosen, layer: chosen[layer] - 1}
        yield chosen


def _price(known: Sensitivities, layer: int, level: int) -> float:
    freed = known.bytes[layer][level] - known.bytes[layer][level - 1]
    return (known.damage[layer][level - 1] - known.damage[layer][level]) / max(freed, 1e-9)


def programme(known: Sensitivities, most: float) -> dict[int, int] | None:
    """Return the allocation of least damage within these bytes, by an integer programme; None if there is none.

    Raises:
        OptionError: scipy, which solves it, is not installed.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise OptionError('the integer programme needs the package scipy: pip install "foveate[search]"') from None
    layers, count = list(known.damage), len(known.levels)
    damage = np.array([known.damage[layer] for layer in layers]).ravel()
    cost = np.array([known.bytes[layer] for layer in layers]).ravel()
    one = np.kron(np.eye(len(layers)), np.ones(count))  # each layer has one level
    tie = 1e-9 * cost / max(cost.max(), 1e-12)  # fewer bytes at equal damage
    solved = milp(
        damage + tie, integrality=np.ones_like(damage), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(cost[None], -np.inf, most)],
    )  # fmt: skip
    if solved.x is None:
        return None
    levels = solved.x.reshape(len(layers), count).argmax(1)
    return {layer: int(level) for layer, level in zip(layers, levels, strict=True)}


def last_that_holds(candidates: Sequence[Setting], is_held: Callable[[Setting], bool]) -> Setting | None:
    """Return the last setting that holds of a sequence from safe to cheap, by bisection; None if none does."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_held(candidates[middle]) else (low, middle)
    return candidates[low - 1] if low else None


def refine(
    arm: Arm, base: Setting, start: Budgets, levels: Sequence[float], is_held: Callable[[Setting], bool], most: int
) -> Budgets:
    """Lower one layer after the other by a level, as long as the setting holds; return the last allocation that does.

    Args:
        arm, base: what has a budget for each layer, and what acts beside it.
        start: the first allocation.
        levels: budgets, from the smallest.
        is_held: whether a setting holds.
        most: the most settings to try.
    """
    current, closed = dict(start), set[int]()
    for _ in range(most):
        open_ = [layer for layer in current if layer not in closed]
        if not open_:
            break
        layer = max(open_, key=lambda each: current[each])
        lower = [level for level in levels if level < current[layer]]
        trial = {**current, layer: lower[-1]} if lower else current
        if lower and is_held(Setting.by_layer(arm, trial, base)):
            current = trial
        else:
            closed.add(layer)
    return current
