"""A plan's cost of one pair, for the tests of systems whose score is not a dot product."""

from __future__ import annotations

import torch

from foveate.ops.operator import Operator

HEADS, WIDTH, VALUES, QUERIES, KEYS = 2, 16, 7, 10, 20


def score_products(op: Operator) -> float:
    """Return the multiply-adds that the plan counts for the score of one pair, with 2 heads of width 16."""
    q, k, v = torch.zeros(1, HEADS, QUERIES, WIDTH), torch.zeros(1, 2, KEYS, WIDTH), torch.zeros(1, 2, KEYS, VALUES)
    causal = "self" not in op.capabilities.patterns
    pairs = QUERIES * KEYS - (QUERIES * (QUERIES - 1) // 2 if causal else 0)
    return op.plan(q, k, v, causal=causal).flops / (2 * HEADS * pairs) - VALUES
