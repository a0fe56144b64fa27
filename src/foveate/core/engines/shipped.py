"""The rates of a machine that nobody has calibrated: one thread of an AMD EPYC (AVX-512), in seconds.

`foveate bench calibrate` measured them there, with PyTorch 2.13.
"""

from __future__ import annotations

from foveate.core.engines.work import Work

#: Nanoseconds for a call, a product, a copied number, an indexed one, an element of a mask, and a planned run.
_NANOSECONDS = {
    "fused float32 forward": (1.35e4, 0.0294, 0, 0, 0, 0),
    "slices float32 forward": (1.22e5, 0.028, 0, 0, 0.758, 5.64e4),
    "gather float32 forward": (1.1e5, 0.024, 0.789, 0, 1.42, 3.01e3),
    "fused float32 backward": (5.8e4, 0.104, 0, 0, 0, 0),
    "slices float32 backward": (1.29e5, 0.0911, 0.684, 0, 0.806, 1.13e5),
    "gather float32 backward": (4.83e5, 0.0778, 1.89, 2.06, 1.7, 2.57e3),
    "fused bfloat16 forward": (1.54e4, 0.0301, 0, 0, 0, 0),
    "slices bfloat16 forward": (1.35e5, 0.0318, 0, 0, 0.569, 6.96e4),
    "gather bfloat16 forward": (1.49e5, 0.0271, 0.497, 0, 1.04, 3.4e3),
    "fused bfloat16 backward": (1.63e5, 0.0775, 0, 0, 0, 0),
    "slices bfloat16 backward": (3.33e5, 0.0981, 0, 0, 1.51, 1.02e5),
    "gather bfloat16 backward": (4.48e5, 0.0765, 1.11, 1.79, 3.06, 6.5e4),
    "flex float32 forward": (1.62e6, 0.026, 0, 0, 0, 0),
}

SHIPPED = tuple((name, Work(*(1e-9 * each for each in rates))) for name, rates in _NANOSECONDS.items())
