# The public names of foveate.core; written by `make systems` from the catalogue.

from foveate.core.call import AttentionCall as AttentionCall
from foveate.core.call import Plan as Plan
from foveate.core.call import StateSizes as StateSizes
from foveate.core.catalog import System as System
from foveate.core.catalog import Taxonomy as Taxonomy
from foveate.core.catalog import capabilities as capabilities
from foveate.core.catalog import grouped as grouped
from foveate.core.catalog import system as system
from foveate.core.catalog import systems as systems
from foveate.core.engines import ENGINES as ENGINES
from foveate.core.errors import CatalogError as CatalogError
from foveate.core.errors import DivergedError as DivergedError
from foveate.core.errors import FoveateError as FoveateError
from foveate.core.errors import OptionError as OptionError
from foveate.core.errors import ShapeError as ShapeError
from foveate.core.errors import TaskError as TaskError
from foveate.core.errors import UnknownKey as UnknownKey
from foveate.core.errors import UnsupportedEngine as UnsupportedEngine
from foveate.core.errors import UnsupportedModel as UnsupportedModel
from foveate.core.errors import UnsupportedPattern as UnsupportedPattern
from foveate.core.graph_window import graph_window_mask as graph_window_mask
from foveate.core.masks import NEG_INF as NEG_INF
from foveate.core.masks import as_bias as as_bias
from foveate.core.masks import causal as causal
from foveate.core.masks import combine as combine
from foveate.core.masks import padding as padding
from foveate.core.masks import window as window
from foveate.core.node_graphs import adjacency as adjacency
from foveate.core.node_graphs import hop_distances as hop_distances
from foveate.core.readable import trusted as trusted
from foveate.core.scoring import SOFTMAX as SOFTMAX
from foveate.core.scoring import Scoring as Scoring
from foveate.core.scoring import SoftmaxScoring as SoftmaxScoring
from foveate.core.scoring import Tile as Tile
from foveate.core.selection import Blocks as Blocks
from foveate.core.selection import Indices as Indices
from foveate.core.selection import Selection as Selection

__all__ = [
    "AttentionCall",
    "Blocks",
    "CatalogError",
    "DivergedError",
    "ENGINES",
    "FoveateError",
    "Indices",
    "NEG_INF",
    "OptionError",
    "Plan",
    "SOFTMAX",
    "Scoring",
    "Selection",
    "ShapeError",
    "SoftmaxScoring",
    "StateSizes",
    "System",
    "TaskError",
    "Taxonomy",
    "Tile",
    "UnknownKey",
    "UnsupportedEngine",
    "UnsupportedModel",
    "UnsupportedPattern",
    "adjacency",
    "as_bias",
    "capabilities",
    "causal",
    "combine",
    "graph_window_mask",
    "grouped",
    "hop_distances",
    "padding",
    "system",
    "systems",
    "trusted",
    "window",
]
