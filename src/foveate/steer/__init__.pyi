# The public names of foveate.steer; written by `make systems` from the catalogue.

from foveate.steer.text.act_calibration import ActCalibration as ActCalibration
from foveate.steer.text.act_calibration import act_search as act_search
from foveate.steer.text.act_calibration import calibrate_sinks as calibrate_sinks
from foveate.steer.text.act_calibration import find_sinks as find_sinks

__all__ = [
    "ActCalibration",
    "act_search",
    "calibrate_sinks",
    "find_sinks",
]
