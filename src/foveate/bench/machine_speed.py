"""Measure the rates of this machine's engines, by which `auto` chooses on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from foveate.bench.parts.plaindata import write_atomic
from foveate.bench.parts.timing import fixed_threads
from foveate.core import engines, validate
from foveate.core.call import AttentionCall
from foveate.core.engines import flex, machine
from foveate.core.engines.machine import Machine
from foveate.core.engines.work import Work
from foveate.core.errors import OptionError
from foveate.core.selection import Blocks
from foveate.core.window_selection import window

DTYPES = (torch.float32, torch.bfloat16)
#: Runs of a call, of which the fastest counts: other processes only add time.
RUNS = 4


class Setting(NamedTuple):
    """The sizes of a call that is timed.

    Args:
        length: queries and keys.
        heads, kv_heads, width: Hq, Hkv, D.
        tile: queries and keys of a tile.
        keep: the share of tiles that are chosen.
        form: "own" tiles for each head, drawn at random; "shared" ones; a "band", which is a window.
        again: whether each run has the same selection, as of a window; others are chosen by content, anew in each call.
    """

    length: int
    heads: int
    kv_heads: int
    width: int
    tile: int
    keep: float
    form: str
    again: bool = False


#: Calls that differ in every amount of work, so that its rate can be told from the others'.
SETTINGS = (
    Setting(512, 8, 8, 64, 32, 1 / 4, "own"), Setting(1024, 4, 4, 64, 64, 1 / 8, "own"),
    Setting(2048, 2, 2, 64, 64, 1 / 16, "own", again=True), Setting(1024, 8, 2, 32, 64, 1 / 4, "own"),
    Setting(1024, 8, 8, 64, 64, 1 / 8, "shared"), Setting(2048, 4, 4, 64, 128, 1 / 8, "shared", again=True),
    Setting(2048, 1, 1, 128, 64, 1 / 4, "shared"), Setting(1024, 2, 2, 64, 16, 1 / 8, "shared"),
    Setting(2048, 4, 4, 64, 64, 1 / 16, "band", again=True), Setting(4096, 2, 1, 64, 64, 1 / 16, "band", again=True),
    Setting(512, 2, 2, 128, 64, 1 / 2, "band", again=True), Setting(256, 4, 4, 64, 16, 1 / 2, "own", again=True),
    Setting(512, 1, 1, 32, 16, 1 / 8, "shared"), Setting(512, 1, 1, 16, 16, 1 / 8, "own", again=True),
    Setting(4096, 1, 1, 16, 64, 1 / 32, "band", again=True), Setting(1024, 1, 1, 16, 64, 1 / 8, "own"),
    Setting(8192, 8, 8, 64, 64, 1 / 64, "band", again=True), Setting(4096, 4, 4, 64, 64, 1 / 64, "own"),
    Setting(8192, 2, 2, 64, 64, 1 / 8, "band", again=True), Setting(4096, 8, 2, 64, 64, 1 / 64, "shared"),
)  # fmt: skip
#: Two kernels are enough for the compiled engine; each is compiled once.
COMPILED = tuple(Setting(length, heads, heads, 64, 64, keep, "own")
                 for length, heads in ((4096, 2), (2048, 4)) for keep in (1 / 32, 1 / 8, 1 / 2))  # fmt: skip
#: Calls without a selection.
DENSE = tuple(Setting(length, heads, heads, width, 64, 1.0, "shared")
              for length, heads, width in ((64, 1, 32), (512, 4, 64), (1024, 4, 128), (4096, 2, 64)))  # fmt: skip


@dataclass(frozen=True)
class Calibrated:
    """A measured machine.

    Args:
        machine: the rates, with their file.
        errors: the median difference of predicted and measured times of the calls, as a share of the latter.
        seconds: the time that measuring took.
        notes: remarks, such as about a damaged file that was replaced.
    """

    machine: Machine
    errors: dict[str, float]
    seconds: float
    notes: list[str]


def calibrate(
    threads: int | None = None, progress: Callable[[int, int, str], None] = lambda step, steps, note: None
) -> Calibrated:
    """Measure how fast engines compute on this machine, in about a minute, and keep the rates for `auto`.

    The rates hold for this processor, this version of PyTorch and the number of threads. They only decide which engine
    computes a call of block selections on a CPU, and are what `Plan.seconds` predicts by.

    Args:
        threads: threads of PyTorch; None for its present number.
        progress: called as `progress(step, steps, note)`.

    Raises:
        OptionError: if the file cannot be written.
    """
    validate.count("threads", 1 if threads is None else threads, 1)
    begun, rates, errors = time.perf_counter(), dict[str, Work](), dict[str, float]()
    with fixed_threads(threads) as count:
        path, notes = machine.file(count), _about_old(count)
        plan = list(_engines())
        for step, (name, dtype, backward, settings) in enumerate(plan):
            key = machine.key(name, dtype, backward)
            progress(step, len(plan), key)
            found = [measure(name, setting, dtype, backward) for setting in settings]
            rates[key] = fit([work for work, _ in found], [seconds for _, seconds in found])
            errors[key] = median(abs(work.seconds(rates[key]) / seconds - 1) for work, seconds in found)
        progress(len(plan), len(plan), "saved")
        made = Machine(rates, count, path)
        write_atomic(path, machine.to_json(made))
        machine.forget()
    return Calibrated(made, errors, time.perf_counter() - begun, notes)


def _about_old(threads: int) -> list[str]:
    """Return a remark about an earlier file that cannot be used."""
    path = machine.file(threads)
    try:
        if path.is_file():
            machine.load(path, threads)
    except (OptionError, OSError) as error:
        return [f"{error}; it was measured again"]
    return []


def _engines() -> Iterator[tuple[str, torch.dtype, bool, Sequence[Setting]]]:
    """Yield what is measured: engine, dtype, whether with a backward pass, and the calls."""
    for dtype in DTYPES:
        for backward in (False, True):
            yield "fused", dtype, backward, DENSE
            yield "slices", dtype, backward, SETTINGS
            yield "gather", dtype, backward, SETTINGS
    if flex.has_compiler():
        yield "flex", torch.float32, False, COMPILED


def measure(engine: str, setting: Setting, dtype: torch.dtype, backward: bool) -> tuple[Work, float]:
    """Return the work of a call on an engine, and its seconds."""
    call = made(setting, dtype, backward, dense=engine == "fused")
    work = engines.ENGINES[engine].work(call)
    taken, is_new = [], isinstance(call.selected, Blocks) and not setting.again
    for _ in range(RUNS + 1):
        fresh = replace(call, selected=replace(_blocks(call))) if is_new else call
        begun = clock()
        out = engines.ENGINES[engine].attend(fresh)
        if backward:
            torch.autograd.grad(out.sum(), (call.q, call.k, call.v))
        taken.append(clock() - begun)
    return work, min(taken[1:])


def clock() -> float:
    """Return the clock's seconds; with one thread those of the processor, from which other processes take nothing."""
    exact = time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time() if exact and torch.get_num_threads() == 1 else time.perf_counter()


def _blocks(call: AttentionCall) -> Blocks:
    assert isinstance(call.selected, Blocks)
    return call.selected


def made(setting: Setting, dtype: torch.dtype, backward: bool = False, dense: bool = False) -> AttentionCall:
    """Make a causal call of a setting; without a selection if `dense`."""
    n, heads, kv_heads, width, *_ = setting
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, width, generator=random).to(dtype) for h in (heads, kv_heads, kv_heads))
    for x in (q, k, v):
        x.requires_grad_(backward)
    selected = None if dense else _selection(setting, random)
    return AttentionCall(q, k, v, scale=width**-0.5, causal=True, selected=selected)


def _selection(setting: Setting, random: torch.Generator) -> Blocks:
    n, rows = setting.length, -(-setting.length // setting.tile)
    if setting.form == "band":
        return window(n, n, max(1, round(setting.keep * n)), 0, torch.device("cpu"))
    own = setting.heads if setting.form == "own" else 1
    chosen = torch.rand(1, own, rows, rows, generator=random) < setting.keep
    selected = Blocks(chosen | torch.eye(rows, dtype=torch.bool), (setting.tile, setting.tile), n, n)
    if setting.again:
        vars(selected)["_comes_again"] = True
    return selected


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Work:
    """Return the rates, none below zero, whose predictions have the least squares of relative errors."""
    share = torch.tensor(works, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    unit = share.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    share = share / unit
    gram, right = share.T @ share, share.sum(0)
    rates = torch.zeros(len(right), dtype=torch.float64)
    for step in range(2000 * len(right)):
        at = step % len(right)
        if gram[at, at] > 0:
            rates[at] = (rates[at] - (gram[at] @ rates - right[at]) / gram[at, at]).clamp_min(0)
    return Work(*(rates / unit).tolist())
