"""Layers: `(B, N, C) -> (B, N, C)`, any operator inside, head schemes, positions, and blocks to stack.

Systems of this room are found through the catalogue: `foveate.nn.MixtureOfHeadAttention` is its row's object.
"""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
