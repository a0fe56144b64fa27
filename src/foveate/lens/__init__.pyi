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
from foveate.lens.circuits.next_logits import NextLogits as NextLogits
from foveate.lens.circuits.next_logits import next_logits as next_logits
from foveate.lens.circuits.residual_stream import Trace as Trace
from foveate.lens.circuits.residual_stream import trace as trace
from foveate.lens.circuits.set_attention import SetAttention as SetAttention
from foveate.lens.heads.attention_sink_emergence import SinkReport as SinkReport
from foveate.lens.heads.attention_sink_emergence import TokenNorms as TokenNorms
from foveate.lens.heads.attention_sink_emergence import key_importance as key_importance
from foveate.lens.heads.attention_sink_emergence import sink_profile as sink_profile
from foveate.lens.heads.attention_sink_emergence import sink_rate as sink_rate
from foveate.lens.heads.attention_sink_emergence import sink_report as sink_report
from foveate.lens.heads.attention_sink_emergence import token_norms as token_norms
from foveate.lens.heads.bert_attention_analysis import coreference_accuracy as coreference_accuracy
from foveate.lens.heads.bert_attention_analysis import gradient_report as gradient_report
from foveate.lens.heads.bert_attention_analysis import head_relation_accuracy as head_relation_accuracy
from foveate.lens.heads.bert_attention_analysis import offset_accuracy as offset_accuracy
from foveate.lens.heads.bert_attention_analysis import relation_table as relation_table
from foveate.lens.heads.bert_attention_analysis import surface_report as surface_report
from foveate.lens.heads.indicwav2vec import HeadLocality as HeadLocality
from foveate.lens.heads.indicwav2vec import code_histograms as code_histograms
from foveate.lens.heads.indicwav2vec import code_similarity as code_similarity
from foveate.lens.heads.indicwav2vec import frame_codes as frame_codes
from foveate.lens.heads.indicwav2vec import head_locality as head_locality
from foveate.lens.heads.indicwav2vec import layer_probe as layer_probe
from foveate.lens.heads.indicwav2vec import resampling_ratios as resampling_ratios
from foveate.lens.heads.indicwav2vec import sample_probs as sample_probs
from foveate.lens.heads.offset_local_heads import HeadPeak as HeadPeak
from foveate.lens.heads.offset_local_heads import VitAttentionReport as VitAttentionReport
from foveate.lens.heads.offset_local_heads import linear_cka as linear_cka
from foveate.lens.heads.preplan_anchor import Rhythm as Rhythm
from foveate.lens.heads.preplan_anchor import fai as fai
from foveate.lens.heads.preplan_anchor import preplan_anchor as preplan_anchor
from foveate.lens.heads.preplan_anchor import split_heads as split_heads
from foveate.lens.heads.preplan_anchor import waad as waad
from foveate.lens.heads.retrieval_heads import NeedleCase as NeedleCase
from foveate.lens.heads.retrieval_heads import copying_scores as copying_scores
from foveate.lens.heads.retrieval_heads import needle_span as needle_span
from foveate.lens.heads.retrieval_heads import retrieval_scores as retrieval_scores
from foveate.lens.heads.roles import Role as Role
from foveate.lens.heads.roles import THRESHOLDS as THRESHOLDS
from foveate.lens.heads.roles import roles as roles
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
from foveate.lens.measures import Measure as Measure
from foveate.lens.measures import ReceivedMass as ReceivedMass
from foveate.lens.measures import SinkMass as SinkMass
from foveate.lens.output_measures import OutputNorm as OutputNorm
from foveate.lens.parts.circuit_metrics import CircuitMetrics as CircuitMetrics
from foveate.lens.parts.circuit_metrics import circuit_metrics as circuit_metrics
from foveate.lens.parts.head_distance import embed_heads as embed_heads
from foveate.lens.parts.head_distance import js_distance as js_distance
from foveate.lens.parts.head_writes import head_writes as head_writes
from foveate.lens.parts.kernel_attention import KernelAttention as KernelAttention
from foveate.lens.parts.maps import attention_maps as attention_maps
from foveate.lens.parts.parse_probes import AttentionProbe as AttentionProbe
from foveate.lens.parts.parse_probes import StructuralProbe as StructuralProbe
from foveate.lens.parts.parsed_sentence import ParsedSentence as ParsedSentence
from foveate.lens.parts.rhythm_credit import Coupling as Coupling
from foveate.lens.parts.rhythm_credit import coupling as coupling
from foveate.lens.parts.rhythm_credit import rhythm_credit as rhythm_credit
from foveate.lens.parts.top_heads import top_heads as top_heads
from foveate.lens.parts.weight_gradients import weight_gradients as weight_gradients
from foveate.lens.parts.words import to_words as to_words
from foveate.lens.position_measures import AtOffset as AtOffset
from foveate.lens.position_measures import MeanDistance as MeanDistance
from foveate.lens.position_measures import WindowMass as WindowMass
from foveate.lens.registry import MEASURES as MEASURES
from foveate.lens.span_measures import SpanMass as SpanMass
from foveate.lens.span_measures import span_masses as span_masses
from foveate.lens.survey import Survey as Survey
from foveate.lens.survey import look_over as look_over
from foveate.lens.token_measures import CopyMass as CopyMass
from foveate.lens.token_measures import DuplicateMass as DuplicateMass
from foveate.lens.token_measures import InductionMass as InductionMass
from foveate.lens.window_measures import FutureInfluence as FutureInfluence
from foveate.lens.window_measures import WindowedDistance as WindowedDistance

__all__ = [
    "AtOffset",
    "AttentionProbe",
    "CircuitMetrics",
    "CopyMass",
    "Coupling",
    "DirectEffects",
    "DiscreteSAE",
    "DuplicateMass",
    "Entropy",
    "FrozenNorm",
    "FutureInfluence",
    "HeadImportance",
    "HeadLocality",
    "HeadOutputs",
    "HeadPeak",
    "InductionMass",
    "KernelAttention",
    "Lens",
    "LetterInputs",
    "LetterPrompts",
    "LetterReport",
    "Look",
    "MEASURES",
    "MeanDistance",
    "Measure",
    "NeedleCase",
    "NextLogits",
    "OutputNorm",
    "ParsedSentence",
    "Patch",
    "PathEffects",
    "PatternAtlas",
    "PruningCurve",
    "Pursuit",
    "ReceivedMass",
    "ResidualParts",
    "Rhythm",
    "Role",
    "SAECircuit",
    "Scale",
    "SetAttention",
    "SinkMass",
    "SinkReport",
    "SpanMass",
    "StructuralProbe",
    "Subspace",
    "Survey",
    "THRESHOLDS",
    "TaskPrompt",
    "TokenNorms",
    "TotalEffects",
    "Trace",
    "VitAttentionReport",
    "WindowMass",
    "WindowedDistance",
    "ablate",
    "ablate_each",
    "activation_patch",
    "attention_maps",
    "attention_patterns",
    "circuit_metrics",
    "circuit_overlap",
    "circuit_scores",
    "code_histograms",
    "code_similarity",
    "coloured_object_prompts",
    "compress_head",
    "concept_logits",
    "control_heads",
    "copying_scores",
    "coreference_accuracy",
    "coupling",
    "direct_effects",
    "discrete_sae_circuits",
    "edge_heads",
    "edge_scores",
    "embed_heads",
    "example_losses",
    "expected_hop",
    "fai",
    "frame_codes",
    "gradient_importance",
    "gradient_report",
    "head_locality",
    "head_means",
    "head_outputs",
    "head_pursuit",
    "head_relation_accuracy",
    "head_writes",
    "hop_profile",
    "indirect_object_prompts",
    "item_accuracy",
    "js_distance",
    "keep_one",
    "key_importance",
    "layer_probe",
    "letter_head_report",
    "letter_inputs",
    "linear_cka",
    "look",
    "look_over",
    "mlp_outputs",
    "needle_span",
    "next_logits",
    "offset_accuracy",
    "patched_mlps",
    "path_patch",
    "preplan_anchor",
    "prune_in_steps",
    "pruning_importance",
    "pruning_order",
    "relation_table",
    "resampling_ratios",
    "residual_parts",
    "retrieval_scores",
    "rhythm_credit",
    "roles",
    "sample_probs",
    "scale_heads",
    "sink_profile",
    "sink_rate",
    "sink_report",
    "somp",
    "span_masses",
    "split_heads",
    "surface_report",
    "to_words",
    "token_norms",
    "top_heads",
    "trace",
    "uniform_hops",
    "waad",
    "weight_gradients",
]
