"""SnapKV: its score by hand, its limits, and what its window and its pool are good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import TOVA, RandomKeep, SinkRecent, SnapKV
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import feed, model, tokens
from tests.systems.kv.test_score_policies import N, best, kept, seen

W = 6


def by_hand(weights: Tensor, pool: int, pooling: str, group: str) -> Tensor:
    """The score `(Hkv, N)` of weights `(1, Hkv, G, N, N)`: a mean over the window's queries, pooled, then grouped."""
    window = weights[0, :, :, -W:, :-W].mean(2)
    out = torch.zeros_like(window)
    padded = F.pad(window, (pool // 2, pool // 2))
    for at in range(window.shape[-1]):
        part = padded[..., at : at + pool]
        out[..., at] = part.mean(-1) if pooling == "mean" else part.amax(-1)
    grouped = {"mean": out.mean(1), "max": out.amax(1), "sum": out.sum(1)}[group]
    return F.pad(grouped, (0, W))


@pytest.mark.parametrize("pool, pooling", [(1, "mean"), (3, "mean"), (5, "max")])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_the_window_votes_for_what_came_before_it(pool: int, pooling: Any, group: Any) -> None:
    llama, ids = model("llama"), tokens(1, N)
    expected = best(by_hand(seen(llama, ids)[1], pool, pooling, group), N // 2, range(N - W, N))
    assert kept(llama, ids, SnapKV(share=0.5, recent=W, pool=pool, pooling=pooling, group=group))[0] == expected
    assert expected[0] != expected[1]


@torch.no_grad()
def test_all_of_them_is_the_model() -> None:
    ids = tokens(2, N + 6)
    plain = feed(model("llama"), ids, torch.ones_like(ids), [N, *[1] * 6])
    with apply(model("llama"), SnapKV(share=1.0, recent=W)):
        assert torch.equal(feed(model("llama"), ids, torch.ones_like(ids), [N, *[1] * 6]), plain)


@pytest.mark.parametrize("recent", [10, 11, 64])
def test_a_window_that_fills_the_budget_is_all_that_stays(recent: int) -> None:
    llama, ids = model("llama"), tokens(1, N)
    assert kept(llama, ids, SnapKV(share=0.25, recent=recent)) == [[[*range(N - 10, N)]] * 2] * 3
    assert kept(llama, ids, SnapKV(share=0.25, recent=recent)) == kept(llama, ids, SinkRecent(0, 10))


def test_of_one_query_and_one_head_it_is_tova() -> None:
    """Both then rank tokens by the last query's weights."""
    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), tokens(1, N)
    assert kept(single, ids, SnapKV(share=0.3, recent=1, pool=1)) == kept(single, ids, TOVA(share=0.3))
    assert kept(single, ids, SnapKV(share=0.3, recent=2, pool=1)) != kept(single, ids, TOVA(share=0.3))


def right(policy: Method, ids: Tensor, answers: Tensor) -> float:
    """The share of answers' tokens that a model gives, whose prompts end in the question."""
    lm = induction_lm()
    with apply(lm, policy):
        return accuracy(lm, ids, answers)


def test_the_end_of_a_prompt_knows_what_is_asked_for(claim: ClaimFixture) -> None:
    """The prompt's own pass answers the first of four tokens; the others need what was kept."""
    ids, answers = recall(16, length=128, answer=4, distractors=6, away=24)
    ours = right(SnapKV(share=0.15, sink=1, recent=4, pool=7), ids, answers)
    for name, other in (
        ("sinks and recent tokens, as many", SinkRecent(1, 18)),
        ("random tokens, as many", RandomKeep(share=0.15, sink=1, recent=4)),
    ):
        claim(
            "the queries at a prompt's end choose what the answer needs: its tokens that are right, at 15 %",
            ours=ours, baseline=right(other, ids, answers), better="higher", margin=0.4, baseline_name=name, seed=0,
        )  # fmt: skip


def test_a_pool_keeps_the_neighbours(claim: ClaimFixture) -> None:
    """The question attends to the first token of an answer of three; the others are attended to while answering."""
    ids, answers = recall(16, length=128, answer=3, away=24)
    options: dict[str, Any] = {"share": 0.15, "sink": 1, "recent": 4}
    claim(
        "pooled scores keep whole clusters: tokens of three-token answers that are right, at 15 % of the cache",
        ours=right(SnapKV(pool=5, **options), ids, answers), baseline=right(SnapKV(pool=1, **options), ids, answers),
        better="higher", margin=0.3, baseline_name="the same scores without a pool", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recent": 0}, "recent=0"),
        ({"pool": 0}, "pool=0"),
        ({"pool": 4}, "pool=4 must be odd"),
        ({"pooling": "sum"}, "pooling='sum'"),
        ({"group": "x"}, "group='x'"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        SnapKV(**options)
