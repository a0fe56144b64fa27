"""Operators: `q, k, v -> out`, by key or as objects.

`attend(q, k, v, "hip", causal=True, keep=512)` is `HiP(keep=512)(q, k, v, causal=True)`. The catalogue's rows list the
classes, so a new system needs only its row.
"""

from foveate.core.public import lazy

__getattr__, __dir__ = lazy(__name__)
