"""Reliable times: as many threads as free cores, and a clock that waits for the device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_SAMPLE = 0.2  # seconds over which the cores' load is sampled
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def threads() -> Iterator[int]:
    """Use as many torch threads as there are free cores, unless the environment sets them; yield the number.

    A thread that waits for a busy core delays every operation.
    """
    before = torch.get_num_threads()
    if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        torch.set_num_threads(min(before, free_cores()))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def fixed_threads(count: int | None) -> Iterator[int]:
    """Use so many torch threads; None leaves their number. Yield it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def free_cores() -> int:
    """Return the number of cores that this process may use and others leave free; at least one."""
    usable = _cores()
    return max(1, min(len(usable), round(len(usable) - _busy(usable))))


def now(device: torch.device) -> float:
    """Return the clock's seconds, after the device has finished its work."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _busy(cores: set[int]) -> float:
    """Return how many of these cores are busy, by Linux's counters; elsewhere the load average."""
    before = _ticks(cores)
    if before is None:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    time.sleep(_SAMPLE)
    after = _ticks(cores)
    if after is None or after[1] <= before[1]:
        return 0.0
    return len(cores) * (after[0] - before[0]) / (after[1] - before[1])


def _ticks(cores: set[int]) -> tuple[int, int] | None:
    """Return the busy and the total clock ticks of these cores since the machine started."""
    try:
        lines = Path("/proc/stat").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    busy = total = 0
    for line in lines:
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, idle, wait, *more = map(int, fields[:8])
            busy += user + nice + system + sum(more)
            total += user + nice + system + idle + wait + sum(more)
    return (busy, total) if total else None
