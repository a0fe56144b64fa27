"""Apply methods to pretrained models through transformers' own interfaces."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
