"""Sinks: the metric, where they are found in a decoder, and the attention that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.core.errors import FoveateError
from foveate.host import Method, Site, apply
from foveate.lens import (
    KernelAttention,
    SinkReport,
    key_importance,
    sink_profile,
    sink_rate,
    sink_report,
    token_norms,
)
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, tiny
from tests.support.constructed import VOCAB, induction_lm
from tests.support.sink_text import VOCABULARY, SinkText
from tests.support.tensors import assert_near, qkv

T = 64


def causal(t: int, *shape: int, seed: int = 0) -> Tensor:
    """Return random causal weights `(*shape, T, T)`."""
    logits = 3 * torch.randn(*shape, t, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


# -- the metric --------------------------------------------------------------------------------------------------------


def test_importance_of_uniform_attention_is_harmonic() -> None:
    uniform = torch.ones(T, T, dtype=torch.float64).tril() / torch.arange(1, T + 1)[:, None]
    found = key_importance(uniform)
    assert float(found[0]) == pytest.approx(sum(1 / i for i in range(1, T + 1)) / T, abs=1e-6)
    assert float(found[0]) == pytest.approx(0.0741, abs=1e-4)
    assert float(found[-1]) == pytest.approx(1 / T)
    assert sink_rate(uniform[None, None, None]) == 0.0


def test_importance_matches_a_loop() -> None:
    maps = causal(12, 2, 3)
    for k in range(12):
        mean = torch.stack([maps[..., i, k] for i in range(k, 12)]).mean(0)
        assert_near(key_importance(maps)[..., k], mean, 1e-12)


@pytest.mark.parametrize("eps", [0.3, 0.99])
def test_all_attention_on_the_first_token_is_a_sink_for_any_threshold(eps: float) -> None:
    maps = torch.zeros(2, 3, 4, T, T)
    maps[..., 0] = 1.0
    assert sink_rate(maps, eps=eps) == 1.0 and sink_rate(maps, k=5, eps=eps) == 0.0
    maps[0, 0] = torch.eye(T)
    assert sink_rate(maps, eps=eps) == pytest.approx(1 - 4 / 24)
    profile = sink_profile(maps, eps)
    assert float(profile[0]) == pytest.approx(20 / 24) and float(profile[T - 1]) == pytest.approx(4 / 24)


# -- of a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_the_report_is_that_of_the_whole_matrices(kind: str) -> None:
    model = tiny(kind)
    ids = [torch.randint(2, 50, (2, 20), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = sink_report(model, ids, eps=0.15)
    maps = torch.cat([torch.stack(eager_maps(model, {"input_ids": each}), 1) for each in ids])
    if kind != "llama":  # a window: fewer queries see a key
        width = 6
        layers = [layer for layer in range(2) if float(maps[:, layer, :, -1, 0].abs().max()) == 0.0]
        seen = torch.arange(20, 0, -1).clamp_max(width)
        full = torch.arange(20, 0, -1)
        importance = torch.stack(
            [maps[:, layer].sum(-2) / (seen if layer in layers else full) for layer in range(2)], 1
        )  # fmt: skip
        assert layers
    else:
        importance = key_importance(maps)
        assert found.rate() == pytest.approx(sink_rate(maps, eps=0.15))
        assert_near(found.rates.mean((0, 1)), sink_profile(maps, 0.15), 1e-9)
    assert_near(found.importance, importance.double().mean(0), 1e-5)


def test_the_sink_of_a_constructed_decoder_is_found(claim: ClaimFixture) -> None:
    """Its head (1, 0) looks at the first token where it has no match; all others look at the token before."""
    model, draw = induction_lm(matching=[(1, 0)]), torch.Generator().manual_seed(0)
    ids = torch.stack(
        [torch.cat([torch.zeros(1).long(), 1 + torch.randperm(VOCAB - 1, generator=draw)]) for _ in "1234"]
    )
    found = sink_report(model, [ids[:2], ids[2:]])
    assert found.place == 0
    assert found.since(share=0.25) == 1 and found.since(share=0.5) is None
    assert found.rate() == pytest.approx(1 / 8) and float(found.rates[1, 0, 0]) == 1.0
    assert float(found.strength()[1]) > 0.2 > float(found.strength()[0])
    claim(
        "importance of the first token for the head that has mostly nothing to look for",
        ours=float(found.importance[1, 0, 0]), baseline=float(found.importance[0].mean(0)[0]), better="higher",
        margin=0.5, baseline_name="heads of the layer below", seed=0,
    )  # fmt: skip


def test_place_and_layer_by_hand() -> None:
    importance = torch.full((3, 2, 9), 0.1)
    importance[1:, 0, 2] = 0.6
    importance[2, 1, 2] = 0.9
    importance[:, :, 8] = 1.0  # only one query sees the last key
    report = SinkReport(importance, (importance > 0.3).double())
    assert report.place == 2
    assert [report.since(share=share) for share in (0.5, 0.6, 1.0)] == [1, 2, 2]
    assert report.since(k=0) is None and report.since(k=8) == 0
    assert_near(report.strength(), torch.tensor([0.1, 0.35, 0.75]), 1e-6)
    assert report.rate(2) == pytest.approx(3 / 6) and report.rate(0) == 0.0
    level = torch.full((1, 1, 9), 0.1)
    level[..., 3] = 0.2
    assert SinkReport(level, torch.zeros(1, 1, 9)).place == 3, "without a sink, the most important key"


def test_norms_are_those_of_the_model() -> None:
    model = tiny("llama")
    ids = torch.randint(2, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    found = token_norms(model, ids)
    seen: dict[int, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        out = model(ids, use_cache=True, output_hidden_states=True)
    assert_near(found.hidden[1], out.hidden_states[1].norm(dim=-1).mean(0), 1e-6)
    for layer, each in enumerate(out.past_key_values.layers):
        assert_near(found.keys[layer], each.keys.norm(dim=-1).mean((0, 1)), 1e-6)
        assert_near(found.values[layer], each.values.norm(dim=-1).mean((0, 1)), 1e-6)

    class Watch(Method):
        def read(self, site: Any, out: Tensor) -> None:
            seen[site.layer] = site.q.clone(), site.k.clone()

    with torch.no_grad(), apply(model, Watch()):
        model(ids, use_cache=False)
    q, k = seen[1]
    pairs = F.cosine_similarity(q[:, :, :, None], k.repeat_interleave(2, 1)[:, :, None], dim=-1)
    for key in (0, 4, 9):
        assert float(found.cosine[1, key]) == pytest.approx(float(pairs[:, :, key:, key].mean()), abs=1e-5)


# -- variants of attention ---------------------------------------------------------------------------------------------


def test_softmax_is_torchs() -> None:
    q, k, v = qkv(9)
    found = KernelAttention(4, 8)(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_near(found, expected, 1e-10)
    assert_near(KernelAttention(4, 8)(q, k, v, causal=False),
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 1e-10)  # fmt: skip


@pytest.mark.parametrize("kind", ["sigmoid", "elu", "elu_kernel", "linear", "mlp"])
def test_weights_of_each_kind(kind: Any) -> None:
    torch.manual_seed(0)
    q, k, _ = qkv(7, heads=2, dtype=torch.float32)
    plain, divided = KernelAttention(2, 8, kind, normalize=False), KernelAttention(2, 8, kind)
    divided.load_state_dict(plain.state_dict())
    with torch.no_grad():
        raw, weights = plain.weights(q, k), divided.weights(q, k)
        own = {
            "sigmoid": lambda a, b: (a @ b / 8**0.5).sigmoid(),
            "elu": lambda a, b: F.elu(a @ b / 8**0.5) + 1,
            "elu_kernel": lambda a, b: (F.elu(a) + 1) @ (F.elu(b) + 1) / 8**0.5,
            "linear": lambda a, b: a @ b / 8**0.5,
            "mlp": lambda a, b: plain.features(a) @ plain.features(b) / 8**0.5,
        }[kind]
        assert float(raw[1, 1, 5, 3]) == pytest.approx(float(own(q[1, 1, 5], k[1, 1, 3])), abs=1e-5)
    assert float(raw.triu(1).abs().max()) == 0.0
    if kind in ("linear", "mlp"):
        assert_near(weights, raw / raw.sum(-1, keepdim=True).abs().clamp_min(1.0), 1e-6)
    else:
        assert_near(weights.sum(-1), torch.ones(2, 2, 7), 1e-6)
        assert_near(weights, raw / raw.sum(-1, keepdim=True), 1e-5)


def test_keys_far_below_get_nothing_and_weights_need_no_partner() -> None:
    q, k = torch.ones(1, 1, 5, 4), torch.full((1, 1, 5, 4), -1e4)
    assert float(KernelAttention(1, 4, "sigmoid", normalize=False).weights(q, k).abs().max()) == 0.0
    assert_near(KernelAttention(1, 4).weights(q, k).sum(-1), torch.ones(1, 1, 5), 1e-6)


def test_biases() -> None:
    q, k, v = qkv(9)
    plain = KernelAttention(4, 8)(q, k, v)
    both = KernelAttention(4, 8, kv_bias="kv").double()
    key_only, value_only = KernelAttention(4, 8, kv_bias="k").double(), KernelAttention(4, 8, kv_bias="v").double()
    key_only.k_bias.data = both.k_bias.data = 5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).double()
    weights = both.weights(q, k)
    assert weights.shape == (2, 4, 9, 10) and bool((weights[..., 0] > 0).all())
    assert float(weights[..., 1:].detach().triu(1).abs().max()) == 0.0
    logits = torch.einsum("bhnd,hd->bhn", q, both.k_bias) / 8**0.5
    expected = logits - torch.logsumexp(torch.cat([logits[..., None], _logits(q, k)], -1), -1)
    assert_near(weights[..., 0], expected.exp(), 1e-9)
    share = weights[..., :1]
    assert_near(key_only(q, k, v), (1 - share) * plain, 1e-9)
    assert_near(both(q, k, v), (1 - share) * plain + share * both.v_bias[:, None], 1e-9)
    zero = value_only.weights(q, k)[..., 0]  # its key is zero: a logit of 0
    assert_near(zero, 1 / (1 + _logits(q, k).exp().sum(-1)), 1e-9)
    q, away = q.abs(), KernelAttention(4, 8, kv_bias="kv").double()
    away.k_bias.data = torch.full((4, 8), -1e9).double()
    assert_near(away(q, k, v), KernelAttention(4, 8)(q, k, v), 1e-9)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    return logits.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), float("-inf"))


# -- emergence ---------------------------------------------------------------------------------------------------------

TRIGGERS = 6


class Instead(Method):
    """Attend with another attention."""

    def __init__(self, attention: KernelAttention) -> None:
        self.attention = attention

    def attend(self, site: Site) -> Tensor:
        return self.attention(site.q, site.k, site.v)


class Weights(Method):
    """Record the weights of another attention."""

    def __init__(self, attention: KernelAttention) -> None:
        self.attention = attention

    def read(self, site: Site, out: Tensor) -> None:
        self.found = self.attention.weights(site.q, site.k).detach()


def trained(attention: KernelAttention | None, seed: int, steps: int) -> LlamaForCausalLM:
    """Train a decoder of one layer and one head, with its own attention or another."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    ))  # fmt: skip
    own = [] if attention is None else list(attention.parameters())
    optimizer, text = (
        torch.optim.AdamW([*model.parameters(), *own], lr=1e-2, weight_decay=0.1),
        SinkText(seed, TRIGGERS),
    )
    text.sample(32)
    for _ in range(steps):
        ids = text.sample(16)
        with apply(model, *([] if attention is None else [Instead(attention)])):
            loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def other_weights(model: LlamaForCausalLM, attention: KernelAttention, ids: Tensor) -> Tensor:
    record = Weights(attention)
    with torch.no_grad(), apply(model, Instead(attention), record):
        model(ids, use_cache=False)
    return record.found


@pytest.mark.slow
def test_a_sink_emerges_with_softmax_and_moves_to_a_learnt_key(claim: ClaimFixture) -> None:
    """Sigmoid weights that are not normalised are not compared: so small a model gives no clear answer.

    Divided by their sum, they put 0.08 of a row on the first token for one seed, and 0.62 for another.
    """
    held = SinkText(0, TRIGGERS).sample(32)
    before = float(sink_report(trained(None, 0, 0), [held]).importance[0, 0, 0])
    softmax = float(sink_report(trained(None, 0, 600), [held]).importance[0, 0, 0])
    assert softmax > before + 0.02, "it appears in training"
    torch.manual_seed(1)
    biased = KernelAttention(1, 32, kv_bias="k")
    weights = other_weights(trained(biased, 0, 600), biased, held)
    assert float(weights[..., 0].mean()) > softmax / 2, "the learnt key takes the sink's part"
    claim(
        "importance of the first token after training with a learnt key beside the text's",
        ours=float(key_importance(weights[..., 1:])[..., 0].mean()), baseline=softmax, better="lower", margin=0.05,
        baseline_name="softmax alone", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: key_importance(torch.ones(3, 4)), "(..., T, T)"),
        (lambda: sink_profile(causal(4, 1, 1, 1), 1.5), "eps="),
        (lambda: sink_rate(causal(4, 1, 1, 1), k=4), "0..3"),
        (lambda: sink_rate(causal(4, 1, 1, 1), k=-1), "k="),
        (lambda: sink_report(tiny("llama"), []), "at least one batch"),
        (lambda: sink_report(tiny("llama"), [torch.ones(1, 4).long(), torch.ones(1, 5).long()]), "one length"),
        (lambda: SinkReport(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)).since(share=2.0), "share="),
        (lambda: token_norms(tiny("bert"), torch.ones(1, 4).long()), "causal"),
        (lambda: KernelAttention(2, 8, "softmax", normalize=False), 'kind="sigmoid"'),
        (lambda: KernelAttention(2, 8, "relu"), "kind="),  # type: ignore[arg-type]
        (lambda: KernelAttention(2, 8, kv_bias="q"), "kv_bias="),  # type: ignore[arg-type]
        (lambda: KernelAttention(2, 8)(*qkv(3)), "q must be"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
