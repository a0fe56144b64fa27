"""The sliding window with sinks as a `Selection`; the operator and the policies that split heads share it."""

from __future__ import annotations

from functools import lru_cache

import torch

from foveate.core.readable import remembered
from foveate.core.selection import Blocks, Rule

#: Tokens in a tile, and in a tile of a long call on a CPU, where compiled FlexAttention wastes less on small tiles.
TILE, LONG_TILE, LONG = 128, 64, 4096


@remembered
def window(n_queries: int, n_keys: int, size: int, sinks: int, device: torch.device) -> Blocks:
    """Return the causal selection of the last `size` keys, the query's own included, and the first `sinks` keys.

    It chooses only tiles that the band and the sinks touch, and masks nothing on tiles well inside the band. The same
    call returns the same object, so that compiled kernels and block masks are reused.
    """
    shift = n_keys - n_queries
    tile = LONG_TILE if n_queries >= LONG and device.type == "cpu" else TILE
    first = torch.arange(-(-n_queries // tile), device=device)[:, None] * tile + shift
    last = (first + tile - 1).clamp_max(n_keys - 1)
    start = torch.arange(-(-n_keys // tile), device=device) * tile
    end = start + tile - 1
    touched = (start <= last) & ((first - end < size) | (start < sinks))
    whole = (end <= first) & ((last - start < size) | (end < sinks))
    return Blocks(touched[None, None], (tile, tile), n_queries, n_keys, _rule(size, sinks, shift), whole[None, None])


@lru_cache(maxsize=64)
def _rule(size: int, sinks: int, shift: int) -> Rule:
    return lambda b, h, q, k: ((q + shift - k < size) | (k < sinks)) & (k <= q + shift)
