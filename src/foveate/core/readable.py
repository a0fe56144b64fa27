"""Checks on the values of tensors, for tensors whose values can be read.

They cannot be read on the meta device, under `vmap`, or while a graph is captured (`torch.compile`, `torch.export`).
There a call assumes ordinary numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")

_TRUSTS: ContextVar[bool] = ContextVar("trusts", default=False)


@contextmanager
def trusted() -> Iterator[None]:
    """Read no values of tensors within the block: `with foveate.core.trusted(): ...`.

    Every check for NaN and inf waits for the device. Where inputs are known to be finite, this block leaves the checks
    out. A NaN in a key that is masked may then reach the outputs.
    """
    token = _TRUSTS.set(True)
    try:
        yield
    finally:
        _TRUSTS.reset(token)


def known(condition: Tensor) -> bool | None:
    """Return the truth of a tensor of one element, or None if it cannot or must not be read."""
    if torch.compiler.is_compiling() or condition.is_meta or _TRUSTS.get():
        return None
    try:
        return bool(condition)
    except RuntimeError:  # under vmap, or a fake tensor
        return None


def is_clean(*tensors: Tensor) -> bool:
    """Return True if no tensor holds NaN or inf, by one sum over each; also if they cannot be read."""
    if not torch.compiler.is_compiling() and _TRUSTS.get():
        return True
    total = sum((x.detach().sum(dtype=torch.float32) for x in tensors), torch.zeros(()))
    return known(torch.isfinite(total)) is not False


def has_shapes_alone(x: Tensor) -> bool:
    """Return True if the tensor will never hold numbers: on the meta device, and while a graph is exported."""
    return x.is_meta or isinstance(x, FakeTensor)


def remembered(make: Callable[..., T]) -> Callable[..., T]:
    """Cache a function whose results hold tensors; results of a graph that is being captured are never kept.

    A selection among them is told that it comes again, so that engines count on what it keeps for them. Cached tensors
    are made outside inference mode, so that a later call may need gradients.
    """

    @lru_cache(maxsize=64)
    def kept(*args: Any) -> T:
        with torch.inference_mode(False):
            found = make(*args)
        if hasattr(type(found), "comes_again"):
            vars(found)["_comes_again"] = True
        return found

    @wraps(make)
    def call(*args: Any) -> T:
        return make(*args) if torch.compiler.is_compiling() else kept(*args)

    return call
