"""Linear attention against fused causal attention: Lightning Attention, 8 heads of 64 channels, float32.

Goals at N = 16,384: at least 15 times faster forward, and 8 times forward and backward; and the same time per token,
within 15 %, from 1,024 to 65,536 tokens, in a process that keeps its memory. With fresh pages for every tensor above
32 MB, which is glibc's habit and how the speed-ups are measured, it is printed too. Beside the tiled operator stand the
chunked form that any linear operator gets from its family (here with the same decays, under autograd), and LightNet,
where every feature has a decay of its own that is written out: several times the cost.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from _report import finish, interleaved, keep_memory
from foveate.ops import Operator, create

HEADS, WIDTH = 8, 64
GOALS = {"forward": 15, "forward + backward": 8}
FLAT = 1.15

OPERATORS: dict[str, Operator] = {
    "lightning_attention": create("lightning_attention", layer=1, depth=4, variant="release"),
    "chunked": create("lightning_attention_2", layer=1, depth=4, variant="release", backward="autograd"),
    "lightnet": create("lightnet"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    agree()
    rows, ratios = [], {}
    for what, goal in GOALS.items():
        seconds = compared(options.length, "backward" in what, options.repeats)
        dense = seconds.pop("fused dense")
        rows.append({"call": f"fused dense, {what}", "N": options.length, "ms": dense * 1e3, "faster": 1.0, "goal": ""})
        for name, taken in seconds.items():
            faster = dense / taken
            shown = goal if name == "lightning_attention" else ""
            rows.append(
                {"call": f"{name}, {what}", "N": options.length, "ms": taken * 1e3, "faster": faster, "goal": shown}
            )
            ratios[f"{name}, {what}: speed-up over fused dense"] = faster
    for memory in ("fresh pages", "kept memory"):
        if memory == "kept memory":
            keep_memory()
        for what in GOALS:
            taken = per_token(options.lengths, "backward" in what, options.repeats)
            for n, each in taken.items():
                label = f"us per token, {what}, {memory}"
                rows.append({"call": label, "N": n, "ms": each * n / 1e3, "faster": each, "goal": ""})
            goal = f" (goal {FLAT})" if memory == "kept memory" else ""
            label = f"{what}, {memory}: time per token, slowest length / fastest{goal}"
            ratios[label] = max(taken.values()) / min(taken.values())
    finish(rows, ratios)


def inputs(n: int, grad: bool) -> list[Tensor]:
    drawn = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()
    return [x.clone().requires_grad_(grad) for x in drawn]


def agree(n: int = 600) -> None:
    """The gate: what is timed is what the whole matrix gives, in outputs and gradients."""
    for name, op in OPERATORS.items():
        given = inputs(n, grad=True)
        seen = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
        outs = [op(*given, causal=True, engine=engine) for engine in ("chunked", "reference")]
        found = [[out, *torch.autograd.grad((out * seen).sum(), given)] for out in outs]
        for ours, theirs in zip(*found, strict=True):
            error = ((ours - theirs).norm() / theirs.norm()).item()
            assert error < 1e-4, (name, error)


def call(attend: Callable[..., Tensor], given: list[Tensor], backward: bool) -> None:
    if not backward:
        with torch.inference_mode():
            attend(*given)
        return
    out = attend(*given)
    torch.autograd.grad(out, given, torch.ones_like(out))


def compared(n: int, backward: bool, repeats: int) -> dict[str, float]:
    given = inputs(n, backward)
    calls = {"fused dense": functools.partial(F.scaled_dot_product_attention, is_causal=True)}
    calls |= {name: functools.partial(op, causal=True) for name, op in OPERATORS.items()}
    return interleaved({name: functools.partial(call, each, given, backward) for name, each in calls.items()}, repeats)


def per_token(lengths: list[int], backward: bool, repeats: int) -> dict[int, float]:
    """Microseconds a token takes at each length; short calls are made often enough to cover as many tokens."""
    op, most = functools.partial(OPERATORS["lightning_attention"], causal=True), max(lengths)

    def many(n: int) -> Callable[[], None]:
        given = inputs(n, backward)

        def work() -> None:
            for _ in range(most // n):
                call(op, given, backward)

        return work

    seconds = interleaved({str(n): many(n) for n in lengths}, repeats)
    return {n: seconds[str(n)] / (most // n * n) * 1e6 for n in lengths}


if __name__ == "__main__":
    main()
