"""Every mode of generation works under methods.

A static cache, prompt lookup and an assistant model only save time. So under a method they have to generate the same
text as plain greedy decoding under that method.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import foveate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.host.operator_swap import PrefillSwap
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.recycled_attention import RecycledAttention
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.tidal_decode import TidalDecode
from foveate.kv.token_select import TokenSelect
from foveate.lens import Lens
from foveate.ops import SlidingWindow
from tests.support.host_models import (
    DECODERS,
    SLIDING,
    VOCAB,
    KeepsAll,
    Reads,
    Recent,
    SameHidden,
    SameNextToken,
    feed,
    model,
    padded,
    tokens,
)

GATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])

#: Methods that evict nothing, by name; each call makes new ones.
READING: dict[str, Callable[[], list[Method]]] = {
    "no method": list,
    "packed": lambda: [foveate.Packed()],
    "edits": lambda: [SameHidden(), SameNextToken()],
    "lens": lambda: [Lens(["entropy"], phase="all")],
    "token_select": lambda: [TokenSelect(2, 4, 4)],
    "tidal_decode": lambda: [TidalDecode(8, 1, ())],
    "recycled_attention": lambda: [RecycledAttention(8, 4)],
    "prefill swap": lambda: [PrefillSwap(SlidingWindow(8))],
}
EVICTING: dict[str, Callable[[], list[Method]]] = {
    "sink_recent": lambda: [SinkRecent(2, 6)],
    "duo_attention": lambda: [DuoAttention(GATES, 0.5, 2, 6)],
    "two together": lambda: [SinkRecent(2, 20), TokenSelect(2, 4, 4)],
}
LENGTH, NEW = 32, 24


def prompt() -> Tensor:
    """Return text that repeats itself, so that prompt lookup has drafts from the first call on."""
    return torch.cat([tokens(1, 20), tokens(1, 20)[:, : LENGTH - 20]], 1)


def generated(name: str, methods: list[Method], **options: object) -> Tensor:
    with apply(model(name), *methods):
        return model(name).generate(prompt(), max_new_tokens=NEW, do_sample=False, **options)


# -- static caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READING)
def test_a_static_cache_gives_the_same_text(kind: str) -> None:
    expected = generated("llama", READING[kind]())
    assert torch.equal(generated("llama", READING[kind](), cache_implementation="static"), expected)
    given = StaticCache(config=model("llama").config, max_cache_len=LENGTH + NEW + 3)
    assert torch.equal(generated("llama", READING[kind](), past_key_values=given), expected)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_static_cache_without_methods_is_the_models_own(name: str) -> None:
    def logits() -> Tensor:
        made = model(name).generate(
            prompt(), max_new_tokens=NEW, do_sample=False, cache_implementation="static",
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.stack(made.logits)

    expected = logits()
    with apply(model(name)) as run:
        assert torch.equal(logits(), expected)
    assert run.stats.calls == 3 * NEW


@pytest.mark.parametrize("name", ["llama", *SLIDING])
@torch.no_grad()
def test_sites_of_a_static_cache_are_those_of_a_dynamic_one(name: str) -> None:
    """A site leaves out the room that no token fills yet: it has keys, positions and mask of the tokens only."""

    def sites(cache: DynamicCache | StaticCache) -> list[tuple[Tensor, ...]]:
        reader = Reads(lambda s: (s.k.clone(), s.v.clone(), s.positions.clone(), s.seen, s.phase, _dense(s)))
        with apply(model(name), reader):
            feed(model(name), prompt(), torch.ones(1, LENGTH, dtype=torch.long), [5, 13, *[1] * (LENGTH - 18)], cache)
        return reader.seen

    config = model(name).config
    dynamic, static = sites(DynamicCache(config=config)), sites(StaticCache(config=config, max_cache_len=LENGTH + 9))
    for (k, v, positions, seen, phase, mask), own in zip(static, dynamic, strict=True):
        n = min(k.shape[2], own[0].shape[2])  # a static window may hold one token more than it needs
        assert (seen, phase) == own[3:5] and torch.equal(positions[..., -n:], own[2][..., -n:])
        torch.testing.assert_close((k[:, :, -n:], v[:, :, -n:]), (own[0][:, :, -n:], own[1][:, :, -n:]))
        assert torch.equal(mask[..., -n:], own[5][..., -n:]) and not bool(mask[..., :-n].any())


def _dense(site: Site) -> Tensor:
    n = site.q.shape[2]
    return torch.ones(1, 1, n, site.k.shape[2], dtype=torch.bool) if site.mask is None else site.mask


@pytest.mark.parametrize("kind", EVICTING)
def test_a_static_cache_cannot_drop_tokens(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match="got StaticCache of StaticLayer: leave cache_implementation out"):
        generated("llama", EVICTING[kind](), cache_implementation="static")


# -- drafts ------------------------------------------------------------------------------------------------------------


#: gemma3 has one layer without a window, where tidal_decode would have none to read what it selected.
DRAFTED = [(kind, name) for kind in [*READING, *EVICTING] for name in ("llama", "gemma3")]
DRAFTED.remove(("tidal_decode", "gemma3"))


@pytest.mark.parametrize("kind, name", DRAFTED)
def test_drafts_do_not_change_the_text(kind: str, name: str) -> None:
    """Prompt lookup accepts and removes whole calls of drafts."""
    make, drafted = {**READING, **EVICTING}[kind], Reads(lambda s: s.q.shape[2] if s.phase == "decode" else 0)
    expected = generated(name, make())
    assert torch.equal(generated(name, [*make(), drafted], prompt_lookup_num_tokens=4), expected)
    if kind in ("no method", "lens"):
        assert max(drafted.seen) > 1


@pytest.mark.parametrize("kind", ["lens", "token_select", "sink_recent"])
def test_an_assistant_does_not_change_the_text(kind: str) -> None:
    make = {**READING, **EVICTING}[kind]
    expected = generated("llama", make())
    assert torch.equal(generated("llama", make(), assistant_model=model("qwen2")), expected)


def test_drafts_keep_as_much_as_plain_decoding() -> None:
    """Drops wait until rejected drafts are removed, and no longer."""
    cache = DynamicCache()
    with apply(model("llama"), SinkRecent(2, 6)) as run:
        made = model("llama").generate(
            prompt(), max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=4, past_key_values=cache
        )
        assert cache.get_seq_length() == made.shape[1] - 1
        assert run.stats.of(cache).kept <= (2 + 6 + 5) / (LENGTH + NEW - 1)


@torch.no_grad()
def test_phases() -> None:
    """Pieces of a prompt are prefill; single tokens, drafts, and a few tokens after the prompt are decoding."""
    reader = Reads(lambda s: (s.layer, s.q.shape[2], s.phase, s.prompt))
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, reader):
        for size in (20, 5, 1, 3, 17):
            llama(tokens(1, size), past_key_values=cache)
        cache.crop(-(46 - 10))
        llama(tokens(1, 5), past_key_values=cache)
    phases = [seen[1:] for seen in reader.seen if seen[0] == 1]
    assert phases == [
        (20, "prefill", None), (5, "prefill", None), (1, "decode", None), (3, "decode", 25), (17, "prefill", 25),
        (5, "prefill", None),
    ]  # fmt: skip


# -- searching and sampling --------------------------------------------------------------------------------------------

SEARCHES: dict[str, dict[str, object]] = {
    "beams": dict(num_beams=3, num_return_sequences=2, do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.8, num_return_sequences=3),
    "sampled beams": dict(do_sample=True, num_beams=2),
    "a penalty": dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2),
}


@pytest.mark.parametrize("how", SEARCHES)
@pytest.mark.parametrize("kind", ["no method", "lens", "keeps all", "edits"])
def test_searches_and_samples_are_the_models_own(how: str, kind: str) -> None:
    """Methods without effect do not change beams, their order or any sampled token."""
    ids, mask = padded(tokens(2, 12), "left")

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        made = model("llama").generate(
            ids, attention_mask=mask, max_new_tokens=10, return_dict_in_generate=True, output_logits=True,
            **SEARCHES[how],
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits)

    expected = run()
    methods = {"keeps all": [KeepsAll()]}.get(kind) or READING[kind]()
    with apply(model("llama"), *methods):
        got = run()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


# -- encoder-decoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("t5", "no method"), *itertools.product(["bart", "whisper"], ["no method", "keeps all", "recent", "edits"])],
)
def test_encoder_decoders_with_everything_returned(name: str, kind: str) -> None:
    """Outputs are a dictionary with the cache; a method that drops tokens acts on the decoder's own."""
    subject, inputs = encoder_decoder(name)

    def run() -> tuple[Tensor, Tensor, EncoderDecoderCache]:
        made = subject.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits), made.past_key_values

    expected = run()
    methods = {"keeps all": [KeepsAll()], "recent": [Recent(3)]}.get(kind) or READING[kind]()
    with apply(subject, *methods) as inside:
        got = run()
    if kind == "recent":
        assert inside.stats.kept == 3 / 12 and not torch.equal(got[1], expected[1])
        own, its = got[2].cross_attention_cache, expected[2].cross_attention_cache
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(own.layers, its.layers, strict=True))
        assert got[2].self_attention_cache.layers[0].keys.shape[2] == 3
    else:
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]) and inside.stats.kept == 1.0


@cache
def encoder_decoder(name: str) -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    if name == "bart":
        return model("bart"), {"input_ids": tokens(2, 9)}
    torch.manual_seed(0)
    if name == "t5":
        config = hf.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=1,
            eos_token_id=None, pad_token_id=0, initializer_factor=3.0,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config).eval(), {"input_ids": tokens(2, 9)}
    config = hf.WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=3, decoder_start_token_id=1,
        begin_suppress_tokens=None, suppress_tokens=None, init_std=0.3,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config).eval(), {"input_features": torch.randn(2, 8, 40)}


# -- continuous batching -----------------------------------------------------------------------------------------------


def test_continuous_batching() -> None:
    """Without a method it is the model's own; with one it is refused before it starts, and works again afterwards."""
    llama = model("llama")

    def run() -> list[list[int]]:
        made = llama.generate_batch(
            [tokens(1, 9)[0].tolist(), tokens(1, 14, seed=2)[0].tolist()],
            generation_config=hf.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=hf.ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=64),
            progress_bar=False,
        )
        return [made[key].generated_tokens for key in sorted(made)]

    expected = run()
    assert [len(tokens) for tokens in expected] == [4, 4]
    with apply(llama):
        assert run() == expected
    with apply(llama, SinkRecent(2, 6)), pytest.raises(UnsupportedModel, match="stores pages instead of a cache"):
        run()
    assert run() == expected


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training(around: bool, reentrant: bool) -> None:
    """Gradients with checkpoints equal those without in the block; a backward pass after the block is refused."""
    llama, ids = copy.deepcopy(model("llama")).train(), tokens(2, 14)

    class Scales(Method):
        def edit_output(self, site: Site, out: Tensor) -> Tensor:
            return out * (1.5 + site.layer)

    def gradients(checkpoints: bool) -> list[Tensor]:
        if checkpoints:
            llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
        else:
            llama.gradient_checkpointing_disable()
        llama.zero_grad()
        with apply(llama, Scales()):
            loss = llama(ids, labels=ids, use_cache=False).loss
            if around:
                loss.backward()
        if not around:
            loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters()]

    expected = gradients(False)
    if around:
        assert all(torch.equal(*pair) for pair in zip(gradients(True), expected, strict=True))
    else:
        with pytest.raises(UnsupportedModel, match="run that pass inside the block"):
            gradients(True)


# -- copies, and changes inside the block ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*READING, *EVICTING])
def test_a_copy_made_inside_the_block_is_a_plain_model(kind: str) -> None:
    """It generates as the model without methods, in the block and after it, and can have methods of its own."""
    llama, make = model("llama"), {**READING, **EVICTING}[kind]
    plain, expected = generated("llama", []), generated("llama", make())

    def run(subject: hf.PreTrainedModel) -> Tensor:
        return subject.generate(prompt(), max_new_tokens=NEW, do_sample=False)

    with apply(llama, *make()):
        twin = copy.deepcopy(llama)
        assert torch.equal(run(twin), plain) and torch.equal(run(llama), expected)
    assert torch.equal(run(twin), plain)
    with apply(twin, *make()):
        assert torch.equal(run(twin), expected) and torch.equal(run(llama), plain)


def test_a_model_is_not_saved_as_a_whole_inside_the_block() -> None:
    with apply(model("llama"), Recent()), pytest.raises(OptionError, match="leave the block first"):
        torch.save(model("llama"), io.BytesIO())


def test_another_implementation_inside_the_block_is_refused() -> None:
    llama = copy.deepcopy(model("llama"))
    with apply(llama, Recent()):
        llama.set_attn_implementation("eager")
        with pytest.raises(UnsupportedModel, match=r"removes the methods; call it before"):
            llama(tokens())
    assert llama(tokens()).logits.shape == (2, 14, VOCAB)
