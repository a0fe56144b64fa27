"""Packed heads: decode with grouped heads at the speed of the keys that there are to read."""

from __future__ import annotations

from typing import ClassVar, final

from foveate.host.method import Method


@final
class Packed(Method):
    """Calls of few queries go to the kernel with a group's query heads side by side, as queries of one head.

    Nothing is dropped: every query sees every key, and results differ from the model's own in the last bits. PyTorch's
    kernel for grouped heads reads the keys once for each query head. Packed, it reads them once for each key/value
    head, which saves most on a CPU, in bfloat16, with long texts; `benchmarks/decode_real.py` measures it. New tokens
    are written behind the others, where an ordinary cache copies all of them for each new one. Layers that a method has
    dropped tokens from are packed in any case. The wrong choice where results have to be the model's own bit for bit,
    and of no use where every query head has keys of its own. Calls with a soft cap, with dropout, or of more than 16
    queries are left to the model's kernel.
    """

    packs: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
