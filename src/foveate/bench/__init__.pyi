# The public names of foveate.bench; written by `make systems` from the catalogue.

from foveate.bench.capabilities import Capabilities as Capabilities
from foveate.bench.comparison.export import export as export
from foveate.bench.comparison.results import Answer as Answer
from foveate.bench.comparison.results import Comparison as Comparison
from foveate.bench.comparison.results import LookedUp as LookedUp
from foveate.bench.comparison.results import Ratio as Ratio
from foveate.bench.comparison.results import Row as Row
from foveate.bench.comparison.run import compare as compare
from foveate.bench.machine_speed import Calibrated as Calibrated
from foveate.bench.machine_speed import calibrate as calibrate
from foveate.bench.methods import Contender as Contender
from foveate.bench.recall_figure import Point as Point
from foveate.bench.recall_figure import Recall as Recall
from foveate.bench.recall_figure import recall as recall
from foveate.bench.recipes.files import load as load
from foveate.bench.recipes.files import save as save
from foveate.bench.recipes.recipe import Recipe as Recipe
from foveate.bench.sparsity.results import Sparse as Sparse
from foveate.bench.sparsity.results import SparseRow as SparseRow
from foveate.bench.sparsity.run import sparse as sparse
from foveate.bench.tuning.results import Trial as Trial
from foveate.bench.tuning.results import Tuning as Tuning
from foveate.bench.tuning.run import tune as tune

__all__ = [
    "Answer",
    "Calibrated",
    "Capabilities",
    "Comparison",
    "Contender",
    "LookedUp",
    "Point",
    "Ratio",
    "Recall",
    "Recipe",
    "Row",
    "Sparse",
    "SparseRow",
    "Trial",
    "Tuning",
    "calibrate",
    "compare",
    "export",
    "load",
    "recall",
    "save",
    "sparse",
    "tune",
]
