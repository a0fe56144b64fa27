# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.interventions import HeadOutputs as HeadOutputs
from foveate.lens.circuits.interventions import Patch as Patch
from foveate.lens.circuits.interventions import Scale as Scale
from foveate.lens.circuits.interventions import ablate as ablate
from foveate.lens.circuits.interventions import head_means as head_means
from foveate.lens.circuits.interventions import head_outputs as head_outputs
from foveate.lens.heads.retrieval_heads import NeedleCase as NeedleCase
from foveate.lens.heads.retrieval_heads import copying_scores as copying_scores
from foveate.lens.heads.retrieval_heads import needle_span as needle_span
from foveate.lens.heads.retrieval_heads import retrieval_scores as retrieval_scores
from foveate.lens.heads.retrieval_heads import top_heads as top_heads
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
    "HeadOutputs",
    "Lens",
    "Look",
    "MEASURES",
    "Measure",
    "NeedleCase",
    "Patch",
    "ReceivedMass",
    "Scale",
    "SinkMass",
    "ablate",
    "copying_scores",
    "head_means",
    "head_outputs",
    "look",
    "needle_span",
    "retrieval_scores",
    "top_heads",
]
