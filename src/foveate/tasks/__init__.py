"""Tasks: what a model is asked, and how its answers are scored."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
