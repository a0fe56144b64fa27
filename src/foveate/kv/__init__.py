"""Cache and prefill policies for decoders: which tokens are kept, and which are read."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
