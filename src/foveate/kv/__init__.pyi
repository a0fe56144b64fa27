# The public names of foveate.kv; written by `make systems` from the catalogue.

from foveate.kv.act_qkv import ActQKV as ActQKV
from foveate.kv.adakv import AdaKV as AdaKV
from foveate.kv.attention_matching import AttentionMatching as AttentionMatching
from foveate.kv.base.encoding import EncodingPolicy as EncodingPolicy
from foveate.kv.base.policy import Policy as Policy
from foveate.kv.base.scored import ScorePolicy as ScorePolicy
from foveate.kv.cap_kv import CapKV as CapKV
from foveate.kv.chunkkv import ChunkKV as ChunkKV
from foveate.kv.conversion.compressed_keys import load_compressed as load_compressed
from foveate.kv.conversion.kv_head_svd import compress_kv_heads as compress_kv_heads
from foveate.kv.conversion.kv_head_svd import kv_spectrum as kv_spectrum
from foveate.kv.criticalkv import CriticalKV as CriticalKV
from foveate.kv.cur_dkv import CurDKV as CurDKV
from foveate.kv.duo_attention import DuoAttention as DuoAttention
from foveate.kv.duo_attention import duo_train as duo_train
from foveate.kv.duo_attention import full_heads as full_heads
from foveate.kv.eight_bit import EightBit as EightBit
from foveate.kv.expected_attention import ExpectedAttention as ExpectedAttention
from foveate.kv.finch import Finch as Finch
from foveate.kv.h2o import H2O as H2O
from foveate.kv.keydiff import KeyDiff as KeyDiff
from foveate.kv.kivi import KIVI as KIVI
from foveate.kv.knorm import KNorm as KNorm
from foveate.kv.kvzap import KVzap as KVzap
from foveate.kv.kvzip import KVzip as KVzip
from foveate.kv.lagkv import LagKV as LagKV
from foveate.kv.longheads import LongHeads as LongHeads
from foveate.kv.merged import Merged as Merged
from foveate.kv.moa import MoA as MoA
from foveate.kv.moa import moa_influence as moa_influence
from foveate.kv.parts.chunk_keys import chunk_keys as chunk_keys
from foveate.kv.parts.duo_pattern import DuoPattern as DuoPattern
from foveate.kv.parts.duo_pattern import load_duo_pattern as load_duo_pattern
from foveate.kv.parts.duo_pattern import save_duo_pattern as save_duo_pattern
from foveate.kv.parts.key_moments import gaussian_mass as gaussian_mass
from foveate.kv.parts.layer_budgets import layer_budgets as layer_budgets
from foveate.kv.parts.layer_overlap import topk_overlap as topk_overlap
from foveate.kv.parts.probe_query import activation_bias as activation_bias
from foveate.kv.parts.probe_query import probe_query as probe_query
from foveate.kv.parts.span_search import moa_search as moa_search
from foveate.kv.pyramidkv import PyramidKV as PyramidKV
from foveate.kv.q_filters import QFilters as QFilters
from foveate.kv.qada import QAdA as QAdA
from foveate.kv.quest import Quest as Quest
from foveate.kv.r_kv import RKV as RKV
from foveate.kv.random_keep import RandomKeep as RandomKeep
from foveate.kv.razor_attention import RazorAttention as RazorAttention
from foveate.kv.razor_attention import compensation as compensation
from foveate.kv.razor_attention import head_scores as head_scores
from foveate.kv.razor_attention import razor_heads as razor_heads
from foveate.kv.recycled_attention import Overlap as Overlap
from foveate.kv.recycled_attention import RecycledAttention as RecycledAttention
from foveate.kv.recycled_attention import attention_overlap as attention_overlap
from foveate.kv.renumbered import Renumbered as Renumbered
from foveate.kv.rocketkv import RocketKV as RocketKV
from foveate.kv.sale import sale_calibrate as sale_calibrate
from foveate.kv.sale import sale_prefill as sale_prefill
from foveate.kv.seer_attention import SeerAttention as SeerAttention
from foveate.kv.seer_attention import seer_gates as seer_gates
from foveate.kv.simlayerkv import SimLayerKV as SimLayerKV
from foveate.kv.sink_recent import SinkRecent as SinkRecent
from foveate.kv.snapkv import SnapKV as SnapKV
from foveate.kv.streaming_llm import StreamingLLM as StreamingLLM
from foveate.kv.task_kv import TaskKV as TaskKV
from foveate.kv.think import ThinK as ThinK
from foveate.kv.tidal_decode import TidalDecode as TidalDecode
from foveate.kv.tidal_decode import reselection_losses as reselection_losses
from foveate.kv.token_select import TokenSelect as TokenSelect
from foveate.kv.token_select import soft_vote as soft_vote
from foveate.kv.tova import TOVA as TOVA
from foveate.kv.triattention import TriAttention as TriAttention
from foveate.kv.turboquant import TurboQuant as TurboQuant

__all__ = [
    "ActQKV",
    "AdaKV",
    "AttentionMatching",
    "CapKV",
    "ChunkKV",
    "CriticalKV",
    "CurDKV",
    "DuoAttention",
    "DuoPattern",
    "EightBit",
    "EncodingPolicy",
    "ExpectedAttention",
    "Finch",
    "H2O",
    "KIVI",
    "KNorm",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "LagKV",
    "LongHeads",
    "Merged",
    "MoA",
    "Overlap",
    "Policy",
    "PyramidKV",
    "QAdA",
    "QFilters",
    "Quest",
    "RKV",
    "RandomKeep",
    "RazorAttention",
    "RecycledAttention",
    "Renumbered",
    "RocketKV",
    "ScorePolicy",
    "SeerAttention",
    "SimLayerKV",
    "SinkRecent",
    "SnapKV",
    "StreamingLLM",
    "TOVA",
    "TaskKV",
    "ThinK",
    "TidalDecode",
    "TokenSelect",
    "TriAttention",
    "TurboQuant",
    "activation_bias",
    "attention_overlap",
    "chunk_keys",
    "compensation",
    "compress_kv_heads",
    "duo_train",
    "full_heads",
    "gaussian_mass",
    "head_scores",
    "kv_spectrum",
    "layer_budgets",
    "load_compressed",
    "load_duo_pattern",
    "moa_influence",
    "moa_search",
    "probe_query",
    "razor_heads",
    "reselection_losses",
    "sale_calibrate",
    "sale_prefill",
    "save_duo_pattern",
    "seer_gates",
    "soft_vote",
    "topk_overlap",
]
