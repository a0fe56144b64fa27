# The public names of foveate.studies; written by `make systems` from the catalogue.

from foveate.studies.attention_rank.nearest_point import NearestPointTask as NearestPointTask
from foveate.studies.attention_rank.nearest_point import Points as Points
from foveate.studies.attention_rank.random_heads import RandomHeads as RandomHeads
from foveate.studies.attention_rank.random_heads import error_curve as error_curve
from foveate.studies.attention_rank.random_heads import expected_error as expected_error
from foveate.studies.attention_rank.random_heads import head_agreement as head_agreement
from foveate.studies.attention_rank.random_heads import target_agreement as target_agreement
from foveate.studies.attention_rank.rank_attention import RankAttention as RankAttention
from foveate.studies.attention_rank.rank_curve import RankError as RankError
from foveate.studies.attention_rank.rank_curve import rank_curve as rank_curve
from foveate.studies.attention_rank.study import AttentionRank as AttentionRank
from foveate.studies.base.report import Curve as Curve
from foveate.studies.base.report import Finding as Finding
from foveate.studies.base.report import Plot as Plot
from foveate.studies.base.report import StudyReport as StudyReport
from foveate.studies.base.study import Study as Study
from foveate.studies.base.study import study_of as study_of
from foveate.studies.hebbian_capacity import Capacity as Capacity
from foveate.studies.hebbian_capacity import Propagation as Propagation
from foveate.studies.hebbian_capacity import Retrieval as Retrieval
from foveate.studies.hebbian_capacity import capacity_curve as capacity_curve
from foveate.studies.hebbian_capacity import error_propagation as error_propagation
from foveate.studies.hebbian_capacity import retrieval_snr as retrieval_snr
from foveate.studies.pavlovian_attention import Conditioning as Conditioning
from foveate.studies.pavlovian_attention import conditioning as conditioning
from foveate.studies.pavlovian_attention import conditioning_report as conditioning_report
from foveate.studies.pavlovian_attention import hebbian_retrieval as hebbian_retrieval
from foveate.studies.pavlovian_study import PavlovianAttention as PavlovianAttention
from foveate.studies.scan_and_snap.dynamics import Dynamics as Dynamics
from foveate.studies.scan_and_snap.simulator import ScanAndSnap as ScanAndSnap
from foveate.studies.scan_and_snap.study import ScanAndSnapStudy as ScanAndSnapStudy
from foveate.studies.scan_and_snap.token_classes import Sequences as Sequences
from foveate.studies.scan_and_snap.token_classes import TokenClasses as TokenClasses

__all__ = [
    "AttentionRank",
    "Capacity",
    "Conditioning",
    "Curve",
    "Dynamics",
    "Finding",
    "NearestPointTask",
    "PavlovianAttention",
    "Plot",
    "Points",
    "Propagation",
    "RandomHeads",
    "RankAttention",
    "RankError",
    "Retrieval",
    "ScanAndSnap",
    "ScanAndSnapStudy",
    "Sequences",
    "Study",
    "StudyReport",
    "TokenClasses",
    "capacity_curve",
    "conditioning",
    "conditioning_report",
    "error_curve",
    "error_propagation",
    "expected_error",
    "head_agreement",
    "hebbian_retrieval",
    "rank_curve",
    "retrieval_snr",
    "study_of",
    "target_agreement",
]
