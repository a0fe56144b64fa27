"""The engine that `auto` picks against the fastest one, over shapes and sparse operators, on a CPU.

    python benchmarks/engines.py [--calibrate] [--flex]

Every case is a selection of blocks that at least two engines can compute; the engines take turns. The goal: the pick is
within 10 % of the fastest in at least 0.9 of the cases. The compiled engine is left out unless `--flex` is given, as
`auto` leaves it out of calls that have not come often. A selection that an operator makes anew in every call is new to
the engine in every round.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from _report import finish, interleaved
from foveate.bench.machine_speed import calibrate
from foveate.bench.sparsity.operators import is_causal, made, sparse_operators
from foveate.core import engines
from foveate.core.call import AttentionCall
from foveate.core.selection import Blocks
from foveate.ops.base.selective import Selective

#: Lengths; Hq, Hkv and D; shares of the keys.
LENGTHS, SIZES, BUDGETS = (512, 2048, 8192), ((8, 8, 64), (8, 2, 64), (2, 2, 128)), (1 / 16, 1 / 4)
#: The most that the pick may take, of the fastest engine's time.
SLACK = 1.1


def cases(lengths: Sequence[int]) -> Iterator[tuple[str, AttentionCall, bool]]:
    """Yield names, calls, and whether the selection is the same object in every call."""
    for n, (heads, kv_heads, dim), budget in itertools.product(lengths, SIZES, BUDGETS):
        random = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, h, n, dim, generator=random) for h in (heads, kv_heads, kv_heads))
        about = f"N={n}, {heads}/{kv_heads} heads of {dim}, {budget:.3g}"
        for key, cls in sparse_operators().items():
            op = made(cls, budget, n, heads, kv_heads, dim)
            if isinstance(op, Selective):
                causal = is_causal(op)
                first, second = (op.selection(q, k, causal, dim**-0.5) for _ in range(2))
                if first is None or second is None:
                    continue  # too short to choose
                call = AttentionCall(q, k, v, dim**-0.5, None, causal, first.for_heads(heads))
                yield f"{key}: {about}", call, first is second and call.selected is first
        for key, own in (("tiles by head", heads), ("shared tiles", 1)):
            chosen = torch.rand(1, own, n // 64, n // 64, generator=random) < budget
            tiles = Blocks(chosen | torch.eye(n // 64, dtype=torch.bool), (64, 64), n, n)
            yield f"{key}: {about}", AttentionCall(q, k, v, dim**-0.5, None, True, tiles), False


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calibrate", action="store_true", help="measure this machine first, and keep its rates")
    parser.add_argument("--flex", action="store_true", help="with the compiled engine, for calls that come often")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.calibrate:
        calibrate()
    rows, others = [], 0
    for name, call, is_static in cases(options.lengths):
        able = able_engines(call, options.flex)
        if len(able) > 1:
            rows.append({"case": name} | compared(call, measured(call, able, is_static, options.rounds)))
        else:
            others += 1
    right = [row["ms"] <= SLACK * row["fastest ms"] for row in rows]
    pick, fastest = (sum(row[name] for row in rows) for name in ("ms", "fastest ms"))
    ratios = {
        "auto within 10 % of the fastest engine, share of cases (goal 0.9)": sum(right) / len(rows),
        "cases": len(rows), "cases of one engine, left out": others, "time of auto / of the fastest": pick / fastest,
        "predicted time off by, median": statistics.median(abs(row["predicted"] / row["ms"] - 1) for row in rows),
    }  # fmt: skip
    finish([row for row, good in zip(rows, right, strict=True) if not good], ratios)


def able_engines(call: AttentionCall, with_flex: bool) -> list[str]:
    """Return the engines that `auto` chooses among."""
    often = with_flex and call.n_queries >= engines.LONG
    names = ("slices", "gather", "flex") if often else ("slices", "gather")
    return [name for name in names if engines.ENGINES[name].refuses(call) is None]


def measured(call: AttentionCall, able: list[str], is_static: bool, rounds: int) -> dict[str, float]:
    """Return the seconds of engines that take turns."""

    def run(engine: str) -> torch.Tensor:
        fresh = call if is_static else replace(call, selected=replace(call.selected))  # type: ignore[type-var]
        return engines.ENGINES[engine].attend(fresh)

    with torch.inference_mode():
        return interleaved({engine: functools.partial(run, engine) for engine in able}, rounds)


def compared(call: AttentionCall, seconds: dict[str, float]) -> dict[str, object]:
    """Return what `auto` picks, and the fastest engine."""
    engines._came = Counter({engines._kind(call): engines.OFTEN if "flex" in seconds else 0})
    pick, fastest = engines.choose(call)[0], min(seconds, key=lambda engine: seconds[engine])
    return {
        "pick": pick, "ms": 1e3 * seconds[pick], "predicted": 1e3 * (engines.seconds(call, pick) or 0.0),
        "fastest": fastest, "fastest ms": 1e3 * seconds[fastest],
    }  # fmt: skip


if __name__ == "__main__":
    main()
