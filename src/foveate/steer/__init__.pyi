# The public names of foveate.steer; written by `make systems` from the catalogue.

from foveate.steer.diffusion.free_swim import FreeSwim as FreeSwim
from foveate.steer.diffusion.inward_window import inward_window_attention as inward_window_attention
from foveate.steer.diffusion.inward_window import inward_window_mask as inward_window_mask
from foveate.steer.diffusion.noun_phrases import noun_phrases as noun_phrases
from foveate.steer.diffusion.structured_attention import align_all as align_all
from foveate.steer.diffusion.structured_attention import align_spans as align_spans
from foveate.steer.diffusion.structured_attention import structured_cross_attention as structured_cross_attention
from foveate.steer.diffusion.structured_diffusion import StructuredDiffusion as StructuredDiffusion
from foveate.steer.parts.contrast import contrast as contrast
from foveate.steer.parts.contrast import plausible as plausible
from foveate.steer.parts.document_attention import document_attention as document_attention
from foveate.steer.parts.document_prompt import DocumentPrompt as DocumentPrompt
from foveate.steer.parts.document_prompt import PromptFormat as PromptFormat
from foveate.steer.parts.last_attention import last_attention as last_attention
from foveate.steer.text.act_calibration import ActCalibration as ActCalibration
from foveate.steer.text.act_calibration import act_search as act_search
from foveate.steer.text.act_calibration import calibrate_sinks as calibrate_sinks
from foveate.steer.text.act_calibration import find_sinks as find_sinks
from foveate.steer.text.attention_sorting import AttentionSorting as AttentionSorting
from foveate.steer.text.attention_sorting import SortedDocuments as SortedDocuments
from foveate.steer.text.attention_sorting import recency_profile as recency_profile
from foveate.steer.text.attn_rank import AttnRank as AttnRank
from foveate.steer.text.attn_rank import basin_index as basin_index
from foveate.steer.text.attn_rank import position_profile as position_profile
from foveate.steer.vision.avisc import AvisCDecoding as AvisCDecoding
from foveate.steer.vision.avisc import find_blind_tokens as find_blind_tokens
from foveate.steer.vision.flowcut import FlowCut as FlowCut
from foveate.steer.vision.flowcut import flowcut_score as flowcut_score
from foveate.steer.vision.flowcut import prune_count as prune_count
from foveate.steer.vision.modality_mutual import ModalityMutual as ModalityMutual

__all__ = [
    "ActCalibration",
    "AttentionSorting",
    "AttnRank",
    "AvisCDecoding",
    "DocumentPrompt",
    "FlowCut",
    "FreeSwim",
    "ModalityMutual",
    "PromptFormat",
    "SortedDocuments",
    "StructuredDiffusion",
    "act_search",
    "align_all",
    "align_spans",
    "basin_index",
    "calibrate_sinks",
    "contrast",
    "document_attention",
    "find_blind_tokens",
    "find_sinks",
    "flowcut_score",
    "inward_window_attention",
    "inward_window_mask",
    "last_attention",
    "noun_phrases",
    "plausible",
    "position_profile",
    "prune_count",
    "recency_profile",
    "structured_cross_attention",
]
