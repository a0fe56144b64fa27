"""The rates of a machine that nobody has calibrated: one thread of an AMD EPYC (AVX-512), in seconds.

`foveate bench calibrate` measured them there, with PyTorch 2.13.
"""

from __future__ import annotations

from foveate.core.engines.work import Work

#: Nanoseconds for a call, a product, a copied number, an indexed one, an element of a mask, and a planned run.
_NANOSECONDS = {
    "fused float32 forward": (1.3e4, 0.0309, 0, 0, 0, 0),
    "slices float32 forward": (4.34e4, 0.031, 1.36, 0, 1.07, 1.76e5),
    "gather float32 forward": (0, 0.0302, 0.695, 0.843, 2.22, 3.22e3),
    "fused float32 backward": (5.64e4, 0.111, 0, 0, 0, 0),
    "slices float32 backward": (1.23e5, 0.105, 0.683, 0, 1.19, 2.06e5),
    "gather float32 backward": (5.1e4, 0.0745, 2.13, 1.61, 3.82, 2.09e4),
    "fused bfloat16 forward": (1.46e4, 0.0327, 0, 0, 0, 0),
    "slices bfloat16 forward": (4.5e4, 0.0316, 2.6, 0, 1.31, 1.09e5),
    "gather bfloat16 forward": (0, 0.0231, 0.729, 0.742, 2.74, 2.73e3),
    "fused bfloat16 backward": (1.58e5, 0.0833, 0, 0, 0, 0),
    "slices bfloat16 backward": (4.28e5, 0.119, 0, 0, 0.835, 3.8e5),
    "gather bfloat16 backward": (4.97e5, 0.102, 0, 0, 4.97, 1.05e5),
    "flex float32 forward": (2.36e6, 0.0259, 0, 0, 48.2, 0),
}

SHIPPED = tuple((name, Work(*(1e-9 * each for each in rates))) for name, rates in _NANOSECONDS.items())
