"""Texts under a lens: what `foveate look` measures, as plain results."""

from foveate.bench.looking.data import Data, finish, look_at_data
from foveate.bench.looking.maps import HeadMap
from foveate.bench.looking.results import Looked, Measured, Over
from foveate.bench.looking.run import look_at

__all__ = ["Data", "HeadMap", "Looked", "Measured", "Over", "finish", "look_at", "look_at_data"]
