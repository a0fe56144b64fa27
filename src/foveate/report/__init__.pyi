# The public names of foveate.report; written by `make systems` from the catalogue.

from foveate.report.curves import smooth as smooth
from foveate.report.html import write as write
from foveate.report.table import markdown as markdown
from foveate.report.table import render as render

__all__ = [
    "markdown",
    "render",
    "smooth",
    "write",
]
