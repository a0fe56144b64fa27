"""What bfloat16 costs: operators in turns with themselves in float32, one thread.

Goal: no operator slower in bfloat16 than in float32. On a processor that multiplies halves one by one (AVX2 and below)
tiles are computed in float32, which is the reason that the goal is met there too; a layer's own linear maps are
PyTorch's, and are as slow there as PyTorch's are.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from _report import finish
from foveate.ops import operator

#: Key, options for 4 heads of 64 channels, tokens.
CASES: tuple[tuple[str, dict[str, float], int], ...] = (
    ("memory_efficient_attention", {}, 2048),
    ("neural_attention", {"head_dim": 64}, 512),
    ("hedgehog", {"heads": 4, "head_dim": 64}, 2048),
    ("efficient_attention", {}, 2048),
    ("titans", {"heads": 4, "head_dim": 64, "chunk": 64, "theta": 0.01}, 512),
    ("sliding_window", {"window": 256}, 2048),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = [], {}
    for key, built, n in CASES:
        seconds = in_turns(calls(key, built, n), options.repeats)
        pairs = [half / full for half, full in zip(seconds["bfloat16"], seconds["float32"], strict=True)]
        low, ratio, high = (statistics.quantiles(pairs, n=10)[i] for i in (0, 4, 8))
        taken = {f"{name} (ms)": 1e3 * statistics.median(times) for name, times in seconds.items()}
        rows.append({"operator": key, "N": n, **taken, "ratio": ratio, "from": low, "to": high})
        ratios[f"bfloat16 / float32, {key} (goal 1.05)"] = ratio
    finish(rows, ratios)


def calls(key: str, built: Mapping[str, float], n: int) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    drawn = torch.randn(3, 1, 4, n, 64, generator=torch.Generator().manual_seed(0))
    outs = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.manual_seed(0)
        op = operator(key, **built).to(dtype)
        found[name] = functools.partial(op, *drawn.to(dtype), causal="causal self" in op.patterns)
        with torch.no_grad():
            outs.append(found[name]())
    error = ((outs[1] - outs[0]).norm() / outs[0].norm()).item()
    assert error < 0.05, (key, error)
    return found


def in_turns(fns: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, pair by pair, there and back."""
    taken: dict[str, list[float]] = {name: [] for name in fns}
    with torch.inference_mode():
        for repeat in range(repeats):
            for name in list(fns)[:: 1 if repeat % 2 else -1]:
                begun = time.perf_counter()
                fns[name]()
                taken[name].append(time.perf_counter() - begun)
    return taken


if __name__ == "__main__":
    main()
