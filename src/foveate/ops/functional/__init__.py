"""Pure functions that families and systems share."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
