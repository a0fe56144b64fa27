# The public names of foveate.ops.functional; written by `make systems` from the catalogue.

from foveate.ops.functional.additive_score import pair_score as pair_score
from foveate.ops.functional.alibi import alibi_slopes as alibi_slopes
from foveate.ops.functional.alignment import ALIGNMENTS as ALIGNMENTS
from foveate.ops.functional.alignment import ActivatedGeneral as ActivatedGeneral
from foveate.ops.functional.alignment import Additive as Additive
from foveate.ops.functional.alignment import Alignment as Alignment
from foveate.ops.functional.alignment import BiasedGeneral as BiasedGeneral
from foveate.ops.functional.alignment import Concat as Concat
from foveate.ops.functional.alignment import Deep as Deep
from foveate.ops.functional.alignment import Dot as Dot
from foveate.ops.functional.alignment import Feature as Feature
from foveate.ops.functional.alignment import General as General
from foveate.ops.functional.alignment import Kernel as Kernel
from foveate.ops.functional.alignment import Learned as Learned
from foveate.ops.functional.alignment import Location as Location
from foveate.ops.functional.alignment import Pairwise as Pairwise
from foveate.ops.functional.alignment import ScaledDot as ScaledDot
from foveate.ops.functional.alignment import Similarity as Similarity
from foveate.ops.functional.alignment import make_alignment as make_alignment
from foveate.ops.functional.geometry import Action as Action
from foveate.ops.functional.geometry import Matrices as Matrices
from foveate.ops.functional.geometry import Points as Points
from foveate.ops.functional.geometry import rigid as rigid
from foveate.ops.functional.geometry import wigner as wigner
from foveate.ops.functional.linear_sde import Dynamics as Dynamics
from foveate.ops.functional.normalizers import DISTRIBUTIONS as DISTRIBUTIONS
from foveate.ops.functional.normalizers import LocalWindow as LocalWindow
from foveate.ops.functional.normalizers import argmax as argmax
from foveate.ops.functional.normalizers import entmax as entmax
from foveate.ops.functional.normalizers import sample as sample
from foveate.ops.functional.normalizers import sparsemax as sparsemax
from foveate.ops.functional.recurrence import decay_matrix as decay_matrix
from foveate.ops.functional.recurrence import linear_recurrence as linear_recurrence
from foveate.ops.functional.relative_position import skew as skew
from foveate.ops.functional.rotary import rotary_angles as rotary_angles
from foveate.ops.functional.rotary import rotary_frequencies as rotary_frequencies
from foveate.ops.functional.rotary import rotate as rotate
from foveate.ops.functional.state_space import StateSpace as StateSpace
from foveate.ops.functional.state_space import qlstm as qlstm
from foveate.ops.functional.state_space import reversed_sigmoid as reversed_sigmoid
from foveate.ops.functional.state_space import s6 as s6
from foveate.ops.functional.state_space import softmax_taylor as softmax_taylor
from foveate.ops.functional.state_space import ssd as ssd
from foveate.ops.functional.subsampled import subsampled_attention as subsampled_attention
from foveate.ops.functional.taylor import taylor_features as taylor_features
from foveate.ops.functional.taylor import taylor_size as taylor_size

__all__ = [
    "ALIGNMENTS",
    "Action",
    "ActivatedGeneral",
    "Additive",
    "Alignment",
    "BiasedGeneral",
    "Concat",
    "DISTRIBUTIONS",
    "Deep",
    "Dot",
    "Dynamics",
    "Feature",
    "General",
    "Kernel",
    "Learned",
    "LocalWindow",
    "Location",
    "Matrices",
    "Pairwise",
    "Points",
    "ScaledDot",
    "Similarity",
    "StateSpace",
    "alibi_slopes",
    "argmax",
    "decay_matrix",
    "entmax",
    "linear_recurrence",
    "make_alignment",
    "pair_score",
    "qlstm",
    "reversed_sigmoid",
    "rigid",
    "rotary_angles",
    "rotary_frequencies",
    "rotate",
    "s6",
    "sample",
    "skew",
    "softmax_taylor",
    "sparsemax",
    "ssd",
    "subsampled_attention",
    "taylor_features",
    "taylor_size",
    "wigner",
]
