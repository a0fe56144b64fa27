"""Six engines that compute an attention call, the choice among them, and the plan of its cost.

`run(call, "auto")` picks an engine by the call's features, shape, device and dtype; `plan` returns the pick and the
reason. Among the engines for blocks on a CPU the pick is the one whose predicted time is least: the call's work at the
machine's rates (`foveate.core.engines.machine`). An engine that the caller names and that cannot compute the call
raises `UnsupportedEngine`; no other engine replaces it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from foveate.core.call import AttentionCall, Plan, cost
from foveate.core.engines import chunked, flex, fused, gather, machine, reference, slices
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

#: Least queries for which compiling FlexAttention may pay off on a CPU, and least earlier calls of the same kind.
LONG, OFTEN = 4096, 3
#: Pairs of queries and keys above which the whole matrix is not worth its memory.
WHOLE = 1 << 20

#: Count of long calls with blocks per head, by kind: FlexAttention may serve them.
_came: Counter[tuple[object, ...]] = Counter()


def run(call: AttentionCall, engine: str = "auto") -> Tensor:
    """Return the output `(B, Hq, Nq, Dv)` of a validated call."""
    name, _ = choose(call, engine)
    if call.is_empty:
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])
    if engine == "auto" and _may_repay(call):
        _count(call, name)
    if name in ("reference", "chunked"):
        return ENGINES[name].attend(_widened(call)).to(call.q.dtype)
    if not call.hides_keys:
        return ENGINES[name].attend(call)
    try:
        return _guarded(call, name)
    except flex.NotCompiled:
        if engine != "auto":
            raise
        return _guarded(call, "gather")


def _widened(call: AttentionCall) -> AttentionCall:
    """Cast the call to a dtype in which matrix products are fast; fused kernels do this themselves."""
    dtype = multiplying(call.q.dtype, call.q.device)
    if dtype == call.q.dtype:
        return call
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


def _guarded(call: AttentionCall, name: str) -> Tensor:
    """Run a fused kernel, and compute again where garbage in hidden keys or values has reached its output.

    Fused kernels let 0 * NaN through. Garbage may reach the gradient and not the output, so calls that want a gradient
    check keys and values first.
    """
    if not call.wants_grad:
        out = ENGINES[name].attend(call)
        if call.shows_no_garbage(out) or not call.has_garbage():
            return out
    elif not call.has_garbage():
        return ENGINES[name].attend(call)
    return ENGINES["chunked" if chunked.refuses(call) is None else "reference"].attend(call)


def plan(call: AttentionCall, engine: str = "auto") -> Plan:
    """Return the engine that `run` would use, and the cost."""
    name, why = choose(call, engine)
    return replace(cost(call, name, why), seconds=seconds(call, name))


def seconds(call: AttentionCall, engine: str) -> float | None:
    """Return the predicted time of a call on an engine, as `Plan.seconds`."""
    count = getattr(ENGINES[engine], "work", None)
    if count is None or call.q.device.type != "cpu" or has_shapes_alone(call.q) or call.is_empty:
        return None
    rates = machine.current().rate(engine, call.q.dtype, call.wants_grad)
    work = None if rates is None else count(call)
    return None if rates is None or work is None else work.seconds(rates)


def choose(call: AttentionCall, engine: str = "auto") -> tuple[str, str]:
    """Return the engine's name and the reason for it."""
    if engine != "auto":
        if engine not in ENGINES:
            raise unknown("engine", engine, [*ENGINES, "auto"])
        reason = ENGINES[engine].refuses(call)
        if call.chunk is not None and engine not in ("chunked", "reference"):
            reason = "the call names the chunks to compute it in"
        if reason is not None:
            raise UnsupportedEngine(f'engine="{engine}" cannot run this call: {reason}; use engine="auto"')
        return engine, "named by the caller"
    if call.chunk is not None:
        return "chunked", f"in chunks of {call.chunk[0]} queries and {call.chunk[1]} keys, as given"
    if call.selection is not None and call.is_plain and not call.dropout:
        return _sparse(call)
    if fused.refuses(call) is None:
        return "fused", "softmax over dot products: PyTorch's fused kernel"
    if chunked.refuses(call) is None and call.n_queries * call.n_keys > WHOLE:
        return "chunked", "a scoring that no fused kernel computes, and a matrix too large to keep"
    return "reference", "a scoring that no fused kernel computes, and a matrix small enough to keep"


def _sparse(call: AttentionCall) -> tuple[str, str]:
    selection = call.selection
    if has_shapes_alone(call.q):
        return "reference", "shapes alone"
    if not isinstance(selection, Blocks):
        return "gather", "chosen keys gathered"
    if call.q.device.type != "cpu":
        reason = flex.refuses(call)
        return ("flex", "blocks, compiled") if reason is None else ("gather", f"chosen keys gathered: {reason}")
    if call.n_queries < slices.FEW or call.is_empty:
        return "gather", "chosen keys gathered for a few queries"
    repeats = _came[_kind(call)] >= OFTEN and _may_repay(call)
    names = ["slices", "gather", *(["flex"] if repeats else [])]
    took = {name: found for name in names if (found := seconds(call, name)) is not None}
    name = min(took, key=lambda each: took[each])
    others = ", ".join(f"{each} {1e3 * took[each]:.3g} ms" for each in took if each != name)
    return name, f"{_about(name, call, selection)}; {1e3 * took[name]:.3g} ms predicted, {others}"


def _about(name: str, call: AttentionCall, selection: Blocks) -> str:
    """Return how an engine computes blocks."""
    if name == "slices":
        held, chosen = slices.pairs(selection, call.causal), _chosen(selection, call.causal)
        return f"fused slices of keys, of which {chosen / max(held, 1):.0%} are chosen"
    if name == "flex":
        return f"blocks per head over {call.n_queries} queries, in a call of a kind that keeps coming back"
    return f"chosen keys gathered: {_against_flex(call)}"


def _against_flex(call: AttentionCall) -> str:
    if call.n_queries < LONG:
        return f"{call.n_queries} queries are too few to repay compiling FlexAttention"
    return flex.refuses(call) or f"FlexAttention is compiled for calls that have come {OFTEN} times"


def _chosen(selection: Blocks, causal: bool) -> float:
    """Count the pairs of one head that lie in chosen tiles."""
    return (selection.without_future if causal else selection).keys_read() * selection.n_queries


def _may_repay(call: AttentionCall) -> bool:
    """Return True if compiled FlexAttention can serve this call on a CPU, in which every head has blocks of its own.

    For blocks that all heads share, as a window's, slices need no compiling.
    """
    blocks = call.selection.blocks if isinstance(call.selection, Blocks) else None
    long = blocks is not None and blocks.shape[1] > 1 and call.n_queries >= LONG
    return long and call.q.device.type == "cpu" and flex.refuses(call) is None


def _kind(call: AttentionCall) -> tuple[object, ...]:
    """Return the key of the compiled kernel that serves a call; one kernel serves many lengths."""
    q, k, selection = call.q, call.k, call.selection
    assert isinstance(selection, Blocks)
    shapes = *q.shape[:2], k.shape[1], q.shape[3], call.v.shape[3], *flex.rounded_lengths(call)
    return shapes, q.dtype, selection.size, call.causal


def _count(call: AttentionCall, name: str) -> None:
    kind = _kind(call)
    _came[kind] += 1
    if name == "flex" and _came[kind] == OFTEN + 1:
        warnings.warn(
            f"compiling FlexAttention, once, for calls with {call.q.shape[1]} heads over blocks of their own; "
            'engine="gather" does without',
            stacklevel=3,
        )
