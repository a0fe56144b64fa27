"""The floor under every room: calls, masks, selections, engines, the catalogue, errors."""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
