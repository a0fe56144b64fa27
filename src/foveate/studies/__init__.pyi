# The public names of foveate.studies; written by `make systems` from the catalogue.

from foveate.studies.base.study import Curve as Curve
from foveate.studies.base.study import Finding as Finding
from foveate.studies.base.study import Plot as Plot
from foveate.studies.base.study import Study as Study
from foveate.studies.base.study import StudyReport as StudyReport
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

__all__ = [
    "Capacity",
    "Conditioning",
    "Curve",
    "Finding",
    "Plot",
    "Propagation",
    "Retrieval",
    "Study",
    "StudyReport",
    "capacity_curve",
    "conditioning",
    "conditioning_report",
    "error_propagation",
    "hebbian_retrieval",
    "retrieval_snr",
]
