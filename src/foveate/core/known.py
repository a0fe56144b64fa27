"""What the numbers in a tensor say, where anybody can look at them.

Nobody can on the meta device, under `vmap`, or in a graph that is being captured (`torch.compile`, `torch.export`).
There the call goes on as for ordinary numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def known(condition: Tensor) -> bool | None:
    """The truth of a tensor of one element; None where nobody can look at it."""
    if torch.compiler.is_compiling() or condition.is_meta:
        return None
    try:
        return bool(condition)
    except RuntimeError:  # under vmap, or a fake tensor
        return None


def is_clean(*tensors: Tensor) -> bool:
    """Whether none of these holds NaN or inf, by one sum over each; taken as given where nobody can look."""
    total = sum((x.detach().sum(dtype=torch.float32) for x in tensors), torch.zeros(()))
    return known(torch.isfinite(total)) is not False
