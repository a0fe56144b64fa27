"""The test on held-out examples: what is claimed of the result, and with which confidence.

Settings are tested from the most bytes to the fewest, each with all of the confidence, and the first that fails ends
the test. So the chance that any setting that passed loses too much is at most one minus the confidence, although
several were tested (fixed-sequence testing; Learn then Test, 2021, arXiv 2110.01052).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.bench.tuning import bounds
from foveate.bench.tuning.halving import Measures
from foveate.bench.tuning.setting import Setting
from foveate.bench.tuning.trials import Measured


@dataclass(frozen=True)
class Test:
    """A setting on the held-out examples.

    Args:
        setting: the setting.
        measured: what was measured; not all examples if it failed early.
        bound: the most that it loses on average, with the confidence; inf if it failed early.
        passed: whether it keeps enough.
    """

    setting: Setting
    measured: Measured
    bound: float
    passed: bool


def test(
    trials: Measures, candidates: Sequence[Setting], examples: Sequence[int], most: float, level: float, bounded: bool
) -> list[Test]:
    """Test settings in their order up to the first failure.

    Args:
        candidates: from the most bytes to the fewest.
        examples: the held-out examples.
        most: the mean loss that is allowed.
        level: the confidence.
        bounded: whether scores are in 0..1.
    """
    strict, found = is_certain(len(examples), most, level, bounded), list[Test]()
    for setting in candidates:
        one = trials.measure([setting], examples, "held-out", shared=False, most=most)[setting]
        lost = [outcome.lost for outcome in one.outcomes.values()]
        complete = not one.failed and len(lost) == len(examples)
        bound = bounds.upper(lost, level, bounded) if complete else float("inf")
        passed = complete and (bound if strict else one.lost) <= most + 1e-9
        found.append(Test(setting, one, bound, passed))
        if not passed:
            break
    return found


def is_certain(count: int, most: float, level: float, bounded: bool) -> bool:
    """Return whether so many examples can show a loss of at most `most`; if not, their mean has to do."""
    return not bounded or count >= bounds.needed(most, level)
