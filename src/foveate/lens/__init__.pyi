# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.interventions import HeadOutputs as HeadOutputs
from foveate.lens.circuits.interventions import Patch as Patch
from foveate.lens.circuits.interventions import Scale as Scale
from foveate.lens.circuits.interventions import ablate as ablate
from foveate.lens.circuits.interventions import head_means as head_means
from foveate.lens.circuits.interventions import head_outputs as head_outputs
from foveate.lens.heads.retrieval_heads import retrieval_scores as retrieval_scores
from foveate.lens.heads.sixteen_heads import PruningCurve as PruningCurve
from foveate.lens.heads.sixteen_heads import ablate_each as ablate_each
from foveate.lens.heads.sixteen_heads import example_losses as example_losses
from foveate.lens.heads.sixteen_heads import gradient_importance as gradient_importance
from foveate.lens.heads.sixteen_heads import keep_one as keep_one
from foveate.lens.heads.sixteen_heads import prune_in_steps as prune_in_steps
from foveate.lens.heads.sixteen_heads import pruning_order as pruning_order
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
    "Patch",
    "PruningCurve",
    "ReceivedMass",
    "Scale",
    "SinkMass",
    "ablate",
    "ablate_each",
    "example_losses",
    "gradient_importance",
    "head_means",
    "head_outputs",
    "keep_one",
    "look",
    "prune_in_steps",
    "pruning_order",
    "retrieval_scores",
]
