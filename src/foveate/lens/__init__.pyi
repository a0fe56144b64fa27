# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.interventions import HeadOutputs as HeadOutputs
from foveate.lens.circuits.interventions import Patch as Patch
from foveate.lens.circuits.interventions import Scale as Scale
from foveate.lens.circuits.interventions import ablate as ablate
from foveate.lens.circuits.interventions import head_means as head_means
from foveate.lens.circuits.interventions import head_outputs as head_outputs
from foveate.lens.heads.preplan_anchor import Rhythm as Rhythm
from foveate.lens.heads.preplan_anchor import fai as fai
from foveate.lens.heads.preplan_anchor import preplan_anchor as preplan_anchor
from foveate.lens.heads.preplan_anchor import split_heads as split_heads
from foveate.lens.heads.preplan_anchor import waad as waad
from foveate.lens.heads.retrieval_heads import retrieval_scores as retrieval_scores
from foveate.lens.lens import Lens as Lens
from foveate.lens.lens import Look as Look
from foveate.lens.lens import look as look
from foveate.lens.measures import Entropy as Entropy
from foveate.lens.measures import MEASURES as MEASURES
from foveate.lens.measures import Measure as Measure
from foveate.lens.measures import ReceivedMass as ReceivedMass
from foveate.lens.measures import SinkMass as SinkMass
from foveate.lens.parts.rhythm_credit import Coupling as Coupling
from foveate.lens.parts.rhythm_credit import coupling as coupling
from foveate.lens.parts.rhythm_credit import rhythm_credit as rhythm_credit

__all__ = [
    "Coupling",
    "Entropy",
    "HeadOutputs",
    "Lens",
    "Look",
    "MEASURES",
    "Measure",
    "Patch",
    "ReceivedMass",
    "Rhythm",
    "Scale",
    "SinkMass",
    "ablate",
    "coupling",
    "fai",
    "head_means",
    "head_outputs",
    "look",
    "preplan_anchor",
    "retrieval_scores",
    "rhythm_credit",
    "split_heads",
    "waad",
]
