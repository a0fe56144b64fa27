"""The rates of a machine that nobody has calibrated: one thread of an AMD EPYC (AVX-512), in seconds.

`foveate bench calibrate` measured them there, with PyTorch 2.13.
"""

from __future__ import annotations

from foveate.core.engines.work import Work

#: Nanoseconds for a call, a product, a copied number, an indexed one, an element of a mask, and a planned run.
_NANOSECONDS = {
    "fused float32 forward": (1.43e4, 0.0295, 0, 0, 0, 0),
    "slices float32 forward": (4.66e4, 0.0271, 0.468, 0, 0.73, 1.16e5),
    "gather float32 forward": (1.34e5, 0.0263, 0.632, 0.789, 1.06, 1.22e3),
    "fused float32 backward": (6.46e4, 0.102, 0, 0, 0, 0),
    "slices float32 backward": (1.13e5, 0.0914, 0.895, 0, 0.769, 1.08e5),
    "gather float32 backward": (3.19e5, 0.0821, 1.62, 1.65, 1.67, 7.56e3),
    "fused bfloat16 forward": (1.55e4, 0.0302, 0, 0, 0, 0),
    "slices bfloat16 forward": (5.69e4, 0.0286, 0.474, 0, 0.655, 1.21e5),
    "gather bfloat16 forward": (1.68e5, 0.0269, 0.509, 0.77, 1.16, 1.16e3),
    "fused bfloat16 backward": (1.92e5, 0.0778, 0, 0, 0, 0),
    "slices bfloat16 backward": (5.07e5, 0.0934, 0, 0, 0.917, 2.14e5),
    "gather bfloat16 backward": (2.73e5, 0.0785, 0.966, 2.44, 2.97, 6.28e4),
    "flex float32 forward": (7.11e5, 0.0258, 0, 0, 122, 0),
}

SHIPPED = tuple((name, Work(*(1e-9 * each for each in rates))) for name, rates in _NANOSECONDS.items())
