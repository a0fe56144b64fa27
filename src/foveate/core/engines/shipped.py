"""The rates of a machine that nobody has calibrated: one thread of an AMD EPYC (AVX-512), in seconds.

`foveate bench calibrate` measured them there, with PyTorch 2.13.
"""

from __future__ import annotations

from foveate.core.engines.work import Work

#: Nanoseconds for a call, a product, a copied number, an indexed one, an element of a mask, and a planned run.
_NANOSECONDS = {
    "fused float32 forward": (1.31e4, 0.0306, 0, 0, 0, 0),
    "slices float32 forward": (3.68e4, 0.0297, 1.03, 0, 1.07, 1.44e5),
    "gather float32 forward": (7.74e4, 0.0232, 0.903, 1.05, 2.14, 0),
    "fused float32 backward": (5.5e4, 0.109, 0, 0, 0, 0),
    "slices float32 backward": (1.21e5, 0.0968, 1.14, 0, 1.2, 1.91e5),
    "gather float32 backward": (5.14e5, 0.0662, 2.27, 2.33, 3.76, 0),
    "fused bfloat16 forward": (1.49e4, 0.0303, 0, 0, 0, 0),
    "slices bfloat16 forward": (4.41e4, 0.0299, 1.21, 0, 1.01, 1.5e5),
    "gather bfloat16 forward": (5.53e4, 0.0221, 0.764, 0.757, 2.19, 0),
    "fused bfloat16 backward": (2.34e5, 0.081, 0, 0, 0, 0),
    "slices bfloat16 backward": (3.59e5, 0.106, 0, 0, 1.51, 2.09e5),
    "gather bfloat16 backward": (2.96e6, 0.0646, 3.06, 3.2, 6.21, 0),
    "flex float32 forward": (2.34e6, 0.0262, 0, 0, 1.62, 0),
}

SHIPPED = tuple((name, Work(*(1e-9 * each for each in rates))) for name, rates in _NANOSECONDS.items())
