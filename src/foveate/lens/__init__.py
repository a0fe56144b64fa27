"""Analysis of attention: measures that are taken while the fused kernel runs."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
