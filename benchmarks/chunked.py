"""The memory of chunked attention beside its inputs, against that of the whole matrix: N = 16,384, float32.

Goals: peak extra memory at most 1/50 of the naive matrix forward, and 1/25 forward and backward. The operator of the
paper that found this, `memory_efficient_attention`, is held against what naive attention needs in all, with the paper's
chunks of 1,024 queries and 4,096 keys: at most 1/59 forward and 1/32 forward and backward, in 1.5 times its time.
Every measurement is a process of its own, whose resident memory is read before and at its peak; inputs and output count
for neither side. Memory is read where glibc gives back at once what is freed, so that the peak is what is in use, and
time where glibc does as it likes. Each figure is the median of three processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from _report import finish
from foveate.core import engines
from foveate.core.call import AttentionCall
from foveate.ops import create

HEADS, WIDTH = 1, 64
GOALS = {"forward": 1 / 50, "forward + backward": 1 / 25}
PAPER = {"forward": 1 / 59, "forward + backward": 1 / 32}
OPERATOR = "memory_efficient_attention"


def resident(peak: bool = False) -> int:
    """Bytes that this process holds, or held at most."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


def attend(engine: str, backward: bool, n: int) -> Tensor:
    q, k, v = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
    inputs = [x.clone().requires_grad_(backward) for x in (q, k, v)]
    del q, k, v
    held = resident()
    begun = time.perf_counter()
    if engine == OPERATOR:
        out = create(OPERATOR)(*inputs)
    else:
        out = engines.run(AttentionCall(*inputs, WIDTH**-0.5, causal=False), engine)
    if backward:
        out.backward(torch.ones_like(out))
    seconds = time.perf_counter() - begun
    kept = out.nbytes + sum(x.grad.nbytes for x in inputs if x.grad is not None)
    print(
        json.dumps({"extra": max(resident(peak=True) - held - kept, 0), "seconds": seconds, "mean": out.mean().item()})
    )
    return out


def measured(engine: str, backward: bool, n: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--length", str(n), "--engine", engine, *(["--backward"] if backward else [])]
    gives_back = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # once set, it does not grow as glibc's default does
    return median(command, {}) | {"extra": median(command, gives_back)["extra"]}


def median(command: list[str], env: dict[str, str], repeats: int = 3) -> dict[str, float]:
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, env=os.environ | env)
    found = [json.loads(run(command).stdout.splitlines()[-1]) for _ in range(repeats)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--engine", help="measure this one in this process")
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    if options.engine:
        attend(options.engine, options.backward, 256)  # code and libraries are loaded before memory is read
        attend(options.engine, options.backward, options.length)
        return
    matrix, rows, ratios = 4 * HEADS * options.length**2, [], {}
    for what, goal in GOALS.items():
        ours, theirs, naive = (
            measured(engine, "backward" in what, options.length) for engine in ("chunked", OPERATOR, "reference")
        )
        assert max(abs(each["mean"] - naive["mean"]) for each in (ours, theirs)) < 1e-6
        share = ours["extra"] / matrix
        rows.append(
            {"call": what, "matrix (MB)": matrix / 1e6, "naive extra (MB)": naive["extra"] / 1e6}
            | {"chunked extra (MB)": ours["extra"] / 1e6, "share of matrix": share, "goal": goal}
            | {"naive (s)": naive["seconds"], "chunked (s)": ours["seconds"]}
        )
        ratios[f"{what}: chunked extra / naive matrix"] = share
        ratios[f"{what}: chunked extra / naive extra"] = ours["extra"] / naive["extra"]
        ratios[f"{what}: chunked time / naive time"] = ours["seconds"] / naive["seconds"]
        rows.append(
            {"call": f"{what}, {OPERATOR}", "matrix (MB)": matrix / 1e6, "naive extra (MB)": naive["extra"] / 1e6}
            | {"chunked extra (MB)": theirs["extra"] / 1e6, "share of matrix": theirs["extra"] / matrix}
            | {"goal": PAPER[what], "naive (s)": naive["seconds"], "chunked (s)": theirs["seconds"]}
        )
        extra, seconds = (theirs[name] / naive[name] for name in ("extra", "seconds"))
        ratios[f"{what}: {OPERATOR} extra / naive extra (goal {PAPER[what]:.4f})"] = extra
        ratios[f"{what}: {OPERATOR} time / naive time (goal 1.5)"] = seconds
    finish(rows, ratios)


if __name__ == "__main__":
    main()
