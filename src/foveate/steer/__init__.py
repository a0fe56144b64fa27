"""Interventions on a model's attention at inference."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
