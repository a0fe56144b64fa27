"""Measurements of what methods and operators cost and lose."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
