# The public names of foveate.gaze; written by `make systems` from the catalogue.

from foveate.gaze.base.density import SaliencyMap as SaliencyMap
from foveate.gaze.base.density import as_density as as_density
from foveate.gaze.base.model import GazeModel as GazeModel
from foveate.gaze.base.scanpath import Fixations as Fixations
from foveate.gaze.base.scanpath import Scanpath as Scanpath
from foveate.gaze.base.searcher import Search as Search
from foveate.gaze.base.searcher import Searcher as Searcher
from foveate.gaze.measures.auc import auc_borji as auc_borji
from foveate.gaze.measures.auc import auc_judd as auc_judd
from foveate.gaze.measures.auc import auc_shuffled as auc_shuffled
from foveate.gaze.measures.multimatch import MultiMatch as MultiMatch
from foveate.gaze.measures.multimatch import Simplify as Simplify
from foveate.gaze.measures.multimatch import multimatch as multimatch
from foveate.gaze.measures.saliency import cc as cc
from foveate.gaze.measures.saliency import information_gain as information_gain
from foveate.gaze.measures.saliency import kl as kl
from foveate.gaze.measures.saliency import nss as nss
from foveate.gaze.measures.saliency import sim as sim
from foveate.gaze.measures.scanmatch import align as align
from foveate.gaze.measures.scanmatch import regions as regions
from foveate.gaze.measures.scanmatch import scanmatch as scanmatch
from foveate.gaze.measures.scanmatch import substitution_matrix as substitution_matrix
from foveate.gaze.saliency.center_bias import CenterBias as CenterBias
from foveate.gaze.search.asymmetry import asymmetry_index as asymmetry_index
from foveate.gaze.search.asymmetry import reaction_time as reaction_time
from foveate.gaze.search.asymmetry import search_slope as search_slope
from foveate.gaze.search.eccentricity_pool import EccentricityPool2d as EccentricityPool2d
from foveate.gaze.search.eccnet import EccNet as EccNet
from foveate.gaze.search.eccnet import vgg16_features as vgg16_features
from foveate.gaze.search.random_searcher import RandomSearcher as RandomSearcher
from foveate.gaze.search.visual_searcher import Sharpening as Sharpening
from foveate.gaze.search.visual_searcher import VisualSearcher as VisualSearcher

__all__ = [
    "CenterBias",
    "EccNet",
    "EccentricityPool2d",
    "Fixations",
    "GazeModel",
    "MultiMatch",
    "RandomSearcher",
    "SaliencyMap",
    "Scanpath",
    "Search",
    "Searcher",
    "Sharpening",
    "Simplify",
    "VisualSearcher",
    "align",
    "as_density",
    "asymmetry_index",
    "auc_borji",
    "auc_judd",
    "auc_shuffled",
    "cc",
    "information_gain",
    "kl",
    "multimatch",
    "nss",
    "reaction_time",
    "regions",
    "scanmatch",
    "search_slope",
    "sim",
    "substitution_matrix",
    "vgg16_features",
]
