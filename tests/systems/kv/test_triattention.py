"""TriAttention: calibration and score by hand, the prompt, and what the directions of queries are good for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foveate.core.errors import OptionError, ShapeError
from foveate.host import Site, apply
from foveate.host.hf.model import host
from foveate.kv import TriAttention
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.systems.kv.test_kvzip import Watch
from tests.systems.kv.test_score_policies import best, kept

N = 40


def data(texts: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(texts):
        yield tokens(1, N, seed + 10), torch.zeros(1, N, dtype=torch.bool)


def made(llama: PreTrainedModel | None = None, **options: object) -> TriAttention:
    learnt = TriAttention.calibrate(host(model("llama") if llama is None else llama), data())
    return TriAttention(**{"limit": 16, "prompt": False, "reach": 64, **learnt, **options})


def complex_pairs(x: Tensor, back: Tensor | None = None) -> Tensor:
    """Llama's pairs of channels `i` and `i + n` as complex numbers, rotated back to position 0."""
    n = x.shape[-1] // 2
    pairs = torch.complex(x[..., :n], x[..., n:])
    return pairs if back is None else pairs * torch.polar(torch.ones_like(back), -back)


def angles() -> Tensor:
    return model("llama").model.rotary_emb.inv_freq.double()


def seen(ids: Tensor, llama: PreTrainedModel | None = None) -> list[Site]:
    watch, llama = Watch(), model("llama") if llama is None else llama
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    return watch.sites


def test_calibration_takes_the_mean_direction_and_length_of_each_pair() -> None:
    found, q = made(), []
    back = torch.arange(N)[:, None] * angles()
    for ids, _ in data():
        q.append(complex_pairs(seen(ids)[1].q[0].double(), back))
    whole = torch.cat(q, 1)
    mean = complex_pairs(found.queries[1].double())
    torch.testing.assert_close(mean, whole.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.lengths[1].double(), whole.abs().mean(1), atol=1e-5, rtol=1e-4)


def test_the_score_is_the_papers_series() -> None:
    """Each key at each of the distances, one pair of channels at a time."""
    llama, ids, policy = model("llama"), tokens(1, N), made()
    chosen = kept(llama, ids, policy)
    for layer, site in enumerate(seen(ids)):
        k = complex_pairs(site.k[0].double(), torch.arange(N)[:, None] * angles())
        q, length = complex_pairs(policy.queries[layer].double()), policy.lengths[layer].double()
        scores = torch.zeros(site.q.shape[1], N, dtype=torch.float64)
        for head in range(site.q.shape[1]):
            key = k[head // site.groups]
            for distance in (1, 2, 4, 8, 16, 32, 64):
                far = N + distance - torch.arange(N)
                phase = far[:, None] * angles() + (q[head] * key.conj()).angle()
                scores[head] += (q[head].abs() * key.abs() * phase.cos()).sum(-1) / 7
            scores[head] += ((length[head] - q[head].abs()) * key.abs()).sum(-1)
        grouped = scores.unflatten(0, (-1, site.groups)).amax(1)
        assert chosen[layer] == best(grouped, 16)


@torch.no_grad()
def test_the_prompt_stays_where_asked_and_tokens_are_dropped_every_few_steps() -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, made(prompt=True, limit=20, every=5)):
        llama(tokens(1, 12), past_key_values=cache)
        for step in range(25):
            llama(tokens(1, 1, step), past_key_values=cache)
        held = cache.layers[0].store.padded("positions")[0]
    for head in held:
        places = sorted(head[head >= 0].tolist())
        assert places[:12] == list(range(12)) and len(places) == 20


@torch.no_grad()
def test_a_pinned_prompt_has_to_leave_room() -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, made(prompt=True, limit=12, every=1)):
        llama(tokens(1, 12), past_key_values=cache)
        with pytest.raises(OptionError, match="limit=12 leaves no room beside a prompt of 12 tokens"):
            llama(tokens(1, 1), past_key_values=cache)


def test_statistics_of_another_model_are_refused() -> None:
    with pytest.raises(OptionError, match="needs queries= and lengths="), apply(model("llama"), TriAttention()):
        pass
    wrong = made(queries=torch.zeros(1, 2, 8), lengths=torch.zeros(1, 2, 4))
    with pytest.raises(ShapeError, match="queries and lengths must begin with"):
        apply(model("llama"), wrong).__enter__()


def directed() -> PreTrainedModel:
    """A model whose queries have a direction: the bias of their projection."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(**{**model("llama").config.to_dict(), "attention_bias": True})).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.bias.normal_(0.0, 2.0, generator=draw)
            layer.self_attn.k_proj.weight.normal_(0.0, 0.3, generator=draw)
    return llama


def test_directions_of_queries_tell_which_keys_later_queries_see(claim: ClaimFixture) -> None:
    """The mass of a later text's attention on the kept tokens of an earlier one, against directions of other heads."""
    llama = directed()
    policy, mass = made(llama), {"own": 0.0, "others": 0.0}
    swapped = replace(policy, queries=policy.queries.roll(1, 0).flip(1), lengths=policy.lengths.roll(1, 0).flip(1))
    for seed in range(6):
        ids = tokens(1, 2 * N, seed)
        for name, each in (("own", policy), ("others", swapped)):
            chosen = kept(llama, ids[:, :N], each)
            for layer, site in enumerate(seen(ids, llama)):
                k = site.k[0].repeat_interleave(site.groups, 0)
                weights = (site.q[0, :, N:] @ k[:, :N].mT * site.scale).softmax(-1).mean(1)
                for head, row in enumerate(weights):
                    share = float(row[chosen[layer][head // site.groups]].sum())
                    mass[name] += share / (weights.shape[0] * 6 * len(chosen))
    claim(
        "share of later queries' attention that falls on the kept tokens",
        ours=mass["own"], baseline=mass["others"], better="higher", margin=0.07,
        baseline_name="the directions of other heads and layers", seed=0,
    )  # fmt: skip
