"""CriticalKV: both stages by hand, the limits, and what values say that attention does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.output_projection import projected_norms
from foveate.kv import H2O, AdaKV, CriticalKV, ScorePolicy, SnapKV
from tests.conftest import ClaimFixture
from tests.contracts.policies import subject
from tests.support.constructed import FILLER, TOKEN, induction_lm, recall
from tests.support.host_models import model, tokens
from tests.support.tensors import assert_near
from tests.systems.kv.test_score_policies import best, kept, seen

N, SIZE = 40, 16


def snap(**options: Any) -> SnapKV:
    return SnapKV(**{"share": 0.4, "recent": 4, "pool": 1, **options})


class Values(Method):
    """Notes the first layer's values and output projection."""

    def __init__(self) -> None:
        self.v, self.weight = torch.empty(0), torch.empty(0)

    def read(self, site: Any, out: Tensor) -> None:
        if site.order == 0:
            self.v, self.weight = site.v[0].clone(), site.module.o_proj.weight


def norms(ids: Tensor) -> Tensor:
    """The L1 norms behind the output projection, `(Hkv, N)`, by a loop over query heads."""
    watch = Values()
    with torch.no_grad(), apply(model("llama"), watch):
        model("llama")(ids)
    parts = [(watch.weight[:, h * 8 : (h + 1) * 8] @ watch.v[h // 2].T).abs().sum(0) for h in range(4)]
    return torch.stack(parts).view(2, 2, N).mean(1).detach()


def by_hand(ids: Tensor, budgets: list[int], first: float = 0.5, epsilon: float = 1e-4) -> list[list[int]]:
    """What each head of the first layer keeps around SnapKV with a window of four tokens."""
    _, weights = seen(model("llama"), ids)
    scores, window = weights[0, :, :, -4:].mean((1, 2)), list(range(N - 4, N))
    scores[:, -4:] = 0.0
    made = []
    for score, norm, budget in zip(scores, norms(ids), budgets, strict=True):
        stage = best(score[None], int(budget * first), window)[0]
        made += best(((score + epsilon) * norm)[None], budget, sorted({*stage, *window}))
    return made


@pytest.mark.parametrize("epsilon", [1e-4, 1.0])
@pytest.mark.parametrize("first", [0.0, 0.5, 0.8])
def test_both_stages_are_the_papers(first: float, epsilon: float) -> None:
    ids = tokens(1, N)
    made = kept(model("llama"), ids, CriticalKV(snap(), first=first, epsilon=epsilon))[0]
    assert made == by_hand(ids, [SIZE] * 2, first, epsilon) and made != kept(model("llama"), ids, snap())[0]


BASES = {"snap": snap(), "ada": AdaKV(snap()), "safe": AdaKV(snap(), variant="kvpress"), "h2o": H2O(share=0.3)}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_where_the_score_decides_alone_it_is_the_policy_that_it_wraps(base: ScorePolicy) -> None:
    assert kept(model("llama"), tokens(1, N), CriticalKV(base, first=1.0)) == kept(model("llama"), tokens(1, N), base)


@pytest.mark.parametrize("epsilon", [1e-4, 1.0])
def test_around_adaptive_heads_each_head_keeps_as_many(epsilon: float) -> None:
    llama = model("llama")
    for seed in range(4):
        ids, base = tokens(1, N, seed), AdaKV(snap(), variant="kvpress")
        sizes = [len(head) for head in kept(llama, ids, base)[0]]
        assert kept(llama, ids, CriticalKV(base, epsilon=epsilon))[0] == by_hand(ids, sizes, epsilon=epsilon)


def test_adaptive_heads_around_it_follow_its_scores() -> None:
    llama, ids = model("llama"), tokens(1, N)
    made = kept(llama, ids, AdaKV(CriticalKV(snap()), safeguard=0.0))
    sizes = [len(head) for head in made[0]]
    assert sum(sizes) == 2 * SIZE and made != kept(llama, ids, AdaKV(snap(), safeguard=0.0))


def test_values_say_what_attention_does_not(claim: ClaimFixture) -> None:
    """Nobody asks before the prompt ends, so that attention tells nothing. Fillers write nothing; answers do."""
    lm, right = induction_lm(), {}
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.v_proj.weight[:, TOKEN + FILLER.start : TOKEN + FILLER.stop] = 0.0
    texts, answers = recall(24, length=96, distractors=3, away=12)
    base = snap(share=0.25, sink=1)
    for policy in (CriticalKV(base), base):
        found = 0
        for ids, answer in zip(texts, answers, strict=True):
            cache = DynamicCache()
            with torch.no_grad(), apply(lm, policy):
                lm(ids[None, :-1], past_key_values=cache)
                found += int(lm(ids[None, -1:], past_key_values=cache).logits[0, -1].argmax() == answer[0])
        right[type(policy).__name__] = found / len(texts)
    claim(
        "tokens whose values change the output are kept, where attention alone does not know them: answers found",
        ours=right["CriticalKV"], baseline=right["SnapKV"], better="higher", margin=0.5, baseline_name="SnapKV", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["windowed", "hybrid"])
def test_projections_of_other_names_are_found(name: str) -> None:
    ids, cache = tokens(1, 30), DynamicCache(config=subject(name).config)
    with torch.no_grad(), apply(subject(name), CriticalKV(snap())) as run:
        subject(name)(ids, past_key_values=cache)
    assert run.stats.kept < 1.0


def test_models_without_a_linear_projection_are_refused() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64)).eval()
    says = "GPT2Attention has no linear o_proj or out_proj"
    with pytest.raises(UnsupportedModel, match=says), apply(gpt, CriticalKV()):
        pass


def test_a_projection_of_other_sizes_is_refused() -> None:
    q, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module = nn.Module()
    module.o_proj = nn.Linear(7, 3)
    with pytest.raises(UnsupportedModel, match="takes 7 numbers, and 4 heads give 32"):
        projected_norms(Site(module, 0, q, v, v, scale=1.0, attention_mask=None, is_causal=True))


@pytest.mark.parametrize("tile", [1, 64, 1 << 22])
def test_long_values_are_projected_in_parts(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.host.output_projection.TILE", tile)
    q, v, module = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), nn.Module()
    module.out_proj = nn.Linear(32, 5)
    found = projected_norms(Site(module, 0, q, v, v, scale=1.0, attention_mask=None, is_causal=True))
    weight = module.out_proj.weight.detach().view(5, 4, 8)
    assert_near(found, torch.einsum("bhsd,chd->bhsc", v.repeat_interleave(2, 1), weight).abs().sum(-1), 1e-5)


def test_bad_options() -> None:
    for options, says in (({"first": 2.0}, "first=2.0"), ({"epsilon": -1.0}, "epsilon=-1.0")):
        with pytest.raises(OptionError, match=says):
            CriticalKV(**options)
