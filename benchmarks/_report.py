"""The parts that every benchmark shares: fair timing, a plain table, and one line of JSON at the end.

On a shared machine the clock drifts from minute to minute, so what is compared is run in turns and its medians are
divided within one run.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def timed(fn: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted."""
    fn()
    return [_seconds(fn) for _ in range(repeats)]


def interleaved(fns: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, all called in turns, there and back, after a round that is not counted."""
    for fn in fns.values():
        fn()
    taken: dict[str, list[float]] = {name: [] for name in fns}
    for repeat in range(repeats):
        for name in list(fns)[:: 1 if repeat % 2 else -1]:
            taken[name].append(_seconds(fns[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def keep_memory() -> None:
    """Make this process keep the memory that it frees, as GPU allocators and jemalloc do; only glibc can be asked.

    Left alone, glibc gives every block above 32 MB back at once, and the next such tensor is faulted in anew, page by
    page: a price of the machine that only long sequences pay, and not part of what an operator computes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        top_is_trimmed, blocks_mapped = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(top_is_trimmed, 2**31 - 1)
        mallopt(blocks_mapped, 0)


def finish(rows: Sequence[Mapping[str, object]], ratios: Mapping[str, float]) -> None:
    """Print `rows` as a table, and last the ratios as one line of JSON."""
    table = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


def _seconds(fn: Callable[[], object]) -> float:
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
