# The public names of foveate.kv; written by `make systems` from the catalogue.

from foveate.kv.adakv import AdaKV as AdaKV
from foveate.kv.base.policy import Policy as Policy
from foveate.kv.base.scored import ScorePolicy as ScorePolicy
from foveate.kv.chunkkv import ChunkKV as ChunkKV
from foveate.kv.conversion.compressed_keys import load_compressed as load_compressed
from foveate.kv.conversion.kv_head_svd import compress_kv_heads as compress_kv_heads
from foveate.kv.conversion.kv_head_svd import kv_spectrum as kv_spectrum
from foveate.kv.criticalkv import CriticalKV as CriticalKV
from foveate.kv.duo_attention import DuoAttention as DuoAttention
from foveate.kv.duo_attention import duo_train as duo_train
from foveate.kv.duo_attention import full_heads as full_heads
from foveate.kv.expected_attention import ExpectedAttention as ExpectedAttention
from foveate.kv.h2o import H2O as H2O
from foveate.kv.keydiff import KeyDiff as KeyDiff
from foveate.kv.knorm import KNorm as KNorm
from foveate.kv.lagkv import LagKV as LagKV
from foveate.kv.moa import MoA as MoA
from foveate.kv.moa import moa_influence as moa_influence
from foveate.kv.parts.duo_pattern import DuoPattern as DuoPattern
from foveate.kv.parts.duo_pattern import load_duo_pattern as load_duo_pattern
from foveate.kv.parts.duo_pattern import save_duo_pattern as save_duo_pattern
from foveate.kv.parts.retrieval_scores import retrieval_scores as retrieval_scores
from foveate.kv.parts.span_search import moa_search as moa_search
from foveate.kv.pyramidkv import PyramidKV as PyramidKV
from foveate.kv.random_keep import RandomKeep as RandomKeep
from foveate.kv.razor_attention import RazorAttention as RazorAttention
from foveate.kv.razor_attention import compensation as compensation
from foveate.kv.razor_attention import head_scores as head_scores
from foveate.kv.razor_attention import razor_heads as razor_heads
from foveate.kv.recycled_attention import Overlap as Overlap
from foveate.kv.recycled_attention import RecycledAttention as RecycledAttention
from foveate.kv.recycled_attention import attention_overlap as attention_overlap
from foveate.kv.renumbered import Renumbered as Renumbered
from foveate.kv.seer_attention import SeerAttention as SeerAttention
from foveate.kv.seer_attention import seer_gates as seer_gates
from foveate.kv.sink_recent import SinkRecent as SinkRecent
from foveate.kv.snapkv import SnapKV as SnapKV
from foveate.kv.tidal_decode import TidalDecode as TidalDecode
from foveate.kv.tidal_decode import topk_overlap as topk_overlap
from foveate.kv.token_select import TokenSelect as TokenSelect
from foveate.kv.token_select import soft_vote as soft_vote
from foveate.kv.tova import TOVA as TOVA

__all__ = [
    "AdaKV",
    "ChunkKV",
    "CriticalKV",
    "DuoAttention",
    "DuoPattern",
    "ExpectedAttention",
    "H2O",
    "KNorm",
    "KeyDiff",
    "LagKV",
    "MoA",
    "Overlap",
    "Policy",
    "PyramidKV",
    "RandomKeep",
    "RazorAttention",
    "RecycledAttention",
    "Renumbered",
    "ScorePolicy",
    "SeerAttention",
    "SinkRecent",
    "SnapKV",
    "TOVA",
    "TidalDecode",
    "TokenSelect",
    "attention_overlap",
    "compensation",
    "compress_kv_heads",
    "duo_train",
    "full_heads",
    "head_scores",
    "kv_spectrum",
    "load_compressed",
    "load_duo_pattern",
    "moa_influence",
    "moa_search",
    "razor_heads",
    "retrieval_scores",
    "save_duo_pattern",
    "seer_gates",
    "soft_vote",
    "topk_overlap",
]
