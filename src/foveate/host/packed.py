"""Packed heads: decoding with grouped heads that reads each key once."""

from __future__ import annotations

from typing import ClassVar, final

from foveate.host.method import Method


@final
class Packed(Method):
    """A method that gives the kernel a group's query heads as queries of one head, in calls of few queries.

    It drops nothing: every query sees every key. Results differ from the model's own in the last bits. PyTorch's kernel
    for grouped heads reads the keys once for each query head. With packed heads it reads them once for each key/value
    head, which saves most on a CPU, in bfloat16, with long texts; `benchmarks/decode_real.py` measures it. New tokens
    are written after the others in place; an ordinary cache copies all tokens for each new one. Layers from which a
    method has dropped tokens are always packed. The wrong choice if results have to equal the model's own bit for bit,
    and useless if every query head has keys of its own. The model's kernel computes calls with a soft cap, with
    dropout, or of more than 16 queries.
    """

    packs: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
