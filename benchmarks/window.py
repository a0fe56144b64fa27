"""The time that a sliding window saves: `SlidingWindow` at 512 of 8,192 causal tokens, float32.

Goals: at least half of the ideal speed-up over fused dense attention, which is 8, without compiling anything; the first
call in well under a second; and not slower than FlexAttention compiled by hand with a block mask made beforehand, whose
first call compiles. The engine that gathers keys is shown beside them.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from _report import finish, interleaved
from foveate.core.engines import flex
from foveate.ops import SlidingWindow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, window = options.length, options.window
    q, k, v = torch.randn(3, 1, 8, n, 64, generator=torch.Generator().manual_seed(0))
    ours = SlidingWindow(window, sinks=0)
    calls = {
        "fused dense": functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        "foveate": functools.partial(ours, q, k, v, causal=True),
        "foveate, gather": functools.partial(ours, q, k, v, causal=True, engine="gather"),
    }
    if flex.has_compiler():
        calls["FlexAttention"] = by_hand(q, k, v, window)
    with torch.inference_mode():
        first = {name: once(call) for name, call in calls.items()}
        agree = {name: (call() - calls["foveate"]()).abs().max() for name, call in calls.items() if "dense" not in name}
        assert max(agree.values()) < 1e-4, agree
        seconds = interleaved(calls, options.repeats)
    report(
        seconds, first, ours.plan(q, k, v, causal=True).engine, 0.5 * n * (n + 1) / (window * (n - (window - 1) / 2))
    )


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int) -> functools.partial[Tensor]:
    """Attend as one would without this library."""
    n = q.shape[2]
    band = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, n, n, device="cpu")
    return functools.partial(torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=band)


def once(call: Callable[[], Tensor]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def report(seconds: dict[str, float], first: dict[str, float], engine: str, ideal: float) -> None:
    dense = seconds["fused dense"]
    rows = [
        {"call": f"foveate ({engine})" if name == "foveate" else name, "ms": taken * 1e3}
        | {"first (ms)": first[name] * 1e3}
        | {"speed-up over dense": dense / taken, "of the ideal": dense / taken / ideal}
        for name, taken in seconds.items()
    ]
    ratios = {"speed-up over fused dense": dense / seconds["foveate"], "ideal speed-up": ideal}
    ratios["achieved / ideal (goal 0.5)"] = dense / seconds["foveate"] / ideal
    ratios["first call, in seconds"] = first["foveate"]
    ratios["gather: speed-up over fused dense"] = dense / seconds["foveate, gather"]
    if "FlexAttention" in seconds:
        ratios["foveate / FlexAttention by hand"] = seconds["foveate"] / seconds["FlexAttention"]
    finish(rows, ratios)


if __name__ == "__main__":
    main()
