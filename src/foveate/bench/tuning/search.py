"""The search: policies and budgets, then options, then a budget for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from foveate.bench.tuning import layers as by_layer
from foveate.bench.tuning.halving import Found, Measures, halving, holds
from foveate.bench.tuning.layers import Sensitivities
from foveate.bench.tuning.setting import Arm, Setting
from foveate.bench.tuning.space import acts_on_layers, variants
from foveate.bench.tuning.trials import FULL, Measured
from foveate.core.errors import OptionError

#: Examples of the first rung, the fewest that tell policies apart, and those that measure a layer's damage.
FIRST, DAMAGE = 5, 4
#: Arms that reach the last rung, and whose options are tried.
LAST = 2
#: The most settings of each descent from an allocation; and which settings by layer are tested in the end, by their
#: bytes over the fewest.
REFINED, SAFER = 8, (1.15, 1.0)
#: The largest budget of a layer, over the best budget for all layers.
WIDEST = 6
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
        codecs: what may hold the tokens that stay encoded, each from its widest code to its narrowest.

    Attributes:
        uniform: settings of one policy at one budget that hold on all examples.
        layered: settings with a budget for each layer that hold on all examples.
        encoded: settings with a codec that hold on all examples.
        failed: arms that cannot run, with the reason.
        notes: what the reader should know, such as a missing package.
    """

    trials: Measures
    examples: Sequence[int]
    most: float
    budgets: Sequence[float]
    layers: Sequence[int]
    codecs: Sequence[Sequence[Arm]] = ()
    uniform: dict[Setting, Measured] = field(default_factory=dict)
    layered: dict[Setting, Measured] = field(default_factory=dict)
    encoded: dict[Setting, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, arms: Sequence[Arm]) -> None:
        """Search; `uniform`, `layered` and `encoded` then have what holds."""
        first = self._halve(dict.fromkeys(arms, self.budgets), "policies")
        tried: dict[Arm, Sequence[float]] = {
            other: [budget for budget in self.budgets if budget <= one.budget]
            for one in first
            for other in (one.arm, *variants(one.arm))
        }
        best = self._halve(tried, "options") if tried else []
        self._finer(best)
        self._encode(self.best if self.uniform else FULL)
        if not self.uniform or len(self.layers) < 2:
            return
        arm = self.best.parts[0].arm
        if acts_on_layers(arm.key):
            self._by_layer(arm, FULL)
            return
        able = [each for each in (*(one.arm for one in (*best, *first)), *arms) if acts_on_layers(each.key)]
        if able:
            self._by_layer(able[0], self.best)

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
        uniform = len(setting.parts) == 1 and setting.parts[0].layers is None
        (self.encoded if setting.codec else self.uniform if uniform else self.layered)[setting] = one
        return True

    # -- codes for the tokens that stay --------------------------------------------------------------------------------

    def _encode(self, base: Setting) -> None:
        """Hold what a setting keeps encoded, with narrower and narrower codes as long as it holds."""
        for ladder in self.codecs:
            for codec in ladder:
                if not self._hold(replace(base, codec=codec)):
                    break

    # -- a budget for each layer ---------------------------------------------------------------------------------------

    def _by_layer(self, arm: Arm, base: Setting) -> None:
        """Give the arm a budget for each layer, beside a base."""
        top, levels = self._safe_share, self._levels(base)
        known = by_layer.sensitivities(
            self.trials, arm, base, self.layers, levels, self.examples[:DAMAGE], "layers alone"
        )
        if known is None:
            self.notes.append(f"{arm.label} cannot act on single layers beside {base.label}")
            return
        found = [{} if base.parts else dict.fromkeys(self.layers, self.best.parts[0].budget)]
        for path in (self._greedy(known, top), self._programme(known, top)):
            settings = {Setting.by_layer(arm, known.budgets(chosen), base): known.budgets(chosen) for chosen in path}
            last = by_layer.last_that_holds(list(settings), self._hold)
            if last is not None:
                found.append(settings[last])
        even, *measured = found
        best = min(measured, key=lambda each: sum(each.values()), default={})
        for start in (best, even):
            by_layer.refine(arm, base, start, levels, self._hold, REFINED)

    def _levels(self, base: Setting) -> list[float]:
        """Return the budgets that a layer may get: those of the search, and smaller ones where all hold, up to `WIDEST`
        times the best budget for all layers."""
        if base.parts:
            return list(self.budgets)
        best = self.best.parts[0].budget
        smaller = [low for low in (best / 4, best / 2) if low < self.budgets[0]]
        return sorted({*(round(low, 4) for low in smaller), best, *(b for b in self.budgets if b <= WIDEST * best)})

    def _greedy(self, known: Sensitivities, top: float) -> list[dict[int, int]]:
        return [chosen for chosen in by_layer.greedy(known) if known.total(chosen) < top]

    def _programme(self, known: Sensitivities, top: float) -> list[dict[int, int]]:
        """Return the allocations of least damage, within fewer and fewer bytes."""
        found: list[dict[int, int]] = []
        try:
            for step in range(1, 17):
                chosen = by_layer.programme(known, top * 0.9**step)
                if chosen is not None and chosen not in found:
                    found.append(chosen)
        except OptionError as error:
            self.notes.append(f"{error}; the greedy search ran alone")
        return found

    # -- the result ----------------------------------------------------------------------------------------------------

    def candidates(self) -> list[Setting]:
        """Return what to test on held-out examples, from safe to cheap.

        First comes the best policy at the two next larger budgets: what holds on few examples may fail on many. Then
        come settings with a budget for each layer, which lose less at equal bytes, the last of them with the fewest
        bytes; or, if none of them has fewer bytes, the best policy at its cheapest budget that holds. With a codec that
        holds, the policy at the larger of those budgets comes first alone, and then each with the codec: codes free
        more bytes than fewer tokens do, and lose less. Each takes all held-out examples.
        """
        first = self._safer[::-1] if self.uniform else []
        if self.encoded:
            return [*first[:1], *self._encoded(first)]
        if not self.uniform:
            return []
        layered = {one: found.share for one, found in self.layered.items() if found.share < self._safe_share}
        least = min(layered.values(), default=1.0)
        if least >= self.uniform[self.best].share:
            return [*first, self.best]
        first = first or [self.best]
        chosen = [min(layered, key=lambda one: abs(layered[one] - factor * least)) for factor in SAFER]
        return list(dict.fromkeys([*first, *chosen]))

    def _encoded(self, safer: Sequence[Setting]) -> list[Setting]:
        """Return settings with the codec of the fewest bytes, from safe to cheap."""
        codec = min(self.encoded, key=lambda one: self.encoded[one].share).codec
        bases = [*safer, self.best] if self.uniform else [FULL]
        layered = sorted(self.layered, key=lambda one: self.layered[one].share)[:1]
        bases += [one for one in layered if self.layered[one].share < self.uniform[self.best].share]
        return [replace(base, codec=codec) for base in bases]

    @property
    def _safer(self) -> list[Setting]:
        """The best policy at the two next larger budgets, as far as there are any."""
        arm, budget = self.best.parts[0].arm, self.best.parts[0].budget
        return [Setting.of(arm, one) for one in self.budgets if one > budget * 1.05][:2]

    @property
    def _safe_share(self) -> float:
        """The bytes at the next larger budget, measured or in proportion to it; those of the best if there is none."""
        share, safer = self.uniform[self.best].share, self._safer
        if not safer:
            return share
        if safer[0] in self.uniform:
            return self.uniform[safer[0]].share
        return share * safer[0].parts[0].budget / self.best.parts[0].budget

    @property
    def best(self) -> Setting:
        """The cheapest setting of one policy at one budget that holds; there has to be one."""
        return min(self.uniform, key=lambda one: self.uniform[one].share)
