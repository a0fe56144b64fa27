"""Cache policies for decoders: they choose the tokens that are kept, or those that are read."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
