"""The search: policies and budgets, then options, then a budget for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foveate.bench.tuning import layers as by_layer
from foveate.bench.tuning.halving import Found, Measures, halving, holds
from foveate.bench.tuning.layers import Sensitivities
from foveate.bench.tuning.setting import Arm, Setting
from foveate.bench.tuning.space import acts_on_layers, variants
from foveate.bench.tuning.trials import Measured
from foveate.core.errors import OptionError

#: Examples of the first rung, the fewest that tell policies apart, and those that measure a layer's damage.
FIRST, DAMAGE = 5, 8
#: Arms that reach the last rung, and whose options are tried.
LAST = 3
#: Steps of the bisection between the cheapest budget that holds and the next smaller one.
_FINER = 2


@dataclass
class Search:
    """The state of a search.

    Args:
        trials: measures settings.
        examples: the examples to search with.
        most: the mean loss that is allowed on them.
        budgets: the budgets, from the smallest.
        layers: the numbers of the layers.

    Attributes:
        uniform: settings of one policy at one budget that hold on all examples.
        layered: settings with a budget for each layer that hold on all examples.
        failed: arms that cannot run, with the reason.
        notes: what the reader should know, such as a missing package.
    """

    trials: Measures
    examples: Sequence[int]
    most: float
    budgets: Sequence[float]
    layers: Sequence[int]
    uniform: dict[Setting, Measured] = field(default_factory=dict)
    layered: dict[Setting, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, arms: Sequence[Arm]) -> None:
        """Search; `uniform` and `layered` then have what holds."""
        best = self._halve(dict.fromkeys(arms, self.budgets), "policies")
        tried = {
            other: [budget for budget in self.budgets if budget <= one.budget]
            for one in best
            for other in (one.arm, *variants(one.arm))
        }
        best = self._halve(tried, "options") if tried else []
        self._finer(best)
        able = [one for one in best if acts_on_layers(one.arm.key)]
        if able and len(self.layers) > 1:
            self._by_layer(able[0])

    # -- one budget for all layers -------------------------------------------------------------------------------------

    def _halve(self, ladders: dict[Arm, Sequence[float]], stage: str) -> list[Found]:
        """Return the arms of the last rung that have a setting that holds, the cheapest first."""
        found = halving(self.trials, ladders, self._rungs(), self.most, stage, LAST)
        self.failed |= {one.arm.label: one.why for one in found if one.why}
        good = [one for one in found if one.share < 1]
        for one in good:
            self._hold(one.setting)
        return good

    def _rungs(self) -> list[Sequence[int]]:
        sizes, size = [], FIRST
        while size < len(self.examples):
            sizes.append(size)
            size *= 2
        return [self.examples[:size] for size in [*sizes, len(self.examples)]]

    def _finer(self, best: Sequence[Found]) -> None:
        """Look between the cheapest budget of each arm that holds and the next smaller one."""
        for one in best:
            low = max((budget for budget in self.budgets if budget < one.budget), default=one.budget / 2)
            high = one.budget
            for _ in range(_FINER):
                middle = round((low * high) ** 0.5, 4)
                low, high = (low, middle) if self._hold(Setting.of(one.arm, middle)) else (middle, high)

    def _hold(self, setting: Setting) -> bool:
        """Return whether a setting holds on all examples, and note it."""
        stage = "layers" if any(part.layers for part in setting.parts) else "budgets"
        one = self.trials.measure([setting], self.examples, stage, most=self.most)[setting]
        if not holds(one, len(self.examples), self.most):
            return False
        uniform = all(part.layers is None for part in setting.parts)
        (self.uniform if uniform else self.layered)[setting] = one
        return True

    # -- a budget for each layer ---------------------------------------------------------------------------------------

    def _by_layer(self, best: Found) -> None:
        arm, top = best.arm, min(one.share for one in self.uniform.values())
        known = by_layer.sensitivities(
            self.trials, arm, self.layers, self.budgets, self.examples[:DAMAGE], "layers alone"
        )
        if known is None:
            self.notes.append(f"{arm.label} cannot act on single layers")
            return
        for candidates in (self._greedy(arm, known, top), self._programme(arm, known, top)):
            by_layer.last_that_holds(candidates, self._hold)
        start = min(self.layered, key=lambda one: self.layered[one].share, default=None)
        for budgets in self._starts(arm, start, best.budget):
            by_layer.refine(arm, budgets, self.budgets, self._hold)

    def _greedy(self, arm: Arm, known: Sensitivities, top: float) -> list[Setting]:
        path = [chosen for chosen in by_layer.greedy(known) if known.total(chosen) < top]
        return [Setting.by_layer(arm, known.budgets(chosen)) for chosen in path]

    def _programme(self, arm: Arm, known: Sensitivities, top: float) -> list[Setting]:
        """Return the allocations of least damage, within fewer and fewer bytes."""
        found: list[Setting] = []
        try:
            for step in range(1, 17):
                chosen = by_layer.programme(known, top * 0.9**step)
                if chosen is not None:
                    found.append(Setting.by_layer(arm, known.budgets(chosen)))
        except OptionError as error:
            self.notes.append(f"{error}; the greedy search ran alone")
        return list(dict.fromkeys(found))

    def _starts(self, arm: Arm, start: Setting | None, budget: float) -> list[dict[int, float]]:
        """Return the allocations to refine: the cheapest one that holds, and the same budget for all layers."""
        even = dict.fromkeys(self.layers, budget)
        if start is None:
            return [even]
        own = {layer: part.budget for part in start.parts for layer in part.layers or self.layers}
        return [{layer: own.get(layer, 1.0) for layer in self.layers}, even]

    # -- the result ----------------------------------------------------------------------------------------------------

    def candidates(self, count: int) -> list[Setting]:
        """Return what to test on held-out examples, from the most bytes to the fewest.

        These are the cheapest settings that hold, and safer ones of one policy before them.
        """
        every = {**self.uniform, **self.layered}
        ordered = sorted(every, key=lambda one: every[one].share)
        cheap, safe = ordered[: count - 1], [one for one in ordered[count - 1 :] if one in self.uniform]
        chosen = [*cheap, *safe[-1:]]
        return sorted(dict.fromkeys(chosen), key=lambda one: -every[one].share)

    def share(self, setting: Setting) -> float:
        return {**self.uniform, **self.layered}[setting].share
