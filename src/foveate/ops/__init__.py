"""Operators: `q, k, v -> out`, by key or as objects.

`attend(q, k, v, "hip", causal=True, keep=512)` is `HiP(keep=512)(q, k, v, causal=True)`. The classes are found through
the catalogue, so that a new system is reachable by its row alone.
"""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
