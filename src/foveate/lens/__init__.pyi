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
from foveate.lens.heads.roles import Role as Role
from foveate.lens.heads.roles import THRESHOLDS as THRESHOLDS
from foveate.lens.heads.roles import roles as roles
from foveate.lens.lens import Lens as Lens
from foveate.lens.lens import Look as Look
from foveate.lens.lens import look as look
from foveate.lens.measures import Entropy as Entropy
from foveate.lens.measures import Measure as Measure
from foveate.lens.measures import ReceivedMass as ReceivedMass
from foveate.lens.measures import SinkMass as SinkMass
from foveate.lens.position_measures import AtOffset as AtOffset
from foveate.lens.position_measures import MeanDistance as MeanDistance
from foveate.lens.position_measures import WindowMass as WindowMass
from foveate.lens.registry import MEASURES as MEASURES

__all__ = [
    "AtOffset",
    "Entropy",
    "HeadOutputs",
    "Lens",
    "Look",
    "MEASURES",
    "MeanDistance",
    "Measure",
    "NeedleCase",
    "Patch",
    "ReceivedMass",
    "Role",
    "Scale",
    "SinkMass",
    "THRESHOLDS",
    "WindowMass",
    "ablate",
    "copying_scores",
    "head_means",
    "head_outputs",
    "look",
    "needle_span",
    "retrieval_scores",
    "roles",
    "top_heads",
]
