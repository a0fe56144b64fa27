"""What a plan says a call multiplies is what PyTorch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.ops.dense.attention_sdm import SparseDistributedMemory
from foveate.ops.dense.luong_attention import LuongAttention
from foveate.ops.dense.music_transformer import MusicTransformer
from foveate.ops.dense.neural_attention import NeuralAttention
from foveate.ops.dense.survey_attention import SurveyAttention
from foveate.ops.linear.linear import Linear
from foveate.ops.memory.memory import Memory
from foveate.ops.operator import Operator
from foveate.ops.sparse.hip import HiP
from foveate.ops.sparse.selective import Selective
from tests.contracts.operators import CLASSES, HEADS, WIDTH, example
from tests.tensors import qkv

N = 256
#: What chooses pairs is left out, for these engines compute them all; so is aaren, which merges numbers one by one.
KEYS = [key for key, cls in CLASSES.items() if not issubclass(cls, Selective) and key != "aaren"]


def counted(op: Operator, engine: str) -> tuple[float, float]:
    """Multiply-adds, counted as two, that PyTorch saw in a call, and those that its plan says."""
    causal = "self" not in op.patterns
    given = [x.float() for x in qkv(N, batch=1, heads=HEADS, kv_heads=HEADS, width=WIDTH)]
    inputs = {name: op.example_input(name, 1, HEADS, N).float() for name in op.inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        op(*given, causal=causal, engine=engine, **inputs)
    whole = causal and engine == "reference" and not isinstance(op, Linear)  # the plan counts the past alone
    return counter.get_total_flops(), op.plan(*given, causal=causal, engine=engine).flops * (2 * N / (N + 1)) ** whole


@pytest.mark.parametrize("key", [key for key in KEYS if "reference" in CLASSES[key].engines])
def test_a_plan_counts_what_is_multiplied(key: str) -> None:
    seen, planned = counted(example(key, N).float(), "reference")
    assert planned / 1.06 <= seen <= 1.06 * planned


@pytest.mark.parametrize("key", [key for key in KEYS if issubclass(CLASSES[key], Linear | Memory)])
def test_chunks_and_states_are_counted(key: str) -> None:
    seen, planned = counted(example(key, N).float(), "chunked")
    assert planned / 1.15 <= seen <= 1.15 * planned


OPTIONS = [
    (NeuralAttention(16, 6), 6 * 3 + 3),
    (NeuralAttention(16, 6, layers=1, activation="tanh"), 6),
    (MusicTransformer(2, 16), 2 * 16),
    (MusicTransformer(2, 16, time=8, pitch=4), 4 * 16),
    (LuongAttention(16, "concat", heads=2, hidden=5), 5),
    (LuongAttention(16, "general", heads=2), 16),
    (SparseDistributedMemory(16, 4, "neurons", neurons=40, generator=torch.Generator().manual_seed(0)), 40),
    (SparseDistributedMemory(16, 4, "binary"), 16),
    (SurveyAttention("additive", heads=2, head_dim=16, hidden=5), 5),
    (SurveyAttention("deep", heads=2, head_dim=16, hidden=5, depth=3), 5 + 2 * 25),
    (SurveyAttention("feature", heads=2, head_dim=16, hidden=5), 0),
]


@pytest.mark.parametrize(("op", "products"), OPTIONS, ids=lambda x: x.name if isinstance(x, Operator) else str(x))
def test_what_options_cost(op: Operator, products: int) -> None:
    """Per pair: the products of its score, and as many as there are channels of values."""
    q, k, v = torch.zeros(1, 2, 10, 16), torch.zeros(1, 2, 20, 16), torch.zeros(1, 2, 20, 7)
    causal = "self" not in op.patterns
    pairs = 10 * 20 - (45 if causal else 0)
    assert op.plan(q, k, v, causal=causal).flops == 2 * 2 * pairs * (products + 7)


def test_a_search_is_counted() -> None:
    """The tree that finds HiP's keys, for one query and for many."""
    q, k, v = (x.float() for x in qkv(N, batch=2, heads=HEADS, width=WIDTH))
    op = HiP(16, block_q=4)
    for queries in (1, N):
        mine = q[:, :, -queries:]
        with FlopCounterMode(display=False) as counter:
            op.selection(mine, k, True, 1.0)
        assert counter.get_total_flops() == 2 * op.choice_products(mine, k, True) > 0
    attended = 2 * 2 * HEADS * 16 * 2 * WIDTH  # one query of each of two texts: 16 keys and their values
    assert op.plan(q[:, :, -1:], k, v, causal=True).flops == attended + 2 * op.choice_products(q[:, :, -1:], k, True)
