# The public names of foveate.ops; written by `make systems` from the catalogue.

from foveate.ops.base.fixed_decay import FixedDecay as FixedDecay
from foveate.ops.base.framed import Frame as Frame
from foveate.ops.base.framed import Framed as Framed
from foveate.ops.base.framed import FramedState as FramedState
from foveate.ops.base.grouped import Grouped as Grouped
from foveate.ops.base.kv_cached import Cached as Cached
from foveate.ops.base.kv_state import KVState as KVState
from foveate.ops.base.linear import Linear as Linear
from foveate.ops.base.linear import LinearState as LinearState
from foveate.ops.base.neighborhood import Neighborhood as Neighborhood
from foveate.ops.base.scored import Scored as Scored
from foveate.ops.base.selective import Selective as Selective
from foveate.ops.base.state_size import state_bytes as state_bytes
from foveate.ops.base.streaming import Streaming as Streaming
from foveate.ops.base.test_time import Memory as Memory
from foveate.ops.base.test_time import MemoryState as MemoryState
from foveate.ops.calls import attend as attend
from foveate.ops.calls import create as create
from foveate.ops.calls import plan as plan
from foveate.ops.dense.adaptive_filter_attention import AdaptiveFilterAttention as AdaptiveFilterAttention
from foveate.ops.dense.attention_sdm import SparseDistributedMemory as SparseDistributedMemory
from foveate.ops.dense.attention_sdm import cap_intersection as cap_intersection
from foveate.ops.dense.attention_sdm import circle_intersection as circle_intersection
from foveate.ops.dense.attention_sdm import fit_beta as fit_beta
from foveate.ops.dense.attention_taxonomy import SurveyAttention as SurveyAttention
from foveate.ops.dense.gta import GTA as GTA
from foveate.ops.dense.landmark_attention import LandmarkAttention as LandmarkAttention
from foveate.ops.dense.landmark_attention import with_landmarks as with_landmarks
from foveate.ops.dense.luong_attention import LuongAttention as LuongAttention
from foveate.ops.dense.luong_attention import alignment_error_rate as alignment_error_rate
from foveate.ops.dense.marginal_attention import MarginalAttention as MarginalAttention
from foveate.ops.dense.marginal_attention import collapsed_gradient as collapsed_gradient
from foveate.ops.dense.marginal_attention import enumerate_edges as enumerate_edges
from foveate.ops.dense.marginal_attention import expectation_maximisation as expectation_maximisation
from foveate.ops.dense.memory_efficient_attention import MemoryEfficientAttention as MemoryEfficientAttention
from foveate.ops.dense.monotonic_location_attention import MonotonicLocationAttention as MonotonicLocationAttention
from foveate.ops.dense.monotonic_location_attention import softstair as softstair
from foveate.ops.dense.music_transformer import MusicTransformer as MusicTransformer
from foveate.ops.dense.neural_attention import NeuralAttention as NeuralAttention
from foveate.ops.dense.reversed_attention import ReversedAttention as ReversedAttention
from foveate.ops.dense.selective_self_attention import SelectiveSelfAttention as SelectiveSelfAttention
from foveate.ops.dense.selective_self_attention import TokenTemperature as TokenTemperature
from foveate.ops.dense.sigmoid_attention import SigmoidAttention as SigmoidAttention
from foveate.ops.dense.softmax import Softmax as Softmax
from foveate.ops.linear.aaren import Aaren as Aaren
from foveate.ops.linear.aaren import prefix_attention as prefix_attention
from foveate.ops.linear.based import TaylorAttention as TaylorAttention
from foveate.ops.linear.dsf import Converted as Converted
from foveate.ops.linear.dsf import NormalizedAttention as NormalizedAttention
from foveate.ops.linear.dsf import to_dsf as to_dsf
from foveate.ops.linear.efficient_attention import EfficientAttention as EfficientAttention
from foveate.ops.linear.hedgehog import FeatureMap as FeatureMap
from foveate.ops.linear.hedgehog import Hedgehog as Hedgehog
from foveate.ops.linear.inline import InLine as InLine
from foveate.ops.linear.lightnet import LightNetAttention as LightNetAttention
from foveate.ops.linear.lightning_attention import LightningAttention as LightningAttention
from foveate.ops.linear.lightning_attention_2 import LightningAttention2 as LightningAttention2
from foveate.ops.linear.relu_linear import ReLULinear as ReLULinear
from foveate.ops.memory.miras import Miras as Miras
from foveate.ops.memory.titans import Titans as Titans
from foveate.ops.operator import Capabilities as Capabilities
from foveate.ops.operator import Gate as Gate
from foveate.ops.operator import Operator as Operator
from foveate.ops.sparse.dynamic_mask import ImportantKeys as ImportantKeys
from foveate.ops.sparse.dynamic_mask import dynamic_mask_attention as dynamic_mask_attention
from foveate.ops.sparse.dynamic_mask import with_importance as with_importance
from foveate.ops.sparse.flex_prefill import FlexPrefill as FlexPrefill
from foveate.ops.sparse.fna import FNA as FNA
from foveate.ops.sparse.fna import neighborhood_mask as neighborhood_mask
from foveate.ops.sparse.gna import GNA as GNA
from foveate.ops.sparse.gna import Simulation as Simulation
from foveate.ops.sparse.gna import gna_simulate as gna_simulate
from foveate.ops.sparse.hip import HiP as HiP
from foveate.ops.sparse.hyper_attention import HyperAttention as HyperAttention
from foveate.ops.sparse.modality_mutual import modality_mutual_mask as modality_mutual_mask
from foveate.ops.sparse.modality_mutual import modality_mutual_rule as modality_mutual_rule
from foveate.ops.sparse.modality_mutual import mutual_pairs as mutual_pairs
from foveate.ops.sparse.routing_attention import RoutingAttention as RoutingAttention
from foveate.ops.sparse.s2_attention import S2Attention as S2Attention
from foveate.ops.sparse.s2_attention import is_kv_efficient as is_kv_efficient
from foveate.ops.sparse.s2_attention import s2_mask as s2_mask
from foveate.ops.sparse.sale import SALE as SALE
from foveate.ops.sparse.sliding_window import SlidingWindow as SlidingWindow
from foveate.ops.sparse.vertical_slash import VerticalSlash as VerticalSlash

__all__ = [
    "Aaren",
    "AdaptiveFilterAttention",
    "Cached",
    "Capabilities",
    "Converted",
    "EfficientAttention",
    "FNA",
    "FeatureMap",
    "FixedDecay",
    "FlexPrefill",
    "Frame",
    "Framed",
    "FramedState",
    "GNA",
    "GTA",
    "Gate",
    "Grouped",
    "Hedgehog",
    "HiP",
    "HyperAttention",
    "ImportantKeys",
    "InLine",
    "KVState",
    "LandmarkAttention",
    "LightNetAttention",
    "LightningAttention",
    "LightningAttention2",
    "Linear",
    "LinearState",
    "LuongAttention",
    "MarginalAttention",
    "Memory",
    "MemoryEfficientAttention",
    "MemoryState",
    "Miras",
    "MonotonicLocationAttention",
    "MusicTransformer",
    "Neighborhood",
    "NeuralAttention",
    "NormalizedAttention",
    "Operator",
    "ReLULinear",
    "ReversedAttention",
    "RoutingAttention",
    "S2Attention",
    "SALE",
    "Scored",
    "Selective",
    "SelectiveSelfAttention",
    "SigmoidAttention",
    "Simulation",
    "SlidingWindow",
    "Softmax",
    "SparseDistributedMemory",
    "Streaming",
    "SurveyAttention",
    "TaylorAttention",
    "Titans",
    "TokenTemperature",
    "VerticalSlash",
    "alignment_error_rate",
    "attend",
    "cap_intersection",
    "circle_intersection",
    "collapsed_gradient",
    "create",
    "dynamic_mask_attention",
    "enumerate_edges",
    "expectation_maximisation",
    "fit_beta",
    "gna_simulate",
    "is_kv_efficient",
    "modality_mutual_mask",
    "modality_mutual_rule",
    "mutual_pairs",
    "neighborhood_mask",
    "plan",
    "prefix_attention",
    "s2_mask",
    "softstair",
    "state_bytes",
    "to_dsf",
    "with_importance",
    "with_landmarks",
]
