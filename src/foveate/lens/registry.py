"""The measures by name."""

from __future__ import annotations

from foveate.core.errors import unknown
from foveate.lens.measures import Entropy, Measure, ReceivedMass, SinkMass
from foveate.lens.output_measures import OutputNorm
from foveate.lens.position_measures import AtOffset, MeanDistance, WindowMass
from foveate.lens.token_measures import CopyMass, DuplicateMass, InductionMass
from foveate.lens.window_measures import FutureInfluence, WindowedDistance

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Entropy(), SinkMass(), ReceivedMass(), ReceivedMass(per_row=True), MeanDistance(), AtOffset(0), AtOffset(1),
        WindowMass(), WindowedDistance(), FutureInfluence(), DuplicateMass(), InductionMass(), CopyMass(), OutputNorm(),
    )
}  # fmt: skip


def named(measure: str | Measure) -> Measure:
    """Return a measure by its name, or the given measure."""
    if isinstance(measure, Measure):
        return measure
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    return MEASURES[measure]
