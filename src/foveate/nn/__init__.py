"""Layers `(B, N, C) -> (B, N, C)` around any operator, head schemes, positions, and blocks to stack.

The catalogue lists the systems of this room: `foveate.nn.MixtureOfHeadAttention` is the object of its row.
"""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
