# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.discrete_sae_circuits import DiscreteSAE as DiscreteSAE
from foveate.lens.circuits.discrete_sae_circuits import SAECircuit as SAECircuit
from foveate.lens.circuits.discrete_sae_circuits import circuit_scores as circuit_scores
from foveate.lens.circuits.discrete_sae_circuits import discrete_sae_circuits as discrete_sae_circuits
from foveate.lens.circuits.discrete_sae_circuits import edge_heads as edge_heads
from foveate.lens.circuits.discrete_sae_circuits import edge_scores as edge_scores
from foveate.lens.circuits.head_pursuit import Pursuit as Pursuit
from foveate.lens.circuits.head_pursuit import concept_logits as concept_logits
from foveate.lens.circuits.head_pursuit import control_heads as control_heads
from foveate.lens.circuits.head_pursuit import head_pursuit as head_pursuit
from foveate.lens.circuits.head_pursuit import scale_heads as scale_heads
from foveate.lens.circuits.head_pursuit import somp as somp
from foveate.lens.circuits.head_pursuit import top_heads as top_heads
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
from foveate.lens.parts.circuit_metrics import CircuitMetrics as CircuitMetrics
from foveate.lens.parts.circuit_metrics import circuit_metrics as circuit_metrics
from foveate.lens.parts.head_writes import head_writes as head_writes
from foveate.lens.parts.rhythm_credit import Coupling as Coupling
from foveate.lens.parts.rhythm_credit import coupling as coupling
from foveate.lens.parts.rhythm_credit import rhythm_credit as rhythm_credit

__all__ = [
    "CircuitMetrics",
    "Coupling",
    "DiscreteSAE",
    "Entropy",
    "HeadOutputs",
    "Lens",
    "Look",
    "MEASURES",
    "Measure",
    "Patch",
    "Pursuit",
    "ReceivedMass",
    "Rhythm",
    "SAECircuit",
    "Scale",
    "SinkMass",
    "ablate",
    "circuit_metrics",
    "circuit_scores",
    "concept_logits",
    "control_heads",
    "coupling",
    "discrete_sae_circuits",
    "edge_heads",
    "edge_scores",
    "fai",
    "head_means",
    "head_outputs",
    "head_pursuit",
    "head_writes",
    "look",
    "preplan_anchor",
    "retrieval_scores",
    "rhythm_credit",
    "scale_heads",
    "somp",
    "split_heads",
    "top_heads",
    "waad",
]
