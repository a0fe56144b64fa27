"""`apply` leaves no trace on the model, or on a cache from which nothing was dropped, however it ends."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import foveate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Host, Method, Site
from foveate.host.hf.attach import OPEN
from tests.support.host_models import (
    DECODERS,
    NO_OPS,
    Evicts,
    KeepsAll,
    Recent,
    SameLogits,
    SameWeights,
    SelectsIndices,
    evicts,
    model,
    tokens,
    use,
)  # fmt: skip


class Breaks(Method):
    def __init__(self, where: str) -> None:
        self.where = where

    def bind(self, host: Host) -> None:
        if self.where == "bind":
            raise RuntimeError("broken")

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        if self.where == "forward" and site.layer == 1:
            raise RuntimeError("broken")
        return out


class Fingerprint:
    """Everything about a model that a run could leave changed."""

    def __init__(self, subject: PreTrainedModel) -> None:
        self.weights = {name: value.clone() for name, value in subject.state_dict().items()}
        self.config = subject.config.to_dict()
        configs = list(Host(subject).configs())
        self.implementations = [config._attn_implementation_internal for config in configs]
        hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_backward_hooks")
        self.hooks = [len(getattr(module, name)) for module in subject.modules() for name in hooks]
        self.attributes = [sorted(vars(module)) for module in subject.modules()]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Fingerprint)
        mine, theirs = dict(vars(self)), dict(vars(other))
        weights, others = mine.pop("weights"), theirs.pop("weights")
        same = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
        return same and mine == theirs

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture(params=[*DECODERS, "bert", "vit"])
def subject(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model(request.param)


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NO_OPS)
def test_after_the_block(subject: PreTrainedModel, path: str) -> None:
    methods, before = [kind() for kind in NO_OPS[path]], Fingerprint(subject)
    if evicts(*methods) and not subject.can_generate():
        with pytest.raises(UnsupportedModel, match="has no decoder"), foveate.apply(subject, *methods):
            pytest.fail("it was not refused on entering")
        assert Fingerprint(subject) == before
        assert not OPEN
        return
    with foveate.apply(subject, *methods):
        use(subject)
        assert Fingerprint(subject) != before  # otherwise this test could not fail
    assert Fingerprint(subject) == before
    assert not OPEN


@pytest.mark.parametrize("where", ["bind", "forward", "block"])
def test_after_an_exception(subject: PreTrainedModel, where: str) -> None:
    before = Fingerprint(subject)
    methods = [Evicts()] if subject.can_generate() else []
    with suppress(RuntimeError), foveate.apply(subject, *methods, Breaks(where)):
        use(subject)
        raise RuntimeError("broken in the block")
    assert Fingerprint(subject) == before
    assert not OPEN
    use(subject)


@pytest.mark.parametrize("inner", [Recent, SameWeights, lambda: Breaks("forward")])
@pytest.mark.parametrize("outer", [Recent, SameWeights])
def test_nested(subject: PreTrainedModel, outer: type[Method], inner: Callable[[], Method]) -> None:
    """The inner run ends first, and does not change the outer one."""
    before = Fingerprint(subject)
    if not subject.can_generate():  # it refuses methods that evict
        outer, inner = (SameLogits if kind is Recent else kind for kind in (outer, inner))
    with foveate.apply(subject, outer()) as run:
        use(subject)
        within, calls = Fingerprint(subject), run.stats.calls
        with suppress(RuntimeError), foveate.apply(subject, inner()):
            use(subject)
        assert Fingerprint(subject) == within
        assert run.stats.calls > calls  # the outer run also counts the inner run's calls
        use(subject)
    assert Fingerprint(subject) == before
    assert not OPEN


def test_a_run_is_not_kept_alive_by_its_caches() -> None:
    llama = model("llama")
    cache = DynamicCache()
    with torch.no_grad(), foveate.apply(llama, KeepsAll()) as run:
        llama(tokens(), past_key_values=cache)
        notes = run.caches.notes
        assert len(notes) == 1
    del cache
    gc.collect()
    assert len(notes) == 0


def test_a_mask_of_the_wrong_shape() -> None:
    class Wrong(Method):
        def keep(self, site: Site) -> Tensor:
            return torch.ones(3, dtype=torch.bool)

    before = Fingerprint(model("llama"))
    with pytest.raises(OptionError) as caught, foveate.apply(model("llama"), Wrong()):
        use(model("llama"))
    assert str(caught.value) == "keep() of Wrong must be (2, 2, 14); got (3,)"
    assert Fingerprint(model("llama")) == before


# -- caches afterwards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_whole_cache_becomes_an_ordinary_one(name: str) -> None:
    subject, ids = model(name), tokens(2, 24)

    def conversation(*methods: Method) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache(config=subject.config)
        subject(ids[:, :6], past_key_values=cache)
        with foveate.apply(subject, *methods):
            subject(ids[:, 6:16], past_key_values=cache)
            subject(ids[:, 16:17], past_key_values=cache)
        assert all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
        assert "reorder_cache" not in vars(cache)
        return torch.cat([subject(ids[:, [i]], past_key_values=cache).logits for i in range(17, 24)], 1), cache

    expected, native = conversation()
    for methods in ((Evicts(),), (KeepsAll(),), (SelectsIndices(),)):
        got, cache = conversation(*methods)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(cache.layers, native.layers, strict=True):
            assert type(ours) is type(theirs)
            assert vars(ours).keys() == vars(theirs).keys()
            assert ours.get_seq_length() == theirs.get_seq_length() == 24
            assert ours.keys.shape == theirs.keys.shape


class Uneven(Method):
    """Heads keep different numbers of tokens."""

    def keep(self, site: Site) -> Tensor:
        return site.positions >= site.seen - 4 - torch.arange(site.positions.shape[1])[:, None]


@pytest.mark.parametrize("how", ["after the block", "after an exception", "a copy"])
@torch.no_grad()
def test_an_uneven_cache_is_refused_outside_a_run(how: str) -> None:
    llama, cache = model("llama"), DynamicCache()
    with suppress(RuntimeError), foveate.apply(llama, Uneven()):
        llama(tokens(), past_key_values=cache)
        if how == "a copy":
            cache = copy.deepcopy(cache)
        if how == "after an exception":
            with foveate.apply(llama, Breaks("forward")):
                llama(tokens(2, 1), past_key_values=cache)
    with pytest.raises(UnsupportedModel, match="past_key_values was compressed .* different numbers"):
        llama(tokens(2, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_an_even_cache_works_without_foveate(name: str) -> None:
    """It can be saved and loaded, decodes as inside the block, and can be cropped for the next question."""
    subject, ids, cache = model(name), tokens(2, 24), DynamicCache(config=model(name).config)
    if name == "gemma2":  # sliding layers would no longer slide by position
        with foveate.apply(subject, Recent(5)):
            subject(ids[:, :16], past_key_values=cache)
        with pytest.raises(UnsupportedModel, match="compressed"):
            subject(ids[:, 16:17], past_key_values=cache)
        return
    with foveate.apply(subject, Recent(5)):
        subject(ids[:, :16], past_key_values=cache)
        twin = copy.deepcopy(cache)
    kept = [layer.keys.shape[2] for layer in cache.layers]
    with foveate.apply(subject):
        expected = torch.cat([subject(ids[:, i : i + 2], past_key_values=twin).logits for i in (16, 18)], 1)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    cache = torch.load(buffer, weights_only=False)
    for _ in range(2):
        got = torch.cat([subject(ids[:, i : i + 2], past_key_values=cache).logits for i in (16, 18)], 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == 20
        cache.crop(-4)
        assert cache.get_seq_length() == 16
        assert [layer.keys.shape[2] for layer in cache.layers] == kept == [5] * 3
    with pytest.raises(UnsupportedModel, match="compressed at 16 tokens and cannot be cropped to 15"):
        cache.crop(-1)


@torch.no_grad()
def test_cropping_inside_the_block() -> None:
    """A cache can be cropped to any length since which nothing was dropped, and then decodes as before."""
    llama, ids, cache = model("llama"), tokens(2, 24), DynamicCache()
    with foveate.apply(llama, Recent(12)):
        llama(ids[:, :10], past_key_values=cache)
        first = llama(ids[:, 10:11], past_key_values=cache).logits
        cache.crop(-1)
        torch.testing.assert_close(llama(ids[:, 10:11], past_key_values=cache).logits, first, atol=1e-6, rtol=1e-6)
        llama(ids[:, 11:20], past_key_values=cache)
        with pytest.raises(UnsupportedModel, match="cannot be cropped to 19 tokens: at 20 tokens a method dropped"):
            cache.crop(-1)


@torch.no_grad()
def test_a_compressed_cache_works_in_another_run() -> None:
    llama, ids = model("llama"), tokens(2, 16)

    def conversation(*second: Method, together: bool) -> Tensor:
        cache = DynamicCache()
        with foveate.apply(llama, Recent(5)):
            llama(ids[:, :14], past_key_values=cache)
            if together:
                return llama(ids[:, 14:], past_key_values=cache).logits
        with foveate.apply(llama, *second):
            return llama(ids[:, 14:], past_key_values=cache).logits

    expected = conversation(together=True)
    for second in ((Recent(5),), (), (SameWeights(),)):
        torch.testing.assert_close(conversation(*second, together=False), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copy_of_a_cache_is_a_cache_of_its_own() -> None:
    """A prompt is read once, and copies of its cache continue from it, also in beam search (prefix caching)."""
    llama, ids, prompt = model("llama"), tokens(1, 16), DynamicCache()
    with foveate.apply(llama, Recent(6)):
        llama(ids, past_key_values=prompt)
        stored = [layer.store for layer in prompt.layers]
        twin = copy.deepcopy(prompt)
        twin.batch_repeat_interleave(2)
        llama(tokens(2, 1), past_key_values=twin)
        first = [layer.store.padded("k")[0].clone() for layer in twin.layers]
        twin.reorder_cache(torch.tensor([1, 0]))
        assert all(torch.equal(layer.store.padded("k")[1], k) for layer, k in zip(twin.layers, first, strict=True))
        assert [layer.store for layer in prompt.layers] == stored
        assert prompt.get_seq_length() == 16 and twin.get_seq_length() == 17


@torch.no_grad()
def test_reset_empties_the_cache() -> None:
    llama, ids, cache = model("llama"), tokens(2, 12), DynamicCache()
    with foveate.apply(llama, Recent(5)):
        first = llama(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(llama(ids, past_key_values=cache).logits, first)
