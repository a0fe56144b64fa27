"""Looking: where attention goes, measured while the fast kernel runs."""

from foveate.lens.look import Lens, Look
from foveate.lens.measures import MEASURES, Entropy, Measure, ReceivedMass, SinkMass

__all__ = ["MEASURES", "Entropy", "Lens", "Look", "Measure", "ReceivedMass", "SinkMass"]
