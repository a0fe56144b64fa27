# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.circuit_reuse import PathEffects as PathEffects
from foveate.lens.circuits.circuit_reuse import circuit_overlap as circuit_overlap
from foveate.lens.circuits.circuit_reuse import path_patch as path_patch
from foveate.lens.circuits.circuit_tasks import TaskPrompt as TaskPrompt
from foveate.lens.circuits.circuit_tasks import coloured_object_prompts as coloured_object_prompts
from foveate.lens.circuits.circuit_tasks import indirect_object_prompts as indirect_object_prompts
from foveate.lens.circuits.correct_letter_heads import LetterReport as LetterReport
from foveate.lens.circuits.correct_letter_heads import TotalEffects as TotalEffects
from foveate.lens.circuits.correct_letter_heads import activation_patch as activation_patch
from foveate.lens.circuits.correct_letter_heads import letter_head_report as letter_head_report
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
from foveate.lens.circuits.letter_prompts import LetterInputs as LetterInputs
from foveate.lens.circuits.letter_prompts import LetterPrompts as LetterPrompts
from foveate.lens.circuits.letter_prompts import letter_inputs as letter_inputs
from foveate.lens.circuits.letter_subspace import Subspace as Subspace
from foveate.lens.circuits.letter_subspace import compress_head as compress_head
from foveate.lens.circuits.letter_subspace import item_accuracy as item_accuracy
from foveate.lens.circuits.mlp_outputs import mlp_outputs as mlp_outputs
from foveate.lens.circuits.mlp_outputs import patched_mlps as patched_mlps
from foveate.lens.circuits.residual_stream import Trace as Trace
from foveate.lens.circuits.residual_stream import trace as trace
from foveate.lens.circuits.set_attention import SetAttention as SetAttention
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
    "LetterInputs",
    "LetterPrompts",
    "LetterReport",
    "Look",
    "MEASURES",
    "Measure",
    "Patch",
    "PathEffects",
    "ReceivedMass",
    "ResidualParts",
    "Scale",
    "SetAttention",
    "SinkMass",
    "Subspace",
    "TaskPrompt",
    "TotalEffects",
    "Trace",
    "ablate",
    "activation_patch",
    "circuit_overlap",
    "coloured_object_prompts",
    "compress_head",
    "direct_effects",
    "head_means",
    "head_outputs",
    "indirect_object_prompts",
    "item_accuracy",
    "letter_head_report",
    "letter_inputs",
    "look",
    "mlp_outputs",
    "patched_mlps",
    "path_patch",
    "residual_parts",
    "retrieval_scores",
    "trace",
]
