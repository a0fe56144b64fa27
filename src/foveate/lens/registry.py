"""The measures by name."""

from __future__ import annotations

from foveate.core.errors import unknown
from foveate.lens.measures import Entropy, Measure, ReceivedMass, SinkMass
from foveate.lens.position_measures import AtOffset, MeanDistance, WindowMass

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Entropy(), SinkMass(), ReceivedMass(), ReceivedMass(per_row=True), MeanDistance(), AtOffset(0), AtOffset(1),
        WindowMass(),
    )
}  # fmt: skip


def named(measure: str | Measure) -> Measure:
    """Return a measure by its name, or the given measure."""
    if isinstance(measure, Measure):
        return measure
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    return MEASURES[measure]
