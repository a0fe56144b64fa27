"""Compiled FlexAttention over block masks: the fastest sparse engine where compiling repays.

The first call compiles (about 13 s on a CPU, 3 s and more for another shape), so that `auto` turns to it for long
inputs only. Without a C++ compiler it is skipped, with one warning. It has no backward pass on a CPU. Uncompiled,
FlexAttention would make the whole matrix and not look at the chosen tiles: that is refused, not run.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedEngine
from foveate.core.problem import Problem
from foveate.core.selection import Blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Calls of different shape or rule that are compiled in one process; torch's own default is 8.
COMPILED = 128


class NotCompiled(UnsupportedEngine):
    """FlexAttention could not be compiled for a call."""


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
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        with config.patch(recompile_limit=COMPILED):
            return _compiled()(problem.q, problem.k, problem.v, mask, problem.scale, problem.groups > 1)
    except FailOnRecompileLimitHit:
        raise NotCompiled(f"flex has compiled FlexAttention for {COMPILED} different calls already") from None


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_kernel, dynamic=False, fullgraph=True)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.compiler.is_compiling():
        raise NotCompiled("flex needs torch.compile, which is switched off")
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


def _causal_twin(selection: Blocks) -> Blocks:
    """`selection.causal()`, remembered on the selection: static selections are used again and again."""
    twin = selection.__dict__.get("_causal_twin")
    if twin is None:
        twin = selection.__dict__["_causal_twin"] = selection.causal()
    return twin
