"""One text under a lens: what `foveate look` measures, as plain results."""

from foveate.bench.looking.results import Looked, Measured, Views
from foveate.bench.looking.run import look_at
from foveate.lens.views.head_map import HeadMap

__all__ = ["HeadMap", "Looked", "Measured", "Views", "look_at"]
