"""Experiments that demonstrate a theorem or a prediction of a paper."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
