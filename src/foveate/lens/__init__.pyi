# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.direct_effects import DirectEffects as DirectEffects
from foveate.lens.circuits.direct_effects import FrozenNorm as FrozenNorm
from foveate.lens.circuits.direct_effects import ResidualParts as ResidualParts
from foveate.lens.circuits.direct_effects import direct_effects as direct_effects
from foveate.lens.circuits.direct_effects import residual_parts as residual_parts
from foveate.lens.circuits.interventions import HeadOutputs as HeadOutputs
from foveate.lens.circuits.interventions import Patch as Patch
from foveate.lens.circuits.interventions import Scale as Scale
from foveate.lens.circuits.interventions import ablate as ablate
from foveate.lens.circuits.interventions import head_means as head_means
from foveate.lens.circuits.interventions import head_outputs as head_outputs
from foveate.lens.circuits.residual_stream import Trace as Trace
from foveate.lens.circuits.residual_stream import mlp_outputs as mlp_outputs
from foveate.lens.circuits.residual_stream import patched_mlps as patched_mlps
from foveate.lens.circuits.residual_stream import trace as trace
from foveate.lens.heads.retrieval_heads import retrieval_scores as retrieval_scores
from foveate.lens.lens import Lens as Lens
from foveate.lens.lens import Look as Look
from foveate.lens.lens import look as look
from foveate.lens.measures import Entropy as Entropy
from foveate.lens.measures import MEASURES as MEASURES
from foveate.lens.measures import Measure as Measure
from foveate.lens.measures import ReceivedMass as ReceivedMass
from foveate.lens.measures import SinkMass as SinkMass

__all__ = [
    "DirectEffects",
    "Entropy",
    "FrozenNorm",
    "HeadOutputs",
    "Lens",
    "Look",
    "MEASURES",
    "Measure",
    "Patch",
    "ReceivedMass",
    "ResidualParts",
    "Scale",
    "SinkMass",
    "Trace",
    "ablate",
    "direct_effects",
    "head_means",
    "head_outputs",
    "look",
    "mlp_outputs",
    "patched_mlps",
    "residual_parts",
    "retrieval_scores",
    "trace",
]
