"""The measured speed of this machine's engines, by which `auto` chooses on a CPU.

`foveate bench calibrate` measures a machine for a number of threads, and saves a file in the cache folder. Without that
file the shipped rates count, and so they do with `FOVEATE_MACHINE=shipped`, for choices that are the same on every
machine. The rates never enter a result: they only decide which engine computes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from foveate.core.cache_folder import cache as cache_folder
from foveate.core.engines.shipped import SHIPPED
from foveate.core.engines.work import Work
from foveate.core.errors import OptionError

FORMAT = "foveate.machine/1"
#: The variable of the environment; "shipped" leaves the file unread.
VARIABLE = "FOVEATE_MACHINE"


@dataclass(frozen=True)
class Machine:
    """Seconds that one of each amount of work costs.

    Args:
        rates: the seconds, by the engine's name, the dtype, and "forward" or "backward" (forward and backward pass),
            such as "gather float32 forward".
        threads: the threads of PyTorch that they hold for.
        source: the file that they come from; None for the shipped ones.
    """

    rates: Mapping[str, Work]
    threads: int = 1
    source: Path | None = None

    def rate(self, engine: str, dtype: torch.dtype, backward: bool) -> Work | None:
        """Return an engine's rates; those of float32 for dtypes without any, and None for an engine without any."""
        names = (dtype, torch.float32)
        keys = (key(engine, name, backward) for name in names)
        return next((self.rates[each] for each in keys if each in self.rates), None)


def key(engine: str, dtype: torch.dtype, backward: bool) -> str:
    """Return the key of an engine's rates."""
    return f"{engine} {str(dtype).removeprefix('torch.')} {'backward' if backward else 'forward'}"


def current() -> Machine:
    """Return the rates for this machine and PyTorch's present number of threads."""
    return shipped(1) if torch.compiler.is_compiling() else _known(torch.get_num_threads())


@cache
def _known(threads: int) -> Machine:
    if os.environ.get(VARIABLE) == "shipped":
        return shipped(threads)
    path = file(threads)
    try:
        return load(path, threads) if path.is_file() else shipped(threads)
    except (OptionError, OSError) as error:
        reason = error if isinstance(error, OptionError) else f"{path} cannot be read: {error.strerror or error}"
        warnings.warn(f"{reason}; the shipped rates choose engines until `foveate bench calibrate`", stacklevel=2)
        return shipped(threads)


def forget() -> None:
    """Read the file again at the next call."""
    _known.cache_clear()


def shipped(threads: int) -> Machine:
    """Return the shipped rates, of one thread of a server's processor; all but the calls are shared among threads."""
    shared = {name: Work(*(each / threads for each in work))._replace(calls=work.calls) for name, work in SHIPPED}
    return Machine(shared, threads)


def file(threads: int) -> Path:
    """Return the path of the file for this processor and a number of threads."""
    digest = hashlib.sha256(processor().encode()).hexdigest()[:10]
    return cache_folder() / f"machine-{digest}-{threads}.json"


@cache
def processor() -> str:
    """Return the processor's name and its widest instructions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # no Linux
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def to_json(machine: Machine) -> str:
    """Return the text of a machine's file."""
    return json.dumps({
        "format": FORMAT, "processor": processor(), "threads": machine.threads, "torch": torch.__version__,
        "rates": {name: work._asdict() for name, work in machine.rates.items()},
    }, indent=1) + "\n"  # fmt: skip


def load(path: Path, threads: int) -> Machine:
    """Read a machine's file.

    Raises:
        OptionError: if it is damaged, or was written by another version of PyTorch or of Foveate.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise OptionError(f'{path} is not of the format "{FORMAT}"')
    if found.get("torch") != torch.__version__:
        raise OptionError(f"{path} was measured with torch {found.get('torch')}, and this is {torch.__version__}")
    rates = found.get("rates")
    if not isinstance(rates, dict) or not rates or found.get("threads") != threads:
        raise OptionError(f"{path} is damaged (it has no rates for {threads} threads)")
    measured = {name: _rate(path, name, rate) for name, rate in rates.items()}
    return Machine({**shipped(threads).rates, **measured}, threads, path)


def _rate(path: Path, name: str, rate: Any) -> Work:
    right = isinstance(rate, dict) and rate.keys() == set(Work._fields) and all(map(_is_seconds, rate.values()))
    if not right or not any(rate.values()):
        raise OptionError(f"{path} is damaged (the rates of {name!r} are not seconds)")
    return Work(**rate)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
