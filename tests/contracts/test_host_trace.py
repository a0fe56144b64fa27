"""`apply` leaves no trace, however it ends; runs nest, methods compose, and what cannot be done is refused in a line."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import foveate
from foveate.core.errors import FoveateError, OptionError, UnsupportedModel
from foveate.host import Host, Method, Site, run as host_run
from foveate.host.cache import SlotLayer
from tests.host_models import (
    DECODERS, NO_OPS, Evicts, KeepsAll, SameWeights, SelectsIndices, model, padded, tokens,
)  # fmt: skip


class Recent(Method):
    """Keeps the last few tokens."""

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def keep(self, site: Site) -> Tensor:
        return site.positions >= site.seen - self.count


class Reads(Method):
    """Notes what it sees."""

    def __init__(self, what: Callable[[Site], Any]) -> None:
        self.what, self.seen = what, []

    def read(self, site: Site, out: Tensor) -> None:
        self.seen.append(self.what(site))


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
    """Everything about a model that a run could leave behind."""

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


def use(subject: PreTrainedModel) -> None:
    with torch.no_grad():
        if subject.main_input_name == "pixel_values":
            subject(torch.zeros(1, 3, 16, 16))
        else:
            subject(tokens(), attention_mask=torch.ones(2, 14, dtype=torch.long))


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NO_OPS)
def test_after_the_block(subject: PreTrainedModel, path: str) -> None:
    before = Fingerprint(subject)
    with foveate.apply(subject, *(kind() for kind in NO_OPS[path])):
        use(subject)
        assert Fingerprint(subject) != before  # else this test sees nothing
    assert Fingerprint(subject) == before
    assert not host_run._OPEN


@pytest.mark.parametrize("where", ["bind", "forward", "block"])
def test_after_an_exception(subject: PreTrainedModel, where: str) -> None:
    before = Fingerprint(subject)
    with pytest.raises(RuntimeError, match="broken"), foveate.apply(subject, Evicts(), Breaks(where)):
        use(subject)
        raise RuntimeError("broken")
    assert Fingerprint(subject) == before
    assert not host_run._OPEN
    use(subject)


@pytest.mark.parametrize("inner", [Recent, SameWeights, lambda: Breaks("forward")])
@pytest.mark.parametrize("outer", [Recent, SameWeights])
def test_nested(subject: PreTrainedModel, outer: type[Method], inner: Callable[[], Method]) -> None:
    """The inner run leaves first, and leaves the outer one as it was."""
    before = Fingerprint(subject)
    with foveate.apply(subject, outer()) as run:
        use(subject)
        within, calls = Fingerprint(subject), run.stats.calls
        with suppress(RuntimeError), foveate.apply(subject, inner()):
            use(subject)
        assert Fingerprint(subject) == within
        assert run.stats.calls > calls  # the outer run counts what happens in the inner
        use(subject)
    assert Fingerprint(subject) == before
    assert not host_run._OPEN


def test_a_run_is_not_kept_alive_by_its_caches() -> None:
    llama = model("llama")
    cache = DynamicCache()
    with torch.no_grad(), foveate.apply(llama, KeepsAll()) as run:
        llama(tokens(), past_key_values=cache)
        memories = run._memories
        assert len(memories) == 1
    del cache
    gc.collect()
    assert len(memories) == 0


# -- caches afterwards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_whole_cache_goes_on_as_an_ordinary_one(name: str) -> None:
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


@pytest.mark.parametrize("how", ["after the block", "after an exception", "a copy"])
@torch.no_grad()
def test_a_compressed_cache_refuses_to_go_on_alone(how: str) -> None:
    llama, cache = model("llama"), DynamicCache()
    with suppress(RuntimeError), foveate.apply(llama, Recent()):
        llama(tokens(), past_key_values=cache)
        if how == "a copy":
            cache = copy.deepcopy(cache)
        if how == "after an exception":
            with foveate.apply(llama, Breaks("forward")):
                llama(tokens(2, 1), past_key_values=cache)
    with pytest.raises(UnsupportedModel, match="past_key_values was compressed .* start a new cache"):
        llama(tokens(2, 1), past_key_values=cache)
    with pytest.raises(UnsupportedModel, match="cannot be cropped"):
        cache.crop(-1)


@torch.no_grad()
def test_a_compressed_cache_goes_on_in_another_run() -> None:
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
    """Prefix caching: a prompt is read once, and copies of its cache go on from it, also in beam search."""
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
def test_reset_starts_anew() -> None:
    llama, ids, cache = model("llama"), tokens(2, 12), DynamicCache()
    with foveate.apply(llama, Recent(5)):
        first = llama(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(llama(ids, past_key_values=cache).logits, first)


# -- nesting and composing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["evicts in reads", "reads in evicts", "together"])
@torch.no_grad()
def test_a_reader_beside_a_policy(order: str) -> None:
    """Both see the same call: the reader sees the slots that the policy left, and changes nothing."""
    llama, ids, mask = model("llama"), *padded(tokens(), "left")

    def generate() -> Tensor:
        return llama.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=2)

    with foveate.apply(llama, Recent(5)):
        expected = generate()
    policy, reader = Recent(5), Reads(lambda site: (site.phase, site.k.shape[2]))
    first, second = {"evicts in reads": ([reader], [policy]), "reads in evicts": ([policy], [reader])}.get(
        order, ([policy, reader], [])
    )
    with foveate.apply(llama, *first), foveate.apply(llama, *second):
        assert torch.equal(generate(), expected)
    assert reader.seen == [("prefill", 14)] * 3 + [("decode", 6)] * 3 * 5


@torch.no_grad()
def test_an_inner_run_may_begin_and_end_within_a_sequence() -> None:
    llama, ids, cache = model("llama"), tokens(2, 16), DynamicCache()
    lengths = Reads(lambda site: (site.seen, site.k.shape[2]))
    with foveate.apply(llama, lengths) as run:
        llama(ids[:, :12], past_key_values=cache)
        with foveate.apply(llama, Recent(5)) as inner:
            llama(ids[:, 12:14], past_key_values=cache)
            assert inner.stats.kept == run.stats.kept == 5 / 14
        assert all(isinstance(layer, SlotLayer) for layer in cache.layers)
        llama(ids[:, 14:], past_key_values=cache)
    assert lengths.seen == [(12, 12)] * 3 + [(14, 14)] * 3 + [(16, 7)] * 3
    assert "reorder_cache" not in vars(cache)


class Adds(Method):
    def __init__(self, number: float) -> None:
        self.number = number

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return out + self.number


class Doubles(Method):
    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        return 2 * out

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        return 2 * weights

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        return 2 * logits


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_methods_compose_in_order(nested: bool) -> None:
    llama, outputs = model("llama"), {}

    class Keeps(Method):
        def __init__(self, name: str) -> None:
            self.name = name

        def edit_output(self, site: Site, out: Tensor) -> Tensor:
            if site.layer == 0:
                outputs[self.name] = out
            return out

    def between(*methods: Method) -> Tensor:
        applied = (Keeps("before"), *methods, Keeps("after"))
        runs = [applied[:2], applied[2:]] if nested else [applied, ()]
        with foveate.apply(llama, *runs[0]), foveate.apply(llama, *runs[1]):
            use(llama)
        return outputs["after"]

    plain = between()
    assert torch.equal(between(Adds(1.0), Doubles()), (outputs["before"] + 1) * 2)
    assert torch.equal(between(Doubles(), Adds(1.0)), outputs["before"] * 2 + 1)
    assert not torch.allclose(plain, outputs["after"])


@torch.no_grad()
def test_edits_of_the_matrix_compose_and_come_at_their_place() -> None:
    """Logits after the scale and before the mask; weights after the softmax, in the order of the methods."""
    llama, ids = model("llama"), tokens(1, 5)
    rows = Reads(lambda site: site.weights[0])

    class Plants(Method):
        def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
            rank = torch.arange(5.0)
            return rank.expand_as(logits)

        def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
            return weights + 1.0

    with foveate.apply(llama, Plants(), Doubles(), rows):
        llama(ids)
    expected = torch.full((5, 5), 1.0)
    for i in range(5):
        expected[i, : i + 1] += (2 * torch.arange(i + 1.0)).softmax(-1)
    torch.testing.assert_close(rows.seen[0], (2 * expected).expand(4, 5, 5))


@torch.no_grad()
def test_the_last_method_that_attends_has_the_last_word() -> None:
    class Attends(Method):
        def __init__(self, value: float | None) -> None:
            self.value = value

        def attend(self, site: Site) -> Tensor | None:
            return None if self.value is None else torch.full_like(site.q, self.value)

    outputs = Reads(lambda site: site)
    values = []
    outputs.read = lambda site, out: values.append(float(out[0, 0, 0, 0]))  # type: ignore[method-assign]
    with foveate.apply(model("llama"), Attends(1.0), Attends(2.0), Attends(None), outputs):
        use(model("llama"))
    assert values == [2.0] * 3


# -- what a site says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "model's", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_sites_of_a_decoder(name: str, cache: str) -> None:
    subject = model(name)
    kinds = {
        "dynamic": DynamicCache,
        "model's": lambda: DynamicCache(config=subject.config),
        "static": lambda: StaticCache(config=subject.config, max_cache_len=32),
    }
    past = kinds[cache]()
    sites = Reads(
        lambda site: (
            site.layer, site.phase, site.seen, site.query_positions.tolist(), site.groups, tuple(site.hidden.shape)
        )
    )  # fmt: skip
    with foveate.apply(subject, sites):
        for begin, end in ((0, 1), (1, 2), (2, 14), (14, 15)):
            subject(tokens(2, 15)[:, begin:end], past_key_values=past)
    asked = [("prefill", 1, [0]), ("decode", 2, [1]), ("prefill", 14, [*range(2, 14)]), ("decode", 15, [14])]
    asked = [(phase, seen, queries, 2, (2, len(queries), 32)) for phase, seen, queries in asked]
    assert sites.seen == [(layer, *rest) for rest in asked for layer in range(3)]


@torch.no_grad()
def test_positions_of_sliding_layers() -> None:
    """A window's layer holds later tokens only; each key stays beside its position, stored natively or in slots."""
    mistral = model("mistral")
    for methods in ((), (Evicts(),)):
        cache, found = DynamicCache(config=mistral.config), Reads(lambda site: (site.positions, site.k, site.mask))
        with foveate.apply(mistral, *methods, found):
            mistral(tokens(), past_key_values=cache)
            mistral(tokens(2, 1), past_key_values=cache)
            mistral(tokens(2, 2), past_key_values=cache)
        for positions, k, _ in found.seen[:3]:
            assert positions[0, 0].tolist() == [*range(14)] and k.shape[2] == 14
        for positions, k, _ in found.seen[3:6]:
            assert positions[0, 0].tolist() == [*range(7, 15)] and k.shape[2] == 8
        for positions, k, mask in found.seen[6:]:
            assert positions[0, 0].tolist() == [*range(8, 17)] and k.shape[2] == 9
            assert mask[0, 0].tolist() == [[True] * 8 + [False], [False] + [True] * 8]


@torch.no_grad()
def test_sites_of_encoders() -> None:
    ids, mask = padded(tokens(), "right")
    sites = Reads(lambda site: (site.layer, site.phase, site.seen, site.is_causal, site.cache))
    with foveate.apply(model("bert"), sites):
        model("bert")(ids, attention_mask=mask)
        model("bert")(ids[:, :1])
    assert sites.seen == [(layer, "prefill", n, False, None) for n in (14, 1) for layer in (0, 1)]
    sites.seen.clear()
    with foveate.apply(model("vit"), sites):
        use(model("vit"))
    assert sites.seen == [(layer, "prefill", 17, False, None) for layer in (0, 1)]


@torch.no_grad()
def test_where_padded_sequences_begin() -> None:
    for side, begins in (("left", [4, 0]), ("right", [0, 0]), ("none", [0, 0])):
        ids, mask = padded(tokens(), side)
        sites = Reads(lambda site: site.begins.tolist())
        with foveate.apply(model("llama"), sites):
            model("llama")(ids, attention_mask=mask)
        assert sites.seen == [begins] * 3


@torch.no_grad()
def test_arguments_by_position() -> None:
    """A model may hand its attention modules the hidden states and the cache by position."""
    llama, cache = model("llama"), DynamicCache()
    hidden, attention = torch.randn(2, 9, 32), model("llama").model.layers[0].self_attn
    rotary = llama.model.rotary_emb(hidden, torch.arange(9)[None])
    sites = Reads(lambda site: (site.hidden is hidden, site.cache is cache, site.slots is not None, site.seen))
    with foveate.apply(llama, Recent(3), sites):
        attention(hidden, rotary, None, cache)
    assert sites.seen == [(True, True, True, 9)]
    assert cache.layers[0].store.stored == 2 * 2 * 3


# -- memory of methods -------------------------------------------------------------------------------------------------


class Remembers(Method):
    """Counts its calls of a sequence, and keeps each sequence's first token apart."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, int, int]] = []

    def read(self, site: Site, out: Tensor) -> None:
        memory, shared = site.memory(self), site.memory(self, all_layers=True)
        memory["calls"] = memory.get("calls", 0) + 1
        shared["calls"] = shared.get("calls", 0) + 1
        site.step["calls"] = site.step.get("calls", 0) + 1
        self.noted.append((memory["calls"], shared["calls"], site.step["calls"]))


@torch.no_grad()
def test_memory_is_of_a_layer_and_a_sequence() -> None:
    llama, method = model("llama"), Remembers()
    with foveate.apply(llama, method):
        for caches in ((DynamicCache(),), (DynamicCache(),)):
            for _ in range(2):
                llama(tokens(2, 3), past_key_values=caches[0])
    assert method.noted == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 4, 1), (2, 5, 2), (2, 6, 3)] * 2


@torch.no_grad()
def test_memory_ends_with_the_sequence_and_with_the_run() -> None:
    llama, cache, method = model("llama"), DynamicCache(), Remembers()
    once = [(1, 1, 1), (1, 2, 2), (1, 3, 3)]
    with foveate.apply(llama):
        for _ in range(2):
            with foveate.apply(llama, method):
                llama(tokens(2, 3), past_key_values=cache)
        assert method.noted == once * 2
        cache.reset()
        with foveate.apply(llama, method):
            llama(tokens(2, 3), past_key_values=cache)
            cache.reset()
            llama(tokens(2, 3), past_key_values=cache)
    assert method.noted == once * 4


@torch.no_grad()
def test_memory_follows_beam_search() -> None:
    """What a method noted of a sequence goes along when the sequence moves to another place in the batch."""
    llama = model("llama")

    class Follows(Method):
        checks = 0

        def read(self, site: Site, out: Tensor) -> None:
            memory = site.memory(self)
            if site.phase == "prefill":
                memory["first"] = site.k[:, 0, :, 0].clone()
                return
            n = memory["first"].shape[1]
            assert torch.equal(site.k[:, 0, :n, 0], memory["first"])
            memory["first"] = site.k[:, 0, :, 0].clone()
            Follows.checks += 1

    with foveate.apply(llama, Follows()):
        llama.generate(tokens(2, 6), max_new_tokens=8, num_beams=4, do_sample=False)
    assert Follows.checks == 3 * 7


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(kind: type[FoveateError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def inside(name: str, method: Method, call: Callable[[], object]) -> None:
    with torch.no_grad(), foveate.apply(model(name), method):
        call()


def test_refusals() -> None:
    llama, ids = model("llama"), tokens()
    assert refusal(UnsupportedModel, lambda: foveate.apply(torch.nn.Linear(2, 2))) == (
        "model must be a transformers PreTrainedModel; got Linear"
    )
    assert "FalconForCausalLM does not go through" in refusal(
        UnsupportedModel, lambda: foveate.apply(model("falcon"), Evicts())
    )
    assert refusal(OptionError, lambda: foveate.apply(llama, "sink_recent")) == "apply() takes Method objects; got str"
    assert "apply() takes Method objects; got type" in refusal(OptionError, lambda: foveate.apply(llama, Evicts))
    static = StaticCache(config=llama.config, max_cache_len=32)
    assert refusal(
        UnsupportedModel, lambda: inside("llama", Recent(), lambda: llama(ids, past_key_values=static))
    ) == ("past_key_values must be a DynamicCache for a method that evicts; got StaticCache of StaticLayer")
    with pytest.raises(UnsupportedModel, match="works inside foveate.apply"):
        host_run.attention_function(llama.model.layers[0].self_attn, ids, ids, ids, None)


def test_a_mask_of_the_wrong_shape() -> None:
    class Wrong(Method):
        def keep(self, site: Site) -> Tensor:
            return torch.ones(3, dtype=torch.bool)

    before = Fingerprint(model("llama"))
    said = refusal(OptionError, lambda: inside("llama", Wrong(), lambda: use(model("llama"))))
    assert said == "keep() of Wrong must be (2, 2, 14); got (3,)"
    assert Fingerprint(model("llama")) == before


def test_a_run_is_used_once() -> None:
    run = foveate.apply(model("llama"), Evicts())
    with run:
        use(model("llama"))
    assert refusal(OptionError, run.__enter__) == "this run was used already; call apply() again"
    assert not host_run._OPEN
