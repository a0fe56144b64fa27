"""Compiled FlexAttention over block masks: the fastest sparse engine where compiling repays.

The first call compiles (about 13 s on a CPU, 3 s and more for another shape), so that `auto` turns to it for long
inputs only. Without a C++ compiler it is skipped, with one warning. It has no backward pass on a CPU.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from foveate.core.problem import Problem
from foveate.core.selection import Blocks


@cache
def has_compiler() -> bool:
    """Whether torch can compile for a CPU here; says so once where it cannot."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if any(name and shutil.which(name) for name in names):
        return True
    warnings.warn("no C++ compiler found: the flex engine is skipped on CPU (set CXX or install g++)", stacklevel=2)
    return False


def refuses(problem: Problem) -> str | None:
    if not problem.is_plain:
        return "flex computes softmax over dot products here"
    if not isinstance(problem.selection, Blocks):
        return "flex needs a selection of blocks"
    if problem.mask is not None:
        return "flex takes no tensor mask"
    if problem.dropout:
        return "flex does not drop weights"
    if problem.q.dtype == torch.float64:
        return "FlexAttention does not compile for float64"
    if problem.q.device.type == "cpu":
        if problem.wants_grad:
            return "FlexAttention has no backward pass on CPU"
        if not has_compiler():
            return "there is no C++ compiler"
    return None


def attend(problem: Problem) -> Tensor:
    """The output `(B, Hq, Nq, Dv)`."""
    selection = problem.selection
    assert isinstance(selection, Blocks)
    mask = (_causal_twin(selection) if problem.causal else selection).block_mask
    out = _compiled()(
        problem.q, problem.k, problem.v, block_mask=mask, scale=problem.scale, enable_gqa=problem.groups > 1
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _causal_twin(selection: Blocks) -> Blocks:
    """`selection.causal()`, remembered on the selection: static selections are used again and again."""
    twin = selection.__dict__.get("_causal_twin")
    if twin is None:
        twin = selection.__dict__["_causal_twin"] = selection.causal()
    return twin
