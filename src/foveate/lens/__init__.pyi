# The public names of foveate.lens; written by `make systems` from the catalogue.

from foveate.lens.circuits.interventions import HeadOutputs as HeadOutputs
from foveate.lens.circuits.interventions import Patch as Patch
from foveate.lens.circuits.interventions import Scale as Scale
from foveate.lens.circuits.interventions import ablate as ablate
from foveate.lens.circuits.interventions import head_means as head_means
from foveate.lens.circuits.interventions import head_outputs as head_outputs
from foveate.lens.heads.offset_local_heads import HeadPeak as HeadPeak
from foveate.lens.heads.offset_local_heads import VitAttentionReport as VitAttentionReport
from foveate.lens.heads.offset_local_heads import linear_cka as linear_cka
from foveate.lens.heads.retrieval_heads import retrieval_scores as retrieval_scores
from foveate.lens.heads.sixteen_heads import PruningCurve as PruningCurve
from foveate.lens.heads.sixteen_heads import ablate_each as ablate_each
from foveate.lens.heads.sixteen_heads import example_losses as example_losses
from foveate.lens.heads.sixteen_heads import gradient_importance as gradient_importance
from foveate.lens.heads.sixteen_heads import keep_one as keep_one
from foveate.lens.heads.sixteen_heads import prune_in_steps as prune_in_steps
from foveate.lens.heads.sixteen_heads import pruning_order as pruning_order
from foveate.lens.heads.vit_head_analytics import HeadImportance as HeadImportance
from foveate.lens.heads.vit_head_analytics import PatternAtlas as PatternAtlas
from foveate.lens.heads.vit_head_analytics import attention_patterns as attention_patterns
from foveate.lens.heads.vit_head_analytics import expected_hop as expected_hop
from foveate.lens.heads.vit_head_analytics import hop_profile as hop_profile
from foveate.lens.heads.vit_head_analytics import pruning_importance as pruning_importance
from foveate.lens.heads.vit_head_analytics import uniform_hops as uniform_hops
from foveate.lens.lens import Lens as Lens
from foveate.lens.lens import Look as Look
from foveate.lens.lens import look as look
from foveate.lens.measures import Entropy as Entropy
from foveate.lens.measures import MEASURES as MEASURES
from foveate.lens.measures import Measure as Measure
from foveate.lens.measures import ReceivedMass as ReceivedMass
from foveate.lens.measures import SinkMass as SinkMass
from foveate.lens.parts.attention_maps import attention_maps as attention_maps

__all__ = [
    "Entropy",
    "HeadImportance",
    "HeadOutputs",
    "HeadPeak",
    "Lens",
    "Look",
    "MEASURES",
    "Measure",
    "Patch",
    "PatternAtlas",
    "PruningCurve",
    "ReceivedMass",
    "Scale",
    "SinkMass",
    "VitAttentionReport",
    "ablate",
    "ablate_each",
    "attention_maps",
    "attention_patterns",
    "example_losses",
    "expected_hop",
    "gradient_importance",
    "head_means",
    "head_outputs",
    "hop_profile",
    "keep_one",
    "linear_cka",
    "look",
    "prune_in_steps",
    "pruning_importance",
    "pruning_order",
    "retrieval_scores",
    "uniform_hops",
]
