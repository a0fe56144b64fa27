"""Texts under a lens: what `foveate look` measures, as plain results."""

from foveate.bench.looking.data import Data, finish, look_at_data
from foveate.bench.looking.results import Looked, Measured, Over, Views
from foveate.bench.looking.run import look_at
from foveate.lens.views.head_map import HeadMap

__all__ = ["Data", "HeadMap", "Looked", "Measured", "Over", "Views", "finish", "look_at", "look_at_data"]
