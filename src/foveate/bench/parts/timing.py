"""Times that mean something: as many threads as cores are free, and a clock that waits for the device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_GLANCE = 0.2  # seconds that the cores are watched for
_SET_BY_HAND = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def threads() -> Iterator[int]:
    """As many torch threads as cores are free, unless the environment has set them; gives their number.

    Threads that wait for a busy core make every operation wait with them.
    """
    before = torch.get_num_threads()
    if not any(os.environ.get(name) for name in _SET_BY_HAND):
        torch.set_num_threads(min(before, free_cores()))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def free_cores() -> int:
    """Cores that this process may use and that nobody else keeps busy; at least one."""
    ours = _cores()
    return max(1, min(len(ours), round(len(ours) - _busy(ours))))


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _busy(cores: set[int]) -> float:
    """How many of these cores work for others at the moment, as Linux counts it; elsewhere the load average."""
    before = _ticks(cores)
    if before is None:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    time.sleep(_GLANCE)
    after = _ticks(cores)
    if after is None or after[1] <= before[1]:
        return 0.0
    return len(cores) * (after[0] - before[0]) / (after[1] - before[1])


def _ticks(cores: set[int]) -> tuple[int, int] | None:
    """Ticks of the clock in which these cores worked, and all ticks, since the machine started."""
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
