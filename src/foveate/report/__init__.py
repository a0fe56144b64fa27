"""Reports of results: a table for the terminal, one for Markdown, and a self-contained web page."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
