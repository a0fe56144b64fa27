"""Generation in all the ways that people call it, under methods: the same text as without the shortcut.

Greedy decoding is the measure: a static cache, prompt lookup and an assistant are shortcuts, so that under a method,
too, they have to give what plain decoding under that method gives.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import foveate
from foveate.core.errors import UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.prefill import PrefillSwap
from foveate.kv.recycled_attention import RecycledAttention
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.tidal_decode import TidalDecode
from foveate.kv.token_select import TokenSelect
from foveate.lens import Lens
from foveate.ops import SlidingWindow
from tests.host_models import DECODERS, SLIDING, Reads, feed, model, tokens

GATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])

#: Methods that change what is generated, each made anew.
READING: dict[str, Callable[[], list[Method]]] = {
    "no method": list,
    "packed": lambda: [foveate.Packed()],
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
    """Text that repeats itself, so that prompt lookup has drafts from the first call on."""
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
    """A site leaves out the room that no token fills yet: its keys, positions and mask are those of the tokens."""

    def sites(cache: DynamicCache | StaticCache) -> list[tuple[Tensor, ...]]:
        looks = Reads(lambda s: (s.k.clone(), s.v.clone(), s.positions.clone(), s.seen, s.phase, _dense(s)))
        with apply(model(name), looks):
            feed(model(name), prompt(), torch.ones(1, LENGTH, dtype=torch.long), [5, 13, *[1] * (LENGTH - 18)], cache)
        return looks.seen

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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [*READING, *EVICTING])
def test_drafts_do_not_change_the_text(kind: str, name: str) -> None:
    """Prompt lookup, on which whole calls of drafts are accepted and taken back."""
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


def test_drafts_leave_as_much_as_plain_decoding() -> None:
    """What is dropped for good waits for what is taken back, and no longer."""
    cache = DynamicCache()
    with apply(model("llama"), SinkRecent(2, 6)) as run:
        made = model("llama").generate(
            prompt(), max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=4, past_key_values=cache
        )
        assert cache.get_seq_length() == made.shape[1] - 1
        assert run.stats.of(cache).kept <= (2 + 6 + 5) / (LENGTH + NEW - 1)


@torch.no_grad()
def test_phases() -> None:
    """Pieces of a prompt are read; single tokens, drafts, and a few tokens after the prompt are decoded."""
    looks = Reads(lambda s: (s.layer, s.q.shape[2], s.phase, s.prompt))
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, looks):
        for size in (20, 5, 1, 3, 17):
            llama(tokens(1, size), past_key_values=cache)
        cache.crop(-(46 - 10))
        llama(tokens(1, 5), past_key_values=cache)
    phases = [seen[1:] for seen in looks.seen if seen[0] == 1]
    assert phases == [
        (20, "prefill", None), (5, "prefill", None), (1, "decode", None), (3, "decode", 25), (17, "prefill", 25),
        (5, "prefill", None),
    ]  # fmt: skip
