"""Compiled FlexAttention over block masks: the fastest engine for repeated calls whose heads choose different blocks.

The first call compiles (about 13 s on a CPU, more on a busy one). Lengths are rounded up to powers of two, so that one
kernel serves many; the added rows see nothing and cost almost nothing. `auto` picks this engine on a CPU for long calls
of a kind that keeps coming back. Without a working C++ compiler it is skipped with one warning. It has no backward pass
on a CPU. Uncompiled FlexAttention would build the whole matrix and ignore the chosen tiles, so this engine refuses to
run uncompiled.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.core.call import AttentionCall
from foveate.core.engines.work import Work
from foveate.core.errors import UnsupportedEngine
from foveate.core.selection import Blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Limit on compiled calls of different shape or rule in one process; torch's own default is 8.
COMPILED = 128


class NotCompiled(UnsupportedEngine):
    """FlexAttention could not be compiled for a call."""


@cache
def has_compiler() -> bool:
    """Return True if torch can compile for a CPU here; warn once if it cannot."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if any(name and shutil.which(name) for name in names):
        return True
    warnings.warn("no C++ compiler found: the flex engine is skipped on CPU (set CXX or install g++)", stacklevel=2)
    return False


#: The reason why compiling has failed in this process, if it has.
_failures: list[str] = []


def refuses(call: AttentionCall) -> str | None:
    if not call.is_plain:
        return "flex computes softmax over dot products here"
    if not isinstance(call.selection, Blocks):
        return "flex needs a selection of blocks"
    if call.mask is not None:
        return "flex takes no tensor mask"
    if call.dropout:
        return "flex does not drop weights"
    if call.q.dtype == torch.float64:
        return "FlexAttention does not compile for float64"
    if call.q.device.type == "cpu":
        if call.wants_grad:
            return "FlexAttention has no backward pass on CPU"
        if not has_compiler():
            return "there is no C++ compiler"
    return _failures[0] if _failures else None


def work(call: AttentionCall) -> Work:
    """Return the work of a call once it is compiled. Sorting a new selection's tiles counts as a mask of so many."""
    selection = call.selection
    assert isinstance(selection, Blocks)
    blocks = (selection.without_future if call.causal else selection).blocks
    (b, hq, _, d), dv = call.q.shape, call.v.shape[3]
    pairs = float(blocks.sum()) / blocks.shape[:2].numel() * selection.size[0] * selection.size[1]
    return Work(calls=1, products=b * hq * pairs * (d + dv), masked=0 if selection.comes_again else blocks.numel())


def attend(call: AttentionCall) -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)`."""
    selection = call.selection
    assert isinstance(selection, Blocks)
    n_queries = call.n_queries
    q, k, v, selection = _rounded(call, selection.without_future if call.causal else selection)
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        with config.patch(recompile_limit=COMPILED):
            out = _compiled()(q, k, v, selection.block_mask, call.scale, call.groups > 1)
    except FailOnRecompileLimitHit:
        raise NotCompiled(f"flex has compiled FlexAttention for {COMPILED} different calls already") from None
    except (TorchDynamoException, InductorError) as error:
        raise NotCompiled(_failed(error)) from error
    return out[:, :, :n_queries]


def _failed(error: Exception) -> str:
    """Remember that compiling fails here, and warn once."""
    first = str(error).strip().splitlines()
    _failures[:] = [f"FlexAttention could not be compiled: {first[0] if first else type(error).__name__}"]
    warnings.warn(f"{_failures[0]}; the flex engine is skipped from here on", stacklevel=2)
    return _failures[0]


def rounded_lengths(call: AttentionCall) -> tuple[int, int]:
    """Return the numbers of queries and keys of the kernel that serves a call."""
    selection = call.selection
    assert isinstance(selection, Blocks)
    if not call.causal and call.n_keys % selection.size[1]:
        return call.n_queries, call.n_keys  # without a rule, nothing would hide the keys that fill up the last tile
    tiles = zip((call.n_queries, call.n_keys), selection.size, strict=True)
    rounded = [size << max(-(-n // size) - 1, 0).bit_length() for n, size in tiles]
    return rounded[0], rounded[1]


def _rounded(call: AttentionCall, selection: Blocks) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    q, k, v, (n_queries, n_keys) = call.q, call.k, call.v, rounded_lengths(call)
    if (n_queries, n_keys) == (call.n_queries, call.n_keys):
        return q, k, v, selection
    larger = selection.__dict__.get("_larger")
    if larger is None:
        larger = selection.__dict__["_larger"] = _larger(selection, n_queries, n_keys)
    k, v = (F.pad(x, (0, 0, 0, n_keys - x.shape[2])) for x in (k, v))
    return F.pad(q, (0, 0, 0, n_queries - q.shape[2])), k, v, larger


def _larger(selection: Blocks, n_queries: int, n_keys: int) -> Blocks:
    """Pad the selection with queries that see nothing and keys that no query sees."""
    have, size = selection.blocks.shape[2:], selection.size
    more = (0, n_keys // size[1] - have[1], 0, n_queries // size[0] - have[0])
    whole = None if selection.whole is None else F.pad(selection.whole, more)
    blocks = F.pad(selection.blocks, more)
    return replace(selection, blocks=blocks, whole=whole, n_queries=n_queries, n_keys=n_keys)


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
