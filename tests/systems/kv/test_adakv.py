"""AdaKV: budgets by hand, the limits, and what they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import H2O, AdaKV, KNorm, ScorePolicy, SnapKV
from tests.conftest import ClaimFixture
from tests.support.host_models import VOCAB, model, tokens
from tests.systems.kv.test_score_policies import best, kept, seen

N, SIZE = 40, 16


def snap(**options: Any) -> SnapKV:
    return SnapKV(**{"share": 0.4, "recent": 4, "pool": 1, **options})


def scores(llama: PreTrainedModel, ids: Tensor) -> Tensor:
    """SnapKV's scores of the first layer, with its window at infinity."""
    _, weights = seen(llama, ids)
    found = weights[0, :, :, -4:].mean((1, 2))
    found[:, -4:] = torch.inf
    return found


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5])
def test_budgets_are_mixed(safeguard: float) -> None:
    llama, spread = model("llama"), 0
    for seed in range(4):
        ids = tokens(1, N, seed)
        found = scores(llama, ids)
        chosen = found.flatten().sort(descending=True, stable=True).indices[: 2 * SIZE] // N
        budgets = [round((1 - safeguard) * int((chosen == head).sum()) + safeguard * SIZE) for head in range(2)]
        expected = [best(found, budget)[head] for head, budget in enumerate(budgets)]
        assert kept(llama, ids, AdaKV(snap(), safeguard=safeguard))[0] == expected
        spread = max(spread, abs(budgets[0] - budgets[1]))
    assert spread >= 2


def test_kvpress_sets_the_safeguard_apart() -> None:
    llama, ids = model("llama"), tokens(1, N)
    found = scores(llama, ids)
    for head, positions in enumerate(best(found, SIZE // 2)):
        found[head, positions] = torch.inf
    chosen = found.flatten().sort(descending=True, stable=True).indices[: 2 * SIZE]
    expected = [sorted((chosen[chosen // N == head] % N).tolist()) for head in range(2)]
    made = AdaKV(snap(), safeguard=0.5, variant="kvpress")
    assert kept(llama, ids, made)[0] == expected
    assert kept(llama, ids, made) == kept(llama, ids, snap(heads="adaptive", safeguard=0.5))


@pytest.mark.parametrize("base", [snap(), KNorm(share=0.3), H2O(share=0.3)], ids=lambda base: type(base).__name__)
def test_with_all_of_the_budget_safe_it_is_the_policy_that_it_wraps(base: ScorePolicy) -> None:
    assert kept(model("llama"), tokens(1, N), AdaKV(base, safeguard=1.0)) == kept(model("llama"), tokens(1, N), base)


class Watch(Method):
    """Notes the weights and values of the first layer, and its output projection."""

    def __init__(self) -> None:
        self.weights, self.v, self.project = torch.empty(0), torch.empty(0), torch.nn.Module()

    def edit_weights(self, site: Any, weights: Tensor) -> Tensor:
        if site.order == 0:
            self.weights, self.v, self.project = weights[0], site.v[0].clone(), site.module.o_proj
        return weights


@torch.no_grad()
def loss(lm: PreTrainedModel, policy: ScorePolicy, window: int = 4) -> float:
    """L1 distance of the first layer's output at the last queries from that over the tokens that are kept."""
    total = 0.0
    for seed in range(6):
        ids, watch = tokens(1, 160, seed), Watch()
        with apply(lm, watch):
            lm(ids)
        heads, weights = kept(lm, ids, policy)[0], watch.weights[:, -window:]
        holds = torch.zeros_like(weights)
        for head, positions in enumerate(heads):
            holds[head, :, positions] = 1.0
        without = weights * holds / (weights * holds).sum(-1, keepdim=True)
        total += float(watch.project(((weights - without) @ watch.v).transpose(0, 1).flatten(1)).abs().sum(-1).mean())
    return total / 6


def test_budgets_by_need_lose_less_of_the_output(claim: ClaimFixture) -> None:
    """Every second head attends to many tokens, the others to few."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8)
    lm = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, max_position_embeddings=256)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        lm.model.layers[0].self_attn.q_proj.weight.view(8, 8, 64)[1::2] *= 0.3
    equal = loss(lm, snap())
    for variant in ("paper", "kvpress"):
        claim(
            f"budgets by need lose less of a layer's output than equal ones (L1, as a share of theirs; {variant})",
            ours=loss(lm, AdaKV(snap(), variant=variant)) / equal, baseline=1.0, better="lower", margin=0.15,
            baseline_name="SnapKV with as many tokens in a layer", seed=0,
        )  # fmt: skip


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="base must be a policy that scores"):
        AdaKV(0.2)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="safeguard=1.5"):
        AdaKV(safeguard=1.5)
    with pytest.raises(OptionError, match="variant='x'"):
        AdaKV(variant="x")  # type: ignore[arg-type]
