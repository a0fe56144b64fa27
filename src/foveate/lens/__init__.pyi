# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.lens import Lens as Lens
from foveate.lens.lens import Look as Look
from foveate.lens.lens import look as look
from foveate.lens.measures import Entropy as Entropy
from foveate.lens.measures import MEASURES as MEASURES
from foveate.lens.measures import Measure as Measure
from foveate.lens.measures import ReceivedMass as ReceivedMass
from foveate.lens.measures import SinkMass as SinkMass

__all__ = [
    "Entropy",
    "Lens",
    "Look",
    "MEASURES",
    "Measure",
    "ReceivedMass",
    "SinkMass",
    "look",
]
