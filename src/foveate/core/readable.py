"""What the numbers in a tensor say, where anybody can look at them.

Nobody can on the meta device, under `vmap`, or in a graph that is being captured (`torch.compile`, `torch.export`).
There the call goes on as for ordinary numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")


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


def has_shapes_alone(x: Tensor) -> bool:
    """Whether no call will ever see numbers in this tensor: on the meta device, and while a graph is exported."""
    return x.is_meta or isinstance(x, FakeTensor)


def remembered(make: Callable[..., T]) -> Callable[..., T]:
    """`lru_cache` for what holds tensors. Those of a graph that is being captured are made anew, and never kept.

    What is kept is made outside inference mode, so that a later call may need gradients.
    """

    @lru_cache(maxsize=64)
    def kept(*args: Any) -> T:
        with torch.inference_mode(False):
            return make(*args)

    @wraps(make)
    def call(*args: Any) -> T:
        return make(*args) if torch.compiler.is_compiling() else kept(*args)

    return call
