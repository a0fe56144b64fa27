"""`edit_next_token` changes the logits of the next token on every way of generating, and a branch reads twice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Branch, Method, ModelCall, Site, apply
from foveate.kv.sink_recent import SinkRecent
from foveate.lens import Lens
from tests.contracts.policies import subject, trace
from tests.support.host_models import DECODERS, VOCAB, model, padded, tokens

Change = Callable[[Tensor], Tensor]


class Changes(Method):
    def __init__(self, change: Change) -> None:
        self.change = change

    def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
        return self.change(logits)


def favour(logits: Tensor) -> Tensor:
    """Add more to the later tokens of the vocabulary."""
    return logits + torch.linspace(0, 6, logits.shape[-1]).to(logits)


def double(logits: Tensor) -> Tensor:
    return 2 * logits


@contextmanager
def by_hand(subject: nn.Module, change: Change) -> Iterator[None]:
    """Change the logits of all positions with a hook of this test's own; generation reads the last ones only."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    handle = subject.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 8},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 5},
}


def generate(name: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    given = {"max_new_tokens": 8, "do_sample": False, **options}
    return model(name).generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **given)


# -- the logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_every_way_of_generating(name: str, how: str) -> None:
    ids, mask = padded(tokens(), "left")
    with by_hand(model(name), favour):
        expected = generate(name, ids, mask, **WAYS[how])
    with apply(model(name), Changes(favour)):
        assert torch.equal(generate(name, ids, mask, **WAYS[how]), expected)
    assert not torch.equal(generate(name, ids, mask, **WAYS[how]), expected)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": "qwen2"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_drafts(name: str, how: dict[str, Any]) -> None:
    """The logits of each draft are changed, so that the text is that of plain decoding."""
    ids = torch.cat([tokens(1, 12), tokens(1, 12)], 1)
    options = {"assistant_model": model("qwen2")} if "assistant_model" in how else how
    with apply(model(name), Changes(favour)):
        assert torch.equal(generate(name, ids, **options), generate(name, ids))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_a_plain_call_has_only_the_last_tokens_changed(side: str) -> None:
    ids, mask = padded(tokens(), side)
    plain = model("llama")(ids, attention_mask=mask).logits
    with apply(model("llama"), Changes(favour)):
        got = model("llama")(ids, attention_mask=mask).logits
        one = model("llama")(ids, attention_mask=mask, logits_to_keep=1).logits
    last = torch.zeros(2, 14, dtype=torch.bool)
    last[0, 9 if side == "right" else 13] = last[1, 13] = True
    assert torch.equal(got[~last], plain[~last])
    assert torch.equal(got[last], favour(plain[last]))
    torch.testing.assert_close(one[1, 0], got[1, 13])


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_methods_act_in_the_order_in_which_they_are_applied(nested: bool) -> None:
    llama, ids = model("llama"), tokens()
    plain = llama(ids).logits[:, -1]

    def last(first: Change, second: Change) -> Tensor:
        outer, inner = [Changes(first)], [Changes(second)]
        if not nested:
            outer, inner = [*outer, *inner], []
        with apply(llama, *outer), apply(llama, *inner):
            return llama(ids).logits[:, -1]

    assert torch.equal(last(favour, double), double(favour(plain)))
    assert torch.equal(last(double, favour), favour(double(plain)))


@torch.no_grad()
def test_the_model_is_what_it_was() -> None:
    llama, ids = subject("llama"), tokens()
    before, plain = trace(llama), llama(ids).logits
    with pytest.raises(ZeroDivisionError), apply(llama, Changes(lambda logits: logits / (1 // 0))):
        llama(ids)
    assert trace(llama) == before and torch.equal(llama(ids).logits, plain)


def test_attention_stays_native() -> None:
    with apply(model("llama"), Changes(favour)) as run:
        assert run.is_plain and not run.has_hooks


def test_refusals() -> None:
    with apply(model("llama"), Changes(lambda logits: logits[:, 1:])), pytest.raises(OptionError) as caught:
        model("llama")(tokens())
    assert str(caught.value) == f"edit_next_token() of Changes must be (2, {VOCAB}); got (2, {VOCAB - 1})"
    images = torch.zeros(1, 3, 16, 16)
    with apply(model("vit"), Changes(favour)), pytest.raises(UnsupportedModel, match="needs a language-model head"):
        model("vit")(images)
    with apply(model("llama"), Changes(favour)), pytest.raises(UnsupportedModel, match="return_dict=True"):
        model("llama")(tokens(), return_dict=False)


# -- branches ----------------------------------------------------------------------------------------------------------


class Contrasts(Method):
    """Subtracts what the model says when the first few tokens of each prompt are zeroed, times `alpha`."""

    def __init__(self, alpha: float = 3.0, count: int = 6) -> None:
        self.alpha, self.count, self.branch = alpha, count, Branch()
        self.caches: list[weakref.ref[Any]] = []

    def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
        weak = self.branch.logits(self, call, self.zeroed if call.past == 0 else None)
        if (cache := call.notes(self).get("branch")) is not None:
            self.caches.append(weakref.ref(cache))
        return (1 + self.alpha) * logits - self.alpha * weak

    def zeroed(self, embeds: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(embeds[:, : self.count]), embeds[:, self.count :]], 1)


def contrasted(name: str, ids: Tensor, mask: Tensor, steps: int, alpha: float = 3.0, count: int = 6) -> Tensor:
    """Decode greedily by hand: two full passes over the sequence at each step, no cache and no hook."""
    subject = model(name)
    for _ in range(steps):
        embeds = subject.get_input_embeddings()(ids)
        zeroed = embeds.clone()
        zeroed[:, :count] = 0.0
        places = (mask.cumsum(1) - 1).clamp_min(0)
        two = [
            subject(inputs_embeds=x, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1]
            for x in (embeds, zeroed)
        ]
        new = ((1 + alpha) * two[0] - alpha * two[1]).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_branch_is_a_second_reading(name: str, side: str) -> None:
    ids, mask = padded(tokens(), side)
    expected = contrasted(name, ids, mask, 8)
    with apply(model(name), Contrasts()):
        assert torch.equal(generate(name, ids, mask), expected)
    assert not torch.equal(generate(name, ids, mask), expected)


@pytest.mark.parametrize("how", ["beams", "sampling", "static", "chunks"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_its_cache_follows_every_way_of_generating(name: str, how: str) -> None:
    """Without a cache both readings begin anew at each step; with one the text is the same."""
    ids, mask = padded(tokens(2, 14, seed=5), "left")
    method = Contrasts(count=5)  # within the first chunk
    with apply(model(name), method):
        expected = generate(name, ids, mask, **{**WAYS[how], "cache_implementation": None, "prefill_chunk_size": None,
                                                "use_cache": False})  # fmt: skip
        assert torch.equal(generate(name, ids, mask, **WAYS[how]), expected)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": "qwen2"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_rejected_drafts_are_removed_from_it(name: str, how: dict[str, Any]) -> None:
    ids = torch.cat([tokens(1, 12), tokens(1, 12)], 1)
    options = {"assistant_model": model("qwen2")} if "assistant_model" in how else how
    with apply(model(name), Contrasts()):
        assert torch.equal(generate(name, ids, **options, max_new_tokens=16), generate(name, ids, max_new_tokens=16))


@torch.no_grad()
def test_two_turns_and_a_cache_that_is_cropped() -> None:
    """A branch goes on with later turns, and goes back with its first reading."""
    llama, ids, more = model("llama"), tokens(1, 10), tokens(1, 4, seed=3)
    with apply(llama, Contrasts()):
        cache = DynamicCache()
        llama(ids, past_key_values=cache)
        first = llama(more, past_key_values=cache).logits[:, -1]
        cache.crop(-4)
        llama(tokens(1, 1, seed=4), past_key_values=cache)
        cache.crop(-1)
        assert torch.equal(llama(more, past_key_values=cache).logits[:, -1], first)
        alone = DynamicCache()
        llama(ids, past_key_values=alone)
        torch.testing.assert_close(llama(more, past_key_values=alone).logits[:, -1], first)


@torch.no_grad()
def test_the_model_runs_twice_a_step_and_no_method_runs_within_its_branch() -> None:
    calls, edits = [], []

    class Counts(Method):
        def edit_next_token(self, logits: Tensor, call: ModelCall) -> Tensor:
            edits.append(call.past)
            return logits

        def read(self, site: Site, out: Tensor) -> None:
            calls.append((site.is_branch, site.asked))

    with apply(model("llama"), Contrasts(), Counts()):
        generate("llama", tokens(1, 9), max_new_tokens=3)
    assert edits == [0, 9, 10]
    assert calls == [(branch, seen) for seen in (9, 10, 11) for branch in (False, True) for _ in range(3)]


def collect() -> None:
    """Release first the cache of the first reading, which is part of a cycle, and then what only it held."""
    gc.collect()
    gc.collect()


@torch.no_grad()
def test_its_cache_is_released_with_the_first_reading() -> None:
    method, cache = Contrasts(), DynamicCache()
    with apply(model("llama"), method):
        generate("llama", tokens(), past_key_values=cache)
        assert method.caches[-1]() is not None and method.caches[-1]().get_seq_length() == cache.get_seq_length()
    collect()
    assert method.caches[-1]() is None and not [name for name in vars(cache) if "foveate" in name]
    with apply(model("llama"), method):
        generate("llama", tokens())
        collect()
        assert method.caches[-1]() is None


@pytest.mark.parametrize("order", ["together", "outer", "inner"])
@torch.no_grad()
def test_policies_and_readers_act_on_both_readings(order: str) -> None:
    ids, lens = tokens(2, 20), Lens(["entropy"], phase="all")

    def run(*others: Method) -> Tensor:
        mine = [Contrasts()]
        outer = {"together": [*mine, *others], "outer": mine, "inner": others}[order]
        inner = {"together": [], "outer": others, "inner": mine}[order]
        with apply(model("llama"), *outer) as first, apply(model("llama"), *inner) as second:
            out = generate("llama", ids)
            kept.append(min(first.stats.kept, second.stats.kept))
        return out

    kept: list[float] = []
    plain = run()
    assert torch.equal(run(lens), plain)
    evicted = run(SinkRecent(2, 6))
    assert kept[0] == kept[1] == 1.0 and kept[2] == pytest.approx(8 / 27)
    assert evicted.shape == plain.shape and not torch.equal(evicted, plain)


@torch.no_grad()
def test_threads_have_branches_of_their_own() -> None:
    prompts, meet = [tokens(1, 12, seed=1), tokens(2, 9, seed=2)], Barrier(2)

    def steps(ids: Tensor, together: bool) -> Tensor:
        cache, piece, out = DynamicCache(), ids, []
        with torch.no_grad():
            for _ in range(6):
                if together:
                    meet.wait(timeout=60)
                out.append(model("llama")(piece, past_key_values=cache).logits[:, -1:])
                piece = out[-1].argmax(-1)
        return torch.cat(out, 1)

    with apply(model("llama"), Contrasts()), ThreadPoolExecutor(2) as pool:
        expected = [steps(ids, False) for ids in prompts]
        got = list(pool.map(lambda ids: steps(ids, True), prompts))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@torch.no_grad()
def test_a_branch_that_cannot_be_read_is_refused() -> None:
    llama, cache = model("llama"), DynamicCache()
    llama(tokens(1, 5), past_key_values=cache)
    with apply(llama, Contrasts()), pytest.raises(OptionError) as caught:
        llama(tokens(1, 1), past_key_values=cache)
    assert str(caught.value) == (
        "Contrasts reads a sequence twice from its first token on, and this one has 5 tokens already; apply the method "
        "before the prompt is read"
    )
    with apply(llama, Contrasts()):
        cache = DynamicCache()
        llama(tokens(1, 5), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(OptionError, match="read 1 sequences and gets 2 now; repeat the"):
            llama(tokens(2, 1), past_key_values=cache)
    with apply(model("bart"), Contrasts()), pytest.raises(UnsupportedModel, match="is no decoder-only model"):
        model("bart")(tokens(1, 5))


@torch.no_grad()
def test_an_error_in_the_second_reading_leaves_the_run_usable() -> None:
    class Fails(Contrasts):
        def zeroed(self, embeds: Tensor) -> Tensor:
            raise ZeroDivisionError

    llama, ids = model("llama"), tokens(1, 9)
    before = trace(llama)
    with apply(llama, Fails()) as run:
        with pytest.raises(ZeroDivisionError):
            llama(ids)
        assert not run.passes.here.is_branch and run.passes.here.outermost is None
    assert trace(llama) == before
    expected = contrasted("llama", ids, torch.ones_like(ids), 8)
    with apply(llama, Contrasts()):
        assert torch.equal(generate("llama", ids), expected)
