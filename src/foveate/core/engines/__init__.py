"""Who computes an attention call: six engines, one choice, and what it costs.

`run(problem, "auto")` picks by what is asked, shape, device and dtype; `plan` says what would be picked and why. An
engine named by the caller that cannot do the job raises `UnsupportedEngine`; nothing else is run in its place.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from foveate.core.call import Plan, Problem, cost
from foveate.core.engines import chunked, flex, fused, gather, reference, slices
from foveate.core.errors import UnsupportedEngine, unknown
from foveate.core.precision import multiplying
from foveate.core.readable import has_shapes_alone
from foveate.core.selection import Blocks

ENGINES: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "fused": fused,
    "flex": flex,
    "gather": gather,
    "slices": slices,
}

#: Queries from which compiling FlexAttention may repay on a CPU, and how often a call of the kind has to come before.
LONG, OFTEN = 4096, 3
#: Pairs of queries and keys from which the whole matrix is not worth its memory.
WHOLE = 1 << 20
#: Pairs that slices may hold for each one chosen: beyond, gathering the chosen keys is cheaper.
SPREAD = 1.5

#: How often long calls with blocks per head came, by kind: those that FlexAttention may serve.
_came: Counter[tuple[object, ...]] = Counter()


def run(problem: Problem, engine: str = "auto") -> Tensor:
    """The output `(B, Hq, Nq, Dv)` of a validated problem."""
    name, _ = choose(problem, engine)
    if problem.is_empty:
        return problem.q.new_zeros(*problem.q.shape[:3], problem.v.shape[-1])
    if engine == "auto" and name in ("gather", "flex") and _may_repay(problem):
        _count(problem, name)
    if name in ("reference", "chunked"):
        return ENGINES[name].attend(_widened(problem)).to(problem.q.dtype)
    if not problem.hides_keys:
        return ENGINES[name].attend(problem)
    try:
        return _guarded(problem, name)
    except flex.NotCompiled:
        if engine != "auto":
            raise
        return _guarded(problem, "gather")


def _widened(problem: Problem) -> Problem:
    """The problem in numbers that plain matrix products are fast for; fused kernels see to that themselves."""
    dtype = multiplying(problem.q.dtype, problem.q.device)
    if dtype == problem.q.dtype:
        return problem
    return replace(problem, q=problem.q.to(dtype), k=problem.k.to(dtype), v=problem.v.to(dtype))


def _guarded(problem: Problem, name: str) -> Tensor:
    """Fused kernels let 0 * NaN through: what they give stands unless it shows that, and keys or values are the cause.

    The gradient may suffer where the output does not, so that keys and values are looked at first where one is wanted.
    """
    if not problem.wants_grad:
        out = ENGINES[name].attend(problem)
        if problem.shows_no_garbage(out) or not problem.has_garbage():
            return out
    elif not problem.has_garbage():
        return ENGINES[name].attend(problem)
    return ENGINES["chunked" if chunked.refuses(problem) is None else "reference"].attend(problem)


def plan(problem: Problem, engine: str = "auto") -> Plan:
    """What `run` would do, and what it costs."""
    return cost(problem, *choose(problem, engine))


def choose(problem: Problem, engine: str = "auto") -> tuple[str, str]:
    """The engine's name and the reason for it."""
    if engine != "auto":
        if engine not in ENGINES:
            raise unknown("engine", engine, [*ENGINES, "auto"])
        reason = ENGINES[engine].refuses(problem)
        if problem.chunk is not None and engine not in ("chunked", "reference"):
            reason = "the call names the chunks to compute it in"
        if reason is not None:
            raise UnsupportedEngine(f'engine="{engine}" cannot run this call: {reason}; use engine="auto"')
        return engine, "asked for"
    if problem.chunk is not None:
        return "chunked", f"in chunks of {problem.chunk[0]} queries and {problem.chunk[1]} keys, as asked for"
    if problem.selection is not None and problem.is_plain and not problem.dropout:
        return _sparse(problem)
    if fused.refuses(problem) is None:
        return "fused", "softmax over dot products: PyTorch's fused kernel"
    if chunked.refuses(problem) is None and problem.n_queries * problem.n_keys > WHOLE:
        return "chunked", "a scoring that no fused kernel computes, and a matrix too large to keep"
    return "reference", "a scoring that no fused kernel computes, and a matrix small enough to keep"


def _sparse(problem: Problem) -> tuple[str, str]:
    selection = problem.selection
    if has_shapes_alone(problem.q):
        return "reference", "shapes alone: nothing says how many keys are chosen"
    if not isinstance(selection, Blocks):
        return "gather", "chosen keys gathered"
    if problem.q.device.type != "cpu":
        reason = flex.refuses(problem)
        return ("flex", "blocks, compiled") if reason is None else ("gather", f"chosen keys gathered: {reason}")
    if problem.n_queries < slices.FEW:
        return "gather", "chosen keys gathered for a few queries"
    held, chosen = slices.pairs(selection, problem.causal), _chosen(selection, problem.causal)
    if held <= SPREAD * chosen:
        return "slices", f"fused slices of keys, of which {chosen / max(held, 1):.0%} are chosen"
    if _came[_kind(problem)] >= OFTEN and _may_repay(problem):
        return "flex", f"blocks per head over {problem.n_queries} queries, in a call of a kind that keeps coming back"
    return "gather", f"chosen keys gathered: {_against_flex(problem)}"


def _against_flex(problem: Problem) -> str:
    if problem.n_queries < LONG:
        return f"{problem.n_queries} queries are too few to repay compiling FlexAttention"
    return flex.refuses(problem) or f"FlexAttention is compiled for calls that have come {OFTEN} times"


def _chosen(selection: Blocks, causal: bool) -> float:
    """Pairs of one head that lie in chosen tiles."""
    return (selection.without_future if causal else selection).keys_read() * selection.n_queries


def _may_repay(problem: Problem) -> bool:
    """Whether compiled FlexAttention would serve this call on a CPU."""
    long = isinstance(problem.selection, Blocks) and problem.n_queries >= LONG
    return long and problem.q.device.type == "cpu" and flex.refuses(problem) is None


def _kind(problem: Problem) -> tuple[object, ...]:
    """What one compiled kernel serves: many lengths."""
    q, k, selection = problem.q, problem.k, problem.selection
    assert isinstance(selection, Blocks)
    shapes = *q.shape[:2], k.shape[1], q.shape[3], problem.v.shape[3], *flex.rounded_lengths(problem)
    return shapes, q.dtype, selection.size, problem.causal


def _count(problem: Problem, name: str) -> None:
    kind = _kind(problem)
    _came[kind] += 1
    if name == "flex" and _came[kind] == OFTEN + 1:
        warnings.warn(
            f"compiling FlexAttention, once, for calls with {problem.q.shape[1]} heads over blocks of their own; "
            'engine="gather" does without',
            stacklevel=3,
        )
