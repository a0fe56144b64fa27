"""Whole networks, built from layers: decoders over tokens, transformers over image patches, and published models."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
