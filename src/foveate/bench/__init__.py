"""Measurements: what each choice costs and loses."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
