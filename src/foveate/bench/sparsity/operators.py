"""The sparse operators of the catalogue, and the share of pairs that they choose."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core import validate
from foveate.core.catalog import systems
from foveate.core.errors import FoveateError, OptionError, unknown
from foveate.ops.base.selective import Selective
from foveate.ops.calls import sized
from foveate.ops.operator import Operator

#: Tokens of the call by whose plan an operator is known as sparse, and the share of keys that it is asked to read.
_TRIAL, _SHARE = 512, 0.25
#: Places over the queries, and queries at each of them, where chosen pairs are counted.
_PLACES, _QUERIES = 16, 16


def sparse_operators(only: Iterable[str] | None = None) -> dict[str, type[Operator]]:
    """Return the operators of the catalogue that attend to chosen keys alone, by key.

    Those are all that select keys, and others whose plan for 512 tokens computes less than all visible pairs.

    Raises:
        UnknownKey: if `only` names another one.
    """
    found = {row.key: cls for row in systems("ops") if isinstance(cls := row.load(), type) and _is_sparse(cls)}
    if only is None:
        return found
    for key in only:
        if key not in found:
            raise unknown("sparse operator", key, found)
    return {key: found[key] for key in only}


def _is_sparse(cls: type) -> bool:
    if not issubclass(cls, Operator):
        return False
    if issubclass(cls, Selective):
        return True
    try:
        op, x = made(cls, _SHARE, _TRIAL, heads=2, kv_heads=2, width=16), torch.zeros(1, 2, _TRIAL, 16)
        return op.plan(x, x, x, causal=is_causal(op)).density < 1
    except FoveateError:  # it does not take such a call
        return False


def is_causal(op: Operator) -> bool:
    """Return whether an operator is compared in the causal pattern, which it is where it has one."""
    return "causal self" in op.capabilities.patterns


def made(cls: type[Operator], budget: float, length: int, heads: int, kv_heads: int, width: int) -> Operator:
    """Make the operator that reads about this share of the keys, or its default where no option controls that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return cls.at_budget(budget, length)
        except (TypeError, OptionError):  # its options depend on the sizes of the call
            return sized(cls, heads, width, width, kv_heads)


@torch.no_grad()
def chosen_share(op: Operator, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return the share of the visible pairs that an operator attends to, counted at places evenly over the queries.

    Of an operator that shows no selection it is the share of its plan.
    """
    causal = is_causal(op)
    if not isinstance(op, Selective):
        return op.plan(q, k, v, causal=causal).density
    scale = validate.scale(op.capabilities.default_scale, q.shape[-1])
    selection, n, seen, visible = op.selection(q, k, causal, scale), q.shape[2], 0.0, 0.0
    if selection is None:
        return 1.0
    for place in range(_PLACES):
        first = place * n // _PLACES
        rows = slice(first, min(first + _QUERIES, (place + 1) * n // _PLACES))
        past = _past(rows, n, q.device) if causal else torch.ones(1, n, dtype=torch.bool, device=q.device)
        seen += float((selection.dense(rows) & past).double().mean((0, 1)).sum())
        visible += float(past.expand(rows.stop - rows.start, n).sum())
    return seen / max(visible, 1)


def _past(rows: slice, n: int, device: torch.device) -> Bool[Tensor, "q n"]:
    at = torch.arange(n, device=device)
    return at <= at[rows, None]
