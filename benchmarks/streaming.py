"""Decoding with a state of constant size: time per token at three places of a stream, for every such operator we have.

Goals: the time does not depend on the place (within 15 %), and neither do the bytes of the state. The prompt before
each place is taken in one call of `prefill`, and the places are timed in turns. Softmax attention, whose cache grows
with every token, is shown beside them. The sizes are small (4 heads of 32 channels): Python's share is large, as it is
in decoding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from _report import finish, interleaved
from foveate.core.catalog import systems
from foveate.ops import Operator
from foveate.ops.base.kv_state import KVState

HEADS, WIDTH, STEPS, FLAT = 4, 32, 64, 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", type=int, nargs="+", default=[0, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--operators", nargs="+", help="only these keys")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = [], {}
    for key, op in streams(options.operators):
        agree(key, op)
        states = {place: after(op, place) for place in options.places}
        sizes = {place: state_bytes(state) for place, state in states.items()}
        seconds = interleaved({str(n): decoding(op, state) for n, state in states.items()}, options.repeats)
        first, last = options.places[0], options.places[-1]
        growth = seconds[str(last)] / seconds[str(first)]
        rows.append(
            {"operator": key}
            | {f"us per token at {n}": seconds[str(n)] / STEPS * 1e6 for n in options.places}
            | {"last / first": growth, "state (bytes)": sizes[last]}
        )
        goal = "a growing cache" if key == "softmax" else f"goal {FLAT}"
        ratios[f"{key}: time per token at {last} / at {first} ({goal})"] = growth
        if key != "softmax":
            assert len(set(sizes.values())) == 1, (key, sizes)
            ratios[f"{key}: bytes of the state at {last} / at {first}"] = sizes[last] / sizes[first]
    finish(rows, ratios)


def streams(wanted: list[str] | None) -> Iterator[tuple[str, Operator]]:
    """The operators that keep no cache, and softmax attention."""
    for row in systems("ops"):
        cls = row.load()
        if not (isinstance(cls, type) and issubclass(cls, Operator)) or cls.capabilities.streaming != "exact":
            continue
        torch.manual_seed(0)
        op = cls.example(HEADS, WIDTH, 64).eval()
        if (row.key in wanted) if wanted else (row.key == "softmax" or keeps_no_cache(op)):
            yield row.key, op


def keeps_no_cache(op: Operator) -> bool:
    return op.state_type is not KVState and state_bytes(after(op, 9)) == state_bytes(after(op, 1))


def tokens(n: int) -> list[Tensor]:
    drawn = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0))
    return list(drawn.unbind())


@torch.inference_mode()
def agree(key: str, op: Operator, prompt: int = 60, n: int = 70) -> None:
    """The gate: a prompt and then steps give what one causal call gives."""
    q, k, v = tokens(n)
    state, whole = op.prefill(*(x[:, :, :prompt] for x in (q, k, v)))[1], op(q, k, v, causal=True)
    for t in range(prompt, n):
        y, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        error = ((y - whole[:, :, t : t + 1]).norm() / whole[:, :, t : t + 1].norm()).item()
        assert error < 1e-2, (key, t, error)  # signs of errors (Miras) blow rounding up


@torch.inference_mode()
def after(op: Operator, place: int) -> Any:
    return op.prefill(*tokens(max(place, 1)))[1]


def decoding(op: Operator, state: Any) -> Callable[[], None]:
    each = [x.split(1, 2) for x in tokens(STEPS)]

    @torch.inference_mode()
    def work() -> None:
        now = state
        for token in zip(*each, strict=True):
            _, now = op.step(*token, now)

    return work


def state_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if is_dataclass(state):
        return sum(state_bytes(getattr(state, each.name)) for each in fields(state))
    return sum(map(state_bytes, state)) if isinstance(state, tuple | list) else 0


if __name__ == "__main__":
    main()
