"""Who computes an attention call: five engines, one choice, and what it costs.

`run(problem, "auto")` picks by what is asked, shape, device and dtype; `plan` says what would be picked and why. An
engine named by the caller that cannot do the job raises `UnsupportedEngine`; nothing else is run in its place.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from foveate.core.engines import chunked, flex, fused, gather, reference
from foveate.core.errors import UnsupportedEngine, unknown
from foveate.core.problem import Plan, Problem, cost
from foveate.core.selection import Blocks

ENGINES: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "fused": fused,
    "flex": flex,
    "gather": gather,
}

#: Keys from which compiling FlexAttention repays on a CPU, and from which the whole matrix is not worth its memory.
LONG, WHOLE = 4096, 1 << 20


def run(problem: Problem, engine: str = "auto") -> Tensor:
    """The output `(B, Hq, Nq, Dv)` of a validated problem."""
    name, _ = choose(problem, engine)
    if problem.is_empty:
        return problem.q.new_zeros(*problem.q.shape[:3], problem.v.shape[-1])
    if name in ("reference", "chunked") or not problem.hides_keys:
        return ENGINES[name].attend(problem)
    try:
        return _guarded(problem, name)
    except flex.NotCompiled:
        if engine != "auto":
            raise
        return _guarded(problem, "gather")


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
    reason = flex.refuses(problem)
    if isinstance(problem.selection, Blocks) and reason is None:
        if problem.n_queries >= LONG or problem.q.device.type == "cuda":
            return "flex", f"blocks over {problem.n_queries} queries: long enough to repay compiling"
        reason = f"{problem.n_queries} queries are too few to repay compiling FlexAttention"
    return "gather", f"chosen keys gathered: {reason}" if reason else "chosen keys gathered"
