# The public names of foveate.nn; written by `make systems` from the catalogue.

from foveate.nn.base.feature_gate import FeatureGate as FeatureGate
from foveate.nn.base.fusion import Fusion as Fusion
from foveate.nn.base.fusion import Stream as Stream
from foveate.nn.base.layer import Layer as Layer
from foveate.nn.base.layer import LayerCapabilities as LayerCapabilities
from foveate.nn.base.layer import StreamingLayer as StreamingLayer
from foveate.nn.base.pool import Pool as Pool
from foveate.nn.base.pool import Pooled as Pooled
from foveate.nn.base.seq2seq import Decoded as Decoded
from foveate.nn.base.seq2seq import Encoded as Encoded
from foveate.nn.base.seq2seq import Generated as Generated
from foveate.nn.base.seq2seq import Made as Made
from foveate.nn.base.seq2seq import Seq2Seq as Seq2Seq
from foveate.nn.channel.eca import EfficientChannelAttention as EfficientChannelAttention
from foveate.nn.channel.gaam import GaussianAdaptiveAttention as GaussianAdaptiveAttention
from foveate.nn.channel.gaam import GaussianBlock as GaussianBlock
from foveate.nn.channel.gaam import GaussianGate as GaussianGate
from foveate.nn.channel.gaam import importance_factor as importance_factor
from foveate.nn.channel.multi_dim_attention import MultiDimAttention as MultiDimAttention
from foveate.nn.channel.squeeze_excitation import SqueezeExcitation as SqueezeExcitation
from foveate.nn.fusion.cace_net import CoGuidedAttention as CoGuidedAttention
from foveate.nn.fusion.cace_net import background_event_contrast as background_event_contrast
from foveate.nn.fusion.co_attention import CoAttention as CoAttention
from foveate.nn.fusion.daft import DAFTAttention as DAFTAttention
from foveate.nn.fusion.daft import total_length_of_transition as total_length_of_transition
from foveate.nn.fusion.ssma import SSMAFusion as SSMAFusion
from foveate.nn.fusion.ssma import SkipGate as SkipGate
from foveate.nn.parts.beam_search import BeamSearch as BeamSearch
from foveate.nn.parts.blocks import Block as Block
from foveate.nn.parts.blocks import GatedMLP as GatedMLP
from foveate.nn.parts.boxes import Boxes as Boxes
from foveate.nn.parts.build import create as create
from foveate.nn.parts.cost import Cost as Cost
from foveate.nn.parts.cost import cost as cost
from foveate.nn.parts.ema import DampedEMA as DampedEMA
from foveate.nn.parts.flat_windows import FlatGroups as FlatGroups
from foveate.nn.parts.flat_windows import flat_groups as flat_groups
from foveate.nn.parts.flat_windows import flat_window_order as flat_window_order
from foveate.nn.parts.graph_attention import GraphAttention as GraphAttention
from foveate.nn.parts.grid import DepthwiseConv as DepthwiseConv
from foveate.nn.parts.grid import local_mass as local_mass
from foveate.nn.parts.heads import HeadScheme as HeadScheme
from foveate.nn.parts.heads import HeadState as HeadState
from foveate.nn.parts.insert import Inserted as Inserted
from foveate.nn.parts.insert import insert as insert
from foveate.nn.parts.multi_head import MultiHeadAttention as MultiHeadAttention
from foveate.nn.parts.ode import solve_ode as solve_ode
from foveate.nn.parts.overlap import OverlappingWindowAttention as OverlappingWindowAttention
from foveate.nn.parts.overlap import OverlappingWindows as OverlappingWindows
from foveate.nn.parts.positions import Alibi as Alibi
from foveate.nn.parts.positions import Position as Position
from foveate.nn.parts.positions import RelativeBias as RelativeBias
from foveate.nn.parts.positions import Rotary as Rotary
from foveate.nn.parts.short_conv import ShortConv as ShortConv
from foveate.nn.parts.subsampled import GlobalSubsampledAttention as GlobalSubsampledAttention
from foveate.nn.parts.symbols import PositionalSymbols as PositionalSymbols
from foveate.nn.parts.symbols import RelativeSymbols as RelativeSymbols
from foveate.nn.parts.symbols import SymbolicAttention as SymbolicAttention
from foveate.nn.parts.symbols import Symbols as Symbols
from foveate.nn.parts.tdnn import SERes2Block1d as SERes2Block1d
from foveate.nn.parts.window import WindowAttention as WindowAttention
from foveate.nn.parts.window import Windows as Windows
from foveate.nn.pool.acmil import ACMIL as ACMIL
from foveate.nn.pool.acmil import ACMILLoss as ACMILLoss
from foveate.nn.pool.acmil import ACMILOut as ACMILOut
from foveate.nn.pool.acmil import acmil_loss as acmil_loss
from foveate.nn.pool.acmil import branch_similarity as branch_similarity
from foveate.nn.pool.acmil import top_share as top_share
from foveate.nn.pool.acmil_branches import GatedBranches as GatedBranches
from foveate.nn.pool.acmil_branches import HeadBranches as HeadBranches
from foveate.nn.pool.acmil_branches import stochastic_topk_mask as stochastic_topk_mask
from foveate.nn.pool.attentive_stats import AttentiveStatsPool as AttentiveStatsPool
from foveate.nn.pool.cross_attention import CrossAttentionPool as CrossAttentionPool
from foveate.nn.pool.efficient_probing import EfficientProbe as EfficientProbe
from foveate.nn.pool.efficient_probing import ProbeHead as ProbeHead
from foveate.nn.pool.hierarchical_attention import AttentionPool as AttentionPool
from foveate.nn.pool.hierarchical_attention import HierarchicalAttention as HierarchicalAttention
from foveate.nn.pool.mean import MeanPool as MeanPool
from foveate.nn.seq2seq.luong_decoder import LuongDecoder as LuongDecoder
from foveate.nn.seq2seq.monotonic_location import EncodedSource as EncodedSource
from foveate.nn.seq2seq.monotonic_location import MonotonicLocationDecoder as MonotonicLocationDecoder
from foveate.nn.seq2seq.monotonic_location import MonotonicLocationSeq2Seq as MonotonicLocationSeq2Seq
from foveate.nn.seq2seq.pointer_network import Pointed as Pointed
from foveate.nn.seq2seq.pointer_network import PointerNetwork as PointerNetwork
from foveate.nn.seq2seq.pointer_network import pointer_loss as pointer_loss
from foveate.nn.seq2seq.pointer_network import pointer_scores as pointer_scores
from foveate.nn.seq2seq.show_attend_tell import Looked as Looked
from foveate.nn.seq2seq.show_attend_tell import VisualAttentionLSTM as VisualAttentionLSTM
from foveate.nn.seq2seq.show_attend_tell import doubly_stochastic_penalty as doubly_stochastic_penalty
from foveate.nn.sequence.aaren import AarenLayer as AarenLayer
from foveate.nn.sequence.base_conv import BaseConv as BaseConv
from foveate.nn.sequence.chosen_attention import ChosenAttention as ChosenAttention
from foveate.nn.sequence.dual_attention_transformer import DualAttention as DualAttention
from foveate.nn.sequence.dual_attention_transformer import SensoryHeads as SensoryHeads
from foveate.nn.sequence.dynamic_mask_attention import DynamicMaskAttention as DynamicMaskAttention
from foveate.nn.sequence.interacting import InteractingLayer as InteractingLayer
from foveate.nn.sequence.key_driven_gqa import KeyDrivenGQA as KeyDrivenGQA
from foveate.nn.sequence.key_driven_gqa import allocate_queries as allocate_queries
from foveate.nn.sequence.key_driven_gqa import mha_to_gqa as mha_to_gqa
from foveate.nn.sequence.key_driven_gqa import share_out as share_out
from foveate.nn.sequence.lightnet import LightNet as LightNet
from foveate.nn.sequence.lightnet import LightNetLayer as LightNetLayer
from foveate.nn.sequence.lightnet import MDLRPE as MDLRPE
from foveate.nn.sequence.lightnet import MDTPE as MDTPE
from foveate.nn.sequence.mega import Mega as Mega
from foveate.nn.sequence.mega import MegaBlock as MegaBlock
from foveate.nn.sequence.mega import RotaryBias as RotaryBias
from foveate.nn.sequence.mega import laplace as laplace
from foveate.nn.sequence.mhe_attention import MultiHeadEmbeddingAttention as MultiHeadEmbeddingAttention
from foveate.nn.sequence.mhe_attention import mhe_param_count as mhe_param_count
from foveate.nn.sequence.moh import MixtureOfHeadAttention as MixtureOfHeadAttention
from foveate.nn.sequence.moh import balance_loss as balance_loss
from foveate.nn.sequence.moh import moh_gates as moh_gates
from foveate.nn.sequence.neural_memory import NeuralMemory as NeuralMemory
from foveate.nn.sequence.neural_memory import NeuralMemoryState as NeuralMemoryState
from foveate.nn.sequence.relational_attention import RelationalAttention as RelationalAttention
from foveate.nn.sequence.routing_self_attention import RoutingSelfAttention as RoutingSelfAttention
from foveate.nn.sequence.set_transformer import ISAB as ISAB
from foveate.nn.sequence.set_transformer import MAB as MAB
from foveate.nn.sequence.set_transformer import PMA as PMA
from foveate.nn.sequence.set_transformer import SAB as SAB
from foveate.nn.sequence.set_transformer import SetTransformer as SetTransformer
from foveate.nn.sequence.skim_attention import LayoutEmbedding as LayoutEmbedding
from foveate.nn.sequence.skim_attention import SkimAttention as SkimAttention
from foveate.nn.sequence.skim_attention import SkimLayer as SkimLayer
from foveate.nn.sequence.skim_attention import Skimformer as Skimformer
from foveate.nn.sequence.skim_attention import skimming_mask as skimming_mask
from foveate.nn.sequence.super_attention import OptimisedAttention as OptimisedAttention
from foveate.nn.sequence.super_attention import SlimAttention as SlimAttention
from foveate.nn.sequence.super_attention import SuperAttention as SuperAttention
from foveate.nn.sequence.titans import MemoryAsContext as MemoryAsContext
from foveate.nn.sequence.titans import MemoryAsGate as MemoryAsGate
from foveate.nn.sequence.titans import MemoryAsLayer as MemoryAsLayer
from foveate.nn.vision.attention_gate import AttentionGate as AttentionGate
from foveate.nn.vision.biformer import BiLevelRoutingAttention as BiLevelRoutingAttention
from foveate.nn.vision.biformer import bi_level_route as bi_level_route
from foveate.nn.vision.bot import BottleneckAttention as BottleneckAttention
from foveate.nn.vision.cbam import CBAM as CBAM
from foveate.nn.vision.coordinate_attention import CoordinateAttention as CoordinateAttention
from foveate.nn.vision.crossformer import CrossScaleEmbedding as CrossScaleEmbedding
from foveate.nn.vision.crossformer import DynamicPositionBias as DynamicPositionBias
from foveate.nn.vision.crossformer import LongShortAttention as LongShortAttention
from foveate.nn.vision.danet import ChannelAttention as ChannelAttention
from foveate.nn.vision.danet import DualAttentionGate as DualAttentionGate
from foveate.nn.vision.danet import PositionAttention as PositionAttention
from foveate.nn.vision.dependency_vit import DependencyAttention as DependencyAttention
from foveate.nn.vision.dependency_vit import Tree as Tree
from foveate.nn.vision.dependency_vit import dependency_tree as dependency_tree
from foveate.nn.vision.dependency_vit import prune as prune
from foveate.nn.vision.dual_frequency import DualFrequencyBlock as DualFrequencyBlock
from foveate.nn.vision.dual_frequency import WindowChannelAttention as WindowChannelAttention
from foveate.nn.vision.dual_frequency import haar as haar
from foveate.nn.vision.dual_frequency import inverse_haar as inverse_haar
from foveate.nn.vision.efficient_attention_2d import EfficientAttention2d as EfficientAttention2d
from foveate.nn.vision.flatformer import FlatFormer as FlatFormer
from foveate.nn.vision.flatformer import FlatFormerBlock as FlatFormerBlock
from foveate.nn.vision.flatformer import pillar_map as pillar_map
from foveate.nn.vision.gpsa import GatedPositionalAttention as GatedPositionalAttention
from foveate.nn.vision.guided_context_gating import GuidedContextGating as GuidedContextGating
from foveate.nn.vision.halo import HaloAttention as HaloAttention
from foveate.nn.vision.hilo import HiLoAttention as HiLoAttention
from foveate.nn.vision.inline_attention import InLineAttention as InLineAttention
from foveate.nn.vision.inline_attention import LocalKernels as LocalKernels
from foveate.nn.vision.inline_attention import injectivity_probe as injectivity_probe
from foveate.nn.vision.l2vit import Concentration as Concentration
from foveate.nn.vision.l2vit import LinearGlobalBlock as LinearGlobalBlock
from foveate.nn.vision.l2vit import LocalConcentration as LocalConcentration
from foveate.nn.vision.l2vit import LocalWindowBlock as LocalWindowBlock
from foveate.nn.vision.l2vit import concentration as concentration
from foveate.nn.vision.l2vit import influence as influence
from foveate.nn.vision.maformer import GlobalDownsampling as GlobalDownsampling
from foveate.nn.vision.maformer import MAFBlock as MAFBlock
from foveate.nn.vision.non_local import NonLocal as NonLocal
from foveate.nn.vision.proxy_tokens import ProxyTokenAttention as ProxyTokenAttention
from foveate.nn.vision.proxy_tokens import proxy_tokens as proxy_tokens
from foveate.nn.vision.pt_dit import PTDiTBlock as PTDiTBlock
from foveate.nn.vision.pt_dit import TimeSlots as TimeSlots
from foveate.nn.vision.residual_attention import ResidualAttentionModule as ResidualAttentionModule
from foveate.nn.vision.residual_attention import ResidualUnit as ResidualUnit
from foveate.nn.vision.residual_attention import SoftMask as SoftMask
from foveate.nn.vision.sparsifiner import AttentionMaps as AttentionMaps
from foveate.nn.vision.sparsifiner import ConnectivityPredictor as ConnectivityPredictor
from foveate.nn.vision.sparsifiner import SparsifinerAttention as SparsifinerAttention
from foveate.nn.vision.token_aggregation import TokenAggregation as TokenAggregation
from foveate.nn.vision.token_aggregation import spherical_round as spherical_round
from foveate.nn.vision.triplet_attention import TripletAttention as TripletAttention
from foveate.nn.vision.ulsam import ULSAM as ULSAM
from foveate.nn.vision.vsa import TargetWindows as TargetWindows
from foveate.nn.vision.vsa import VariedSizeWindowAttention as VariedSizeWindowAttention
from foveate.nn.vision.wau import WindowAttentionDecoder as WindowAttentionDecoder
from foveate.nn.vision.wau import WindowAttentionUpsample as WindowAttentionUpsample

__all__ = [
    "ACMIL",
    "ACMILLoss",
    "ACMILOut",
    "AarenLayer",
    "Alibi",
    "AttentionGate",
    "AttentionMaps",
    "AttentionPool",
    "AttentiveStatsPool",
    "BaseConv",
    "BeamSearch",
    "BiLevelRoutingAttention",
    "Block",
    "BottleneckAttention",
    "Boxes",
    "CBAM",
    "ChannelAttention",
    "ChosenAttention",
    "CoAttention",
    "CoGuidedAttention",
    "Concentration",
    "ConnectivityPredictor",
    "CoordinateAttention",
    "Cost",
    "CrossAttentionPool",
    "CrossScaleEmbedding",
    "DAFTAttention",
    "DampedEMA",
    "Decoded",
    "DependencyAttention",
    "DepthwiseConv",
    "DualAttention",
    "DualAttentionGate",
    "DualFrequencyBlock",
    "DynamicMaskAttention",
    "DynamicPositionBias",
    "EfficientAttention2d",
    "EfficientChannelAttention",
    "EfficientProbe",
    "Encoded",
    "EncodedSource",
    "FeatureGate",
    "FlatFormer",
    "FlatFormerBlock",
    "FlatGroups",
    "Fusion",
    "GatedBranches",
    "GatedMLP",
    "GatedPositionalAttention",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "GaussianGate",
    "Generated",
    "GlobalDownsampling",
    "GlobalSubsampledAttention",
    "GraphAttention",
    "GuidedContextGating",
    "HaloAttention",
    "HeadBranches",
    "HeadScheme",
    "HeadState",
    "HiLoAttention",
    "HierarchicalAttention",
    "ISAB",
    "InLineAttention",
    "Inserted",
    "InteractingLayer",
    "KeyDrivenGQA",
    "Layer",
    "LayerCapabilities",
    "LayoutEmbedding",
    "LightNet",
    "LightNetLayer",
    "LinearGlobalBlock",
    "LocalConcentration",
    "LocalKernels",
    "LocalWindowBlock",
    "LongShortAttention",
    "Looked",
    "LuongDecoder",
    "MAB",
    "MAFBlock",
    "MDLRPE",
    "MDTPE",
    "Made",
    "MeanPool",
    "Mega",
    "MegaBlock",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MixtureOfHeadAttention",
    "MonotonicLocationDecoder",
    "MonotonicLocationSeq2Seq",
    "MultiDimAttention",
    "MultiHeadAttention",
    "MultiHeadEmbeddingAttention",
    "NeuralMemory",
    "NeuralMemoryState",
    "NonLocal",
    "OptimisedAttention",
    "OverlappingWindowAttention",
    "OverlappingWindows",
    "PMA",
    "PTDiTBlock",
    "Pointed",
    "PointerNetwork",
    "Pool",
    "Pooled",
    "Position",
    "PositionAttention",
    "PositionalSymbols",
    "ProbeHead",
    "ProxyTokenAttention",
    "RelationalAttention",
    "RelativeBias",
    "RelativeSymbols",
    "ResidualAttentionModule",
    "ResidualUnit",
    "Rotary",
    "RotaryBias",
    "RoutingSelfAttention",
    "SAB",
    "SERes2Block1d",
    "SSMAFusion",
    "SensoryHeads",
    "Seq2Seq",
    "SetTransformer",
    "ShortConv",
    "SkimAttention",
    "SkimLayer",
    "Skimformer",
    "SkipGate",
    "SlimAttention",
    "SoftMask",
    "SparsifinerAttention",
    "SqueezeExcitation",
    "Stream",
    "StreamingLayer",
    "SuperAttention",
    "SymbolicAttention",
    "Symbols",
    "TargetWindows",
    "TimeSlots",
    "TokenAggregation",
    "Tree",
    "TripletAttention",
    "ULSAM",
    "VariedSizeWindowAttention",
    "VisualAttentionLSTM",
    "WindowAttention",
    "WindowAttentionDecoder",
    "WindowAttentionUpsample",
    "WindowChannelAttention",
    "Windows",
    "acmil_loss",
    "allocate_queries",
    "background_event_contrast",
    "balance_loss",
    "bi_level_route",
    "branch_similarity",
    "concentration",
    "cost",
    "create",
    "dependency_tree",
    "doubly_stochastic_penalty",
    "flat_groups",
    "flat_window_order",
    "haar",
    "importance_factor",
    "influence",
    "injectivity_probe",
    "insert",
    "inverse_haar",
    "laplace",
    "local_mass",
    "mha_to_gqa",
    "mhe_param_count",
    "moh_gates",
    "pillar_map",
    "pointer_loss",
    "pointer_scores",
    "proxy_tokens",
    "prune",
    "share_out",
    "skimming_mask",
    "solve_ode",
    "spherical_round",
    "stochastic_topk_mask",
    "top_share",
    "total_length_of_transition",
]
