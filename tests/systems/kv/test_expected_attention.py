"""ExpectedAttention: its score by hand, statistics over pieces and padding, its exact limit, and its use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, apply
from foveate.kv import ExpectedAttention, SnapKV
from foveate.kv.parts.query_statistics import Future
from foveate.kv.renumbered import Rotation
from tests.conftest import ClaimFixture
from tests.support.host_models import WINDOW, model, padded, tokens

N = 40


class Watch(Method):
    """Notes what a layer, or all of them, get."""

    def __init__(self, layer: int | None = 0) -> None:
        self.layer = layer
        self.sites: list[Any] = []
        self.weights: list[Tensor] = []

    def edit_weights(self, site: Any, weights: Tensor) -> Tensor:
        if self.layer in (None, site.order):
            self.sites.append((site.k.clone(), site.v.clone()))
            self.weights.append(weights.clone())
        return weights


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The first layer's scores, call by call."""
    made: list[Tensor] = []
    plain = ExpectedAttention.score

    def score(self: ExpectedAttention, site: Any) -> Tensor:
        found = plain(self, site)
        if site.order == 0:
            made.append(found.clone())
        return found

    monkeypatch.setattr(ExpectedAttention, "score", score)
    return made


@torch.no_grad()
def by_hand(llama: Any, ids: Tensor, sink: int, future: int, epsilon: float) -> Tensor:
    """The score of every token but the sinks, from the model's own projections and rotary embedding."""
    watch, n, layer = Watch(), ids.shape[1], llama.model.layers[0]
    with apply(llama, watch):
        llama(ids)
    k, v = (x[0, :, sink:] for x in watch.sites[0])
    hidden = layer.input_layernorm(llama.model.embed_tokens(ids))[0, sink:]
    q = (hidden @ layer.self_attn.q_proj.weight.T).unflatten(-1, (4, 8)).transpose(0, 1)
    mean, centred = q.mean(1), q - q.mean(1, keepdim=True)
    cov = centred.mT @ centred / q.shape[1]
    cos, sin = (x[0] for x in llama.model.rotary_emb(q, torch.arange(n, n + future)[None]))
    turn = torch.zeros(8, 8)
    turn[4:, :4], turn[:4, 4:] = torch.eye(4), -torch.eye(4)
    rotation = (cos[:, :, None] * torch.eye(8) + sin[:, :, None] * turn).mean(0)
    mean, cov = mean @ rotation.T, rotation @ cov @ rotation.T
    k = k.repeat_interleave(2, 0)
    logits = torch.einsum("hd,hnd->hn", mean, k) / 8**0.5 + torch.einsum("hni,hij,hnj->hn", k, cov, k) / 16
    return (logits.softmax(-1).unflatten(0, (2, 2)).mean(1) + epsilon) * v.norm(dim=-1)


@pytest.mark.parametrize(("sink", "future", "epsilon"), [(4, 512, 0.0), (0, 3, 0.0), (2, 20, 0.3)])
@torch.no_grad()
def test_the_score_is_the_papers(sink: int, future: int, epsilon: float, scores: list[Tensor]) -> None:
    llama, ids = model("llama"), tokens(1, N)
    with apply(llama, ExpectedAttention(sink=sink, future=future, epsilon=epsilon)):
        llama(ids, past_key_values=DynamicCache())
    torch.testing.assert_close(scores[0][0, :, sink:], by_hand(llama, ids, sink, future, epsilon), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_equal_queries_give_the_next_querys_attention(scores: list[Tensor]) -> None:
    """The limit: a text of one token has one query, and the first layer's next query is that one, one place later."""
    llama, ids, watch, cache = model("llama"), torch.full((1, N), 7), Watch(), DynamicCache()
    with apply(llama, watch, ExpectedAttention(share=0.99, sink=0, future=1, values=False)):
        llama(ids, past_key_values=cache)
    with apply(llama, watch):
        llama(torch.full((1, N + 1), 7))
    expected = watch.weights[1][0, :, -1, :-1]
    expected = (expected / expected.sum(-1, keepdim=True)).unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(scores[0][0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("neighbours", [False, True])
def test_keys_seen_from_the_future_are_an_average_of_rotations(neighbours: bool) -> None:
    """Also where only a part of the channels rotates."""
    draw = torch.Generator().manual_seed(0)
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.01]), neighbours)
    q, k = torch.randn(1, 1, 1, 10, generator=draw), torch.randn(1, 1, 6, 10, generator=draw)
    later = [rotation(q, torch.full((1, 1, 1), 30 + step)) @ k.mT for step in range(9)]
    got = q @ Future.of(rotation, 9).keys(k, torch.tensor([30])).mT
    torch.testing.assert_close(got, torch.stack(later).mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def statistics(
    ids: Tensor, mask: Tensor, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Tensor]]:
    """The first layer's statistics after each call."""
    found: list[dict[str, Tensor]] = []
    policy, cache, end = ExpectedAttention(share=0.99, every=1), DynamicCache(), 0
    plain = ExpectedAttention.score

    def score(self: ExpectedAttention, site: Any) -> Tensor:
        if site.order == 0:
            found.append({name: site.notes(self)[name].clone() for name in ("count", "mean", "spread")})
        return plain(self, site)

    monkeypatch.setattr(ExpectedAttention, "score", score)
    with apply(model("llama"), policy):
        for size in pieces:
            begin, end = end, end + size
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, begin:end]
            model("llama")(
                ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places, past_key_values=cache
            )  # fmt: skip
    return found


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("pieces", [[3, 10, 7, *[1] * 20], [1] * N], ids=["pieces", "one by one"])
def test_statistics_of_pieces_are_those_of_the_whole(
    side: str, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence's statistics do not depend on how it was read, nor on padding, and have one size."""
    ids, mask = padded(tokens(2, N), side, amount=7)
    whole = statistics(ids, mask, [N], monkeypatch)[-1]
    parts = statistics(ids, mask, pieces, monkeypatch)
    for name in whole:
        torch.testing.assert_close(parts[-1][name], whole[name], rtol=1e-3, atol=1e-4)
        assert {one[name].shape for one in parts} == {whole[name].shape}
    real = mask[0].bool()
    alone = statistics(ids[:1, real], mask[:1, real], [int(real.sum())], monkeypatch)[-1]
    assert int(alone["count"]) == int(real.sum()) - 4
    for name in alone:
        torch.testing.assert_close(whole[name][:1], alone[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_tokens_that_leave_a_window_get_nothing(scores: list[Tensor]) -> None:
    with apply(model("mistral"), ExpectedAttention(share=0.9, sink=0)):
        model("mistral")(tokens(1, N), past_key_values=DynamicCache(config=model("mistral").config))
    later = scores[0].shape[2] - WINDOW + 1  # the next query sees them, and itself
    assert not bool(scores[0][..., :later].any()) and bool((scores[0][..., later:] > 0).all())


@torch.no_grad()
def test_drafts_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup reads drafts with the prompt, and may remove them again."""
    found: list[tuple[bool, Tensor, Tensor]] = []
    plain = ExpectedAttention.score

    def score(self: ExpectedAttention, site: Any) -> Tensor:
        made = plain(self, site)
        found.append((site.drafts, site.notes(self)["mean"].clone(), made[..., :N].clone()))
        return made

    monkeypatch.setattr(ExpectedAttention, "score", score)
    ids = tokens(1, N // 4).repeat(1, 4)
    for drafts in (None, 4):
        with apply(model("llama"), ExpectedAttention(share=0.5, layers=(0,))):
            model("llama").generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0,
                prompt_lookup_num_tokens=drafts,
            )  # fmt: skip
    (none, *expected), (some, *got) = found
    assert some and not none
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_models_whose_keys_do_not_rotate_are_refused() -> None:
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    with pytest.raises(UnsupportedModel, match="do not rotate"), apply(gpt2, ExpectedAttention()):
        pass


def biased() -> hf.PreTrainedModel:
    """A model whose queries have a mean, as those of trained models do."""
    config = copy.deepcopy(model("llama").config)
    config.attention_bias = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = hf.LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(3)
    for layer in made.model.layers:
        layer.self_attn.q_proj.bias.data = torch.randn(32, generator=draw)
    return made


@torch.no_grad()
def attention_kept(llama: hf.PreTrainedModel, policy: Method, ids: Tensor, later: int) -> float:
    """The share of the attention of the last queries, to the text before them, that goes to what a policy keeps."""
    watch, cache, n = Watch(None), DynamicCache(), ids.shape[1] - later
    with apply(llama, watch):
        llama(ids)
    with apply(llama, policy):
        llama(ids[:, :n], past_key_values=cache)
        stored = [layer.store.padded("positions") for layer in cache.layers]
    kept = torch.tensor(0.0)
    for positions, weights in zip(stored, watch.weights, strict=True):
        there = torch.arange(n) == positions[..., None]
        paid = weights[:, :, -later:, :n].sum(2).unflatten(1, (2, 2)).sum(2)
        kept += (paid * there.any(2)).sum() / paid.sum() / len(stored)
    return float(kept)


def test_a_text_whose_end_is_unlike_the_rest(claim: ClaimFixture) -> None:
    """The text ends in one token, many times; then more of its other tokens come. All keep a quarter."""
    llama, later = biased(), 24
    ids = torch.cat([tokens(8, 96, seed=1), torch.full((8, 16), 5), tokens(8, later, seed=2)], 1)
    claim(
        "queries of a whole text, as a distribution, tell what later text attends to better than those of its end: "
        "share of later attention that goes to the kept quarter",
        ours=attention_kept(llama, ExpectedAttention(share=0.25, future=later, values=False), ids, later),
        baseline=attention_kept(llama, SnapKV(share=0.25, recent=16), ids, later),
        better="higher", margin=0.23, baseline_name="SnapKV", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [({"future": 0}, "future=0"), ({"epsilon": -1.0}, "epsilon=-1"), ({"covariance": 2}, "covariance=2")],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ExpectedAttention(**options)
