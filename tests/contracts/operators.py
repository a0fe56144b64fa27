"""The operators of the catalogue, and the calls of their contract.

The declared capabilities (`patterns`, `masks`, `engines`, `streaming`) decide the cases: a case that does not apply is
not collected, so that no test is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foveate.core import masks
from foveate.core.catalog import systems
from foveate.core.errors import UnsupportedEngine
from foveate.ops.dense.reversed_attention import ReversedAttention
from foveate.ops.linear.inline import InLine
from foveate.ops.linear.relu_linear import ReLULinear
from foveate.ops.operator import MaskKind, Operator, Pattern
from foveate.ops.sparse.dynamic_mask import ImportantKeys
from tests.support.tensors import qkv

HEADS, KV_HEADS, WIDTH = 4, 2, 8
LENGTHS: dict[Pattern, tuple[int, int]] = {
    "self": (12, 12), "causal self": (12, 12), "cross": (9, 12), "causal cross": (9, 12),
}  # fmt: skip

#: Operators inside layers of the catalogue: they have no row of their own, and keep the same contract.
INSIDE: dict[str, type[Operator]] = {
    "inline": InLine, "relu_linear": ReLULinear, "reversed_attention": ReversedAttention,
    "important_keys": ImportantKeys,
}  # fmt: skip

CLASSES: dict[str, type[Operator]] = {
    row.key: found
    for row in systems("ops")
    if isinstance(found := row.load(), type) and issubclass(found, Operator)
} | INSIDE  # fmt: skip


def example(key: str, length: int = 12, heads: int = HEADS, width: int = WIDTH) -> Operator:
    """Make the operator's own example, always with the same parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLASSES[key].example(heads, width, length).double()


def exact(key: str, length: int) -> Operator | None:
    limit = CLASSES[key].exact(HEADS, WIDTH, length)
    return None if limit is None else limit.double()


def twin(key: str) -> str:
    """Return the reference engine of an operator."""
    return "reference" if "reference" in CLASSES[key].capabilities.engines else "recurrent"


@dataclass(frozen=True)
class Call:
    """One way to call one operator."""

    key: str
    pattern: Pattern
    mask_kind: MaskKind | None = None
    engine: str = "auto"

    @property
    def causal(self) -> bool:
        return self.pattern.startswith("causal")

    @property
    def lengths(self) -> tuple[int, int]:
        return LENGTHS[self.pattern]

    @property
    def shift(self) -> int:
        """The first query's position among the keys."""
        return self.lengths[1] - self.lengths[0]

    @property
    def mask(self) -> Tensor | None:
        return None if self.mask_kind is None else a_mask(self.mask_kind, *self.lengths)

    def tensors(self, **options) -> tuple[Tensor, Tensor, Tensor]:
        return qkv(*self.lengths, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, **options)

    def __call__(self, op: Operator, q: Tensor, k: Tensor, v: Tensor, engine: str | None = None, **inputs) -> Tensor:
        return op(q, k, v, mask=self.mask, causal=self.causal, engine=engine or self.engine, **inputs)

    def is_accepted(self, op: Operator, dtype: torch.dtype = torch.float64) -> bool:
        try:
            op.plan(*self.tensors(dtype=dtype), mask=self.mask, causal=self.causal, engine=self.engine)
        except UnsupportedEngine:
            return False
        return True

    def __str__(self) -> str:
        return "-".join(
            part.replace(" ", "_") for part in (self.key, self.pattern, self.mask_kind, self.engine) if part
        )


#: Keys that every mask below hides from every query.
HIDDEN = (2, 5)


def a_mask(kind: MaskKind, n_queries: int, n_keys: int) -> Tensor:
    """Make a mask of the kind that hides some keys from all queries.

    "pairs" and "bias" also have a query that sees nothing.
    """
    random = torch.Generator().manual_seed(3)
    if kind == "keys":
        seen = torch.ones(2, 1, 1, n_keys, dtype=torch.bool)
        seen[1, ..., 0] = False
    else:
        seen = torch.rand(2, HEADS, n_queries, n_keys, generator=random) > 0.3
        seen[:, :, n_queries // 2] = False
    seen[..., list(HIDDEN)] = False
    if kind != "bias":
        return seen
    bias = torch.randn(seen.shape, generator=random, dtype=torch.float64)
    return bias.masked_fill(~seen, masks.NEG_INF)


def calls(key: str) -> Iterator[Call]:
    """Return a call for every pattern and mask kind that the operator declares."""
    cls = CLASSES[key]
    for pattern in sorted(cls.capabilities.patterns):
        for kind in (None, *sorted(cls.capabilities.masks)):
            yield Call(key, pattern, kind)


def over(cases: Iterator[Call] | list[Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", list(cases), ids=str)


def each_call(*, masked: bool = False) -> pytest.MarkDecorator:
    """Parametrise over every pattern with every kind of mask and, unless `masked`, without one."""
    return over(call for key in CLASSES for call in calls(key) if call.mask_kind or not masked)


def each_pattern(*, causal: bool = False) -> pytest.MarkDecorator:
    """Parametrise over every pattern without a mask, or only over the causal ones."""
    return over(call for key in CLASSES for call in calls(key) if not call.mask_kind and (call.causal or not causal))


def each_engine(*, at_limit: bool) -> pytest.MarkDecorator:
    """Parametrise over every call on every engine that takes it, at the exact limit or in the example."""
    found = []
    for key, cls in CLASSES.items():
        for call in calls(key):
            op = exact(key, call.lengths[1]) if at_limit else example(key)
            for engine in cls.capabilities.engines if op is not None else ():
                named = Call(key, call.pattern, call.mask_kind, engine)
                if (at_limit or engine != twin(key)) and named.is_accepted(op):
                    found.append(named)
    return over(found)


def each_causal_engine() -> pytest.MarkDecorator:
    """Parametrise over every causal pattern, with and without a mask of keys, on every engine that takes it.

    Operators whose queries all choose together are left out if they have no reference: garbage changes their choice.
    """
    found = []
    for key, cls in CLASSES.items():
        if cls.capabilities.selection_group is None and "reference" not in cls.capabilities.engines:
            continue
        for call in calls(key):
            for engine in (
                ("auto", *cls.capabilities.engines) if call.causal and call.mask_kind in (None, "keys") else ()
            ):
                named = Call(key, call.pattern, call.mask_kind, engine)
                if named.is_accepted(example(key)):
                    found.append(named)
    return over(found)


def on_flex() -> pytest.MarkDecorator:
    """Parametrise over calls for compiled FlexAttention, separately since it takes only float32."""
    keys = [key for key, cls in CLASSES.items() if "flex" in cls.capabilities.engines]
    cases = (Call(key, pattern, None, "flex") for key in keys for pattern in sorted(CLASSES[key].capabilities.patterns))
    return over(call for call in cases if call.is_accepted(example(call.key), torch.float32))


def each_operator(where=lambda cls: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("key", [key for key, cls in CLASSES.items() if where(cls)])


def main_call(key: str) -> Call:
    """Return a call of the operator's simplest pattern."""
    return next(
        Call(key, pattern)
        for pattern in ("self", "causal self", *LENGTHS)
        if pattern in CLASSES[key].capabilities.patterns
    )
