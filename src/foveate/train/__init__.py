"""Training: losses, initialisers, and a loop that trains a small network with any operator on any task."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
