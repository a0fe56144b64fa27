"""Sinks, biases, states and latents, which some architectures add to attention, work on every path of the host."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

import foveate
from foveate.core.errors import UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.hf.hybrid import HybridSlotLayer
from foveate.kv.sink_recent import SinkRecent
from tests.contracts.architectures import build
from tests.support.host_models import NO_OPS, KeepsAll, Reads, Recent, feed, padded

pytestmark = pytest.mark.filterwarnings("ignore")

PIECES = [9, 1, 1, 3]
KINDS = ["gpt_oss", "granite_swa", "inkling2_text", "falcon_h1", "deepseek_v3", "diffllama"]


@pytest.fixture(
    scope="module", params=["gpt_oss", "granite_swa", "inkling2_text", "falcon_h1", "deepseek_v3", "diffllama"]
)
def subject(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def ids() -> tuple[Tensor, Tensor]:
    return padded(torch.randint(2, 60, (2, 14), generator=torch.Generator().manual_seed(0)), "left")


def logits(model: PreTrainedModel, *methods: Method) -> Tensor:
    with torch.no_grad(), apply(model, *methods):
        return feed(model, *ids(), PIECES, DynamicCache(config=model.config))


@pytest.mark.parametrize("path", NO_OPS)
def test_a_method_that_changes_nothing_changes_nothing(subject: PreTrainedModel, path: str) -> None:
    with torch.no_grad():
        expected = feed(subject, *ids(), PIECES, DynamicCache(config=subject.config))
    got = logits(subject, *(kind() for kind in NO_OPS[path]))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams(subject: PreTrainedModel, beams: int) -> None:
    def call() -> Tensor:
        tokens, mask = ids()
        return subject.generate(tokens, attention_mask=mask, max_new_tokens=6, num_beams=beams, do_sample=False)

    with torch.no_grad():
        expected = call()
        with apply(subject, KeepsAll()):
            assert torch.equal(call(), expected)


class Replaces(Method):
    def attend(self, site: Site) -> Tensor:
        return site.q.new_zeros(*site.q.shape[:3], site.v.shape[-1])


@pytest.mark.parametrize("name", ["gpt_oss", "inkling_text"])
def test_replacing_attention_that_has_sinks_or_a_bias_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="would ignore the learnt sinks or the position bias"):
        logits(build(name), Replaces())


def test_sinks_take_their_share() -> None:
    """The weights of the keys sum to less than one; the sinks have the rest."""
    model = build("gpt_oss")
    shares = Reads(lambda site: (site.weights.sum(-1), site.sinks.clone()))
    logits(model, *(kind() for kind in NO_OPS["weights"]), shares)
    share, sinks = shares.seen[0]
    assert sinks.shape == (1, model.config.num_attention_heads, 1, 1)
    assert (share[1] < 0.999).any() and (share <= 1 + 1e-5).all()


def test_weights_account_for_the_sinks() -> None:
    """The weights that a method reads are the model's own."""
    model, (tokens, _) = build("gpt_oss"), ids()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    with torch.no_grad(), apply(model, *(kind() for kind in NO_OPS["weights"])) as run:
        ours = model(tokens, output_attentions=True).attentions
    assert run.stats.calls == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# -- slots beside a state ----------------------------------------------------------------------------------------------


def cached(methods: Callable[[], Method], length: int = 10) -> tuple[PreTrainedModel, DynamicCache]:
    model = build("falcon_h1")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), apply(model, methods()):
        model(ids()[0][1:, :length], past_key_values=cache)
        assert all(isinstance(layer, HybridSlotLayer) for layer in cache.layers)
    return model, cache


def test_a_whole_cache_becomes_an_ordinary_one() -> None:
    model, cache = cached(KeepsAll)
    assert {type(layer) for layer in cache.layers} == {LinearAttentionAndFullAttentionLayer}
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids()[0][1:, :10], past_key_values=plain)
        expected = model(ids()[0][1:, 10:11], past_key_values=plain).logits
        assert torch.equal(model(ids()[0][1:, 10:11], past_key_values=cache).logits, expected)


def test_an_evicted_cache_works_in_another_block_and_in_a_copy() -> None:
    model, cache = cached(lambda: Recent(4))
    assert all(isinstance(layer, HybridSlotLayer) for layer in cache.layers)
    twin = copy.deepcopy(cache)
    with torch.no_grad(), apply(model, Recent(4)):
        one = model(ids()[0][1:, 10:11], past_key_values=cache).logits
        other = model(ids()[0][1:, 10:11], past_key_values=twin).logits
    assert torch.equal(one, other)


def test_resetting_the_cache_resets_the_state() -> None:
    model, cache = cached(KeepsAll)
    with torch.no_grad(), apply(model, KeepsAll()):
        model(ids()[0][1:, :3], past_key_values=cache)
        cache.reset()
        again = model(ids()[0][1:, :10], past_key_values=cache).logits
        fresh = model(ids()[0][1:, :10], past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(again, fresh)


# -- refused on entering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_a_bias_that_counts_the_stored_keys_is_refused(name: str) -> None:
    """T5 computes its bias from the number of stored keys, as if they were the first ones."""
    kind, model_class = {
        "t5": (hf.T5Config, hf.T5ForConditionalGeneration), "mt5": (hf.MT5Config, hf.MT5ForConditionalGeneration),
    }[name]  # fmt: skip
    model = model_class(
        kind(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            decoder_start_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    with pytest.raises(UnsupportedModel, match="gives a bias for 2 keys of 3"), apply(model, SinkRecent()):
        pytest.fail("it was not refused on entering")

    def call() -> Tensor:
        tokens, mask = ids()
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
        )
        return torch.stack(out.logits)

    with torch.no_grad():
        expected = call()
        with apply(model):
            assert torch.equal(call(), expected)
        with apply(model, *(kind() for kind in NO_OPS["weights"])):
            torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-4)


def test_a_bias_by_position_is_read_at_what_was_kept() -> None:
    """Inkling's bias covers the whole sequence; see also the table of architectures."""
    inkling = build("inkling_text")
    spans = Reads(lambda site: (site.position_bias.shape[-1], site.seen, site.positions.shape[2], site.mask.shape[3]))
    logits(inkling, Recent(4), spans)
    assert all(bias == seen for bias, seen, _, _ in spans.seen)
    assert all(stored == masked for _, _, stored, masked in spans.seen)
    assert any(stored < seen for _, seen, stored, _ in spans.seen)


def test_cache_methods_are_refused_without_a_cache() -> None:
    bert = hf.BertModel(hf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(UnsupportedModel, match="BertModel has no decoder"), foveate.apply(bert, SinkRecent()):
        pytest.fail("it was not refused on entering")
