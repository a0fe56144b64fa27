"""Looking: where attention goes, measured while the fast kernel runs."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
