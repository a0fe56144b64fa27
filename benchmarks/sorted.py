"""Attention inside sorted or clustered groups: speed against dense attention, and the growth of the choice's time.

The ideal speed-up of a call is the number of multiply-adds of dense attention over its own, the choice of groups
included. The time of a choice is measured at several lengths; the exponent is the slope of its logarithm.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, interleaved
from foveate.ops import HyperAttention, RoutingAttention
from foveate.ops.base.grouped import Grouped

HEADS, WIDTH = 8, 64


def cases(n: int) -> dict[str, tuple[Grouped, bool]]:
    """Return operators for `n` tokens, and whether the call is causal."""
    root = round(math.sqrt(n))
    return {
        f"routing, {root} clusters": (RoutingAttention(HEADS, WIDTH, root), False),
        f"routing, {root} clusters, causal": (RoutingAttention(HEADS, WIDTH, root), True),
        f"routing, {n // 512} clusters of 512": (RoutingAttention(HEADS, WIDTH, n // 512, 512), False),
        "hyper": (HyperAttention(WIDTH), False),
        "hyper, causal": (HyperAttention(WIDTH), True),
        "hyper, causal, pieces of 1024": (HyperAttention(WIDTH, min_len=1024), True),
    }


def choices() -> dict[str, Callable[[Tensor, Tensor], object]]:
    """Return the choice of groups of each operator, which has about the square root of N clusters."""

    def routed(q: Tensor, k: Tensor) -> object:
        op = RoutingAttention(HEADS, WIDTH, round(math.sqrt(q.shape[2])))
        return op._clusters(q, k)

    def hashed(q: Tensor, k: Tensor) -> object:
        op = HyperAttention(WIDTH)
        return list(op._choices(op._call(q, k, k, None, False, None)))

    return {"routing": routed, "hyper": hashed}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    agree()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows, ratios = [], {}
    q, k, v = (torch.randn(1, HEADS, options.tokens, WIDTH, device=device, dtype=dtype) for _ in range(3))
    for name, (op, causal) in cases(options.tokens).items():
        op = op.to(device)
        dense = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        calls = {"dense": dense, name: functools.partial(op, q, k, v, causal=causal)}
        with torch.inference_mode():
            seconds = interleaved({each: waited(call, device) for each, call in calls.items()}, options.repeats)
        visible = options.tokens * (options.tokens + 1) / 2 if causal else options.tokens**2
        ideal = 4 * HEADS * WIDTH * visible / op.plan(q, k, v, causal=causal).flops
        achieved = seconds["dense"] / seconds[name]
        rows.append({"call": name, "ms": 1e3 * seconds[name], "dense ms": 1e3 * seconds["dense"],
                     "faster": achieved, "ideal": ideal, "achieved / ideal": achieved / ideal})  # fmt: skip
        ratios[f"{name}: achieved / ideal"] = achieved / ideal
    for name, choose in choices().items():
        ratios[f"{name}: exponent of the choice"] = exponent(choose, device, dtype, options.repeats)
    finish(rows, ratios)


def waited(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a call that waits for the device."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def exponent(
    choose: Callable[[Tensor, Tensor], object], device: torch.device, dtype: torch.dtype, repeats: int
) -> float:
    """Return the slope of the log of the time between 4,096 and 32,768 tokens, by least squares."""
    lengths = [4096, 8192, 16384, 32768]
    calls = {}
    for n in lengths:
        q, k = (torch.randn(1, HEADS, n, WIDTH, device=device, dtype=dtype) for _ in range(2))
        calls[str(n)] = waited(functools.partial(choose, q, k), device)
    with torch.inference_mode():
        seconds = interleaved(calls, max(repeats, 5))
    x = torch.tensor([math.log(n) for n in lengths])
    y = torch.tensor([math.log(seconds[str(n)]) for n in lengths])
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def agree() -> None:
    """The gate: what is timed equals its weights times the values."""
    q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    for op in (RoutingAttention(2, 16, 6), HyperAttention(16, block=8, samples=8, min_len=16)):
        for causal in (False, True):
            expected = op.weights(q, k, causal=causal) @ v
            torch.testing.assert_close(op(q, k, v, causal=causal), expected, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    main()
