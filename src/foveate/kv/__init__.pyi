# The public names of foveate.kv; written by `make systems` from the catalogue.

from foveate.kv.adakv import AdaKV as AdaKV
from foveate.kv.attention_matching import AttentionMatching as AttentionMatching
from foveate.kv.base.policy import Policy as Policy
from foveate.kv.base.scored import ScorePolicy as ScorePolicy
from foveate.kv.chunkkv import ChunkKV as ChunkKV
from foveate.kv.criticalkv import CriticalKV as CriticalKV
from foveate.kv.duo_attention import DuoAttention as DuoAttention
from foveate.kv.duo_attention import duo_train as duo_train
from foveate.kv.duo_attention import full_heads as full_heads
from foveate.kv.expected_attention import ExpectedAttention as ExpectedAttention
from foveate.kv.finch import Finch as Finch
from foveate.kv.h2o import H2O as H2O
from foveate.kv.keydiff import KeyDiff as KeyDiff
from foveate.kv.knorm import KNorm as KNorm
from foveate.kv.lagkv import LagKV as LagKV
from foveate.kv.merged import Merged as Merged
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
from foveate.kv.simlayerkv import SimLayerKV as SimLayerKV
from foveate.kv.sink_recent import SinkRecent as SinkRecent
from foveate.kv.snapkv import SnapKV as SnapKV
from foveate.kv.streaming_llm import StreamingLLM as StreamingLLM
from foveate.kv.task_kv import TaskKV as TaskKV
from foveate.kv.tidal_decode import TidalDecode as TidalDecode
from foveate.kv.tidal_decode import topk_overlap as topk_overlap
from foveate.kv.token_select import TokenSelect as TokenSelect
from foveate.kv.token_select import soft_vote as soft_vote
from foveate.kv.tova import TOVA as TOVA

__all__ = [
    "AdaKV",
    "AttentionMatching",
    "ChunkKV",
    "CriticalKV",
    "DuoAttention",
    "ExpectedAttention",
    "Finch",
    "H2O",
    "KNorm",
    "KeyDiff",
    "LagKV",
    "Merged",
    "Overlap",
    "Policy",
    "PyramidKV",
    "RandomKeep",
    "RazorAttention",
    "RecycledAttention",
    "Renumbered",
    "ScorePolicy",
    "SimLayerKV",
    "SinkRecent",
    "SnapKV",
    "StreamingLLM",
    "TOVA",
    "TaskKV",
    "TidalDecode",
    "TokenSelect",
    "attention_overlap",
    "compensation",
    "duo_train",
    "full_heads",
    "head_scores",
    "razor_heads",
    "soft_vote",
    "topk_overlap",
]
