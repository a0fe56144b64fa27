"""`edit_hidden` changes what a block gives to the next one, exactly and in order, and leaves attention alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Host, Method, Spans, apply
from foveate.host.hf.blocks import blocks_of
from foveate.kv.sink_recent import SinkRecent
from tests.contracts.architectures import build
from tests.contracts.policies import subject, trace
from tests.support.host_models import DECODERS, VOCAB, SameHidden, model, padded, tokens

Change = Callable[[int, Tensor], Tensor]


class Changes(Method):
    """Changes hidden states by a function of the block's number."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
        return self.change(layer, hidden)


def push(layer: int, hidden: Tensor) -> Tensor:
    """Add a fixed vector behind the second block."""
    return hidden + torch.linspace(-4, 4, hidden.shape[-1]) if layer == 1 else hidden


def double(layer: int, hidden: Tensor) -> Tensor:
    return 2 * hidden if layer == 1 else hidden


@contextmanager
def by_hand(blocks: nn.ModuleList, *changes: Change) -> Iterator[None]:
    """Change the outputs of blocks with hooks of this test's own."""

    def hook(layer: int, block: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        for change in changes:
            hidden = change(layer, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [block.register_forward_hook(partial(hook, number)) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks(name: str) -> nn.ModuleList:
    if name == "vit":
        return next(m for m in model(name).modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    return model(name).bert.encoder.layer if name == "bert" else model(name).get_decoder().layers


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_it_acts_behind_the_block(name: str, side: str) -> None:
    ids, mask = padded(tokens(), side)
    plain = model(name)(ids, attention_mask=mask).logits
    with by_hand(blocks(name), push):
        expected = model(name)(ids, attention_mask=mask).logits
    with apply(model(name), Changes(push)):
        got = model(name)(ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.equal(got[real], expected[real]) and not torch.allclose(got[real], plain[real], atol=1e-2)


@torch.no_grad()
def test_it_acts_in_a_vision_transformer() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with by_hand(blocks("vit"), push):
        expected = model("vit")(images).logits
    with apply(model("vit"), Changes(push)):
        assert torch.equal(model("vit")(images).logits, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_it_acts_on_every_token_that_is_generated(name: str, options: dict[str, Any]) -> None:
    ids, mask = padded(tokens(), "left")

    def generate() -> Tensor:
        torch.manual_seed(0)
        return model(name).generate(ids, attention_mask=mask, **{"max_new_tokens": 6, "do_sample": False, **options})

    with by_hand(blocks(name), push):
        expected = generate()
    with apply(model(name), Changes(push)):
        assert torch.equal(generate(), expected)
    assert not torch.equal(generate(), expected)


@torch.no_grad()
def test_drafts_and_policies_beside_it() -> None:
    """Prompt lookup gives the same text, and a policy that evicts does what it does under a hook of the test's own."""
    ids = torch.cat([tokens(1, 12), tokens(1, 12)], 1)
    llama = model("llama")

    def generate(**options: Any) -> Tensor:
        return llama.generate(ids, max_new_tokens=12, do_sample=False, **options)

    with apply(llama, Changes(push)):
        expected = generate()
        assert torch.equal(generate(prompt_lookup_num_tokens=4), expected)
    with by_hand(blocks("llama"), push), apply(llama, SinkRecent(2, 6)):
        evicted = generate()
    with apply(llama, SinkRecent(2, 6), Changes(push)):
        assert torch.equal(generate(), evicted)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients(checkpoints: bool) -> None:
    """They flow through the change, also where the backward pass runs the blocks again."""
    llama, ids = copy.deepcopy(model("llama")).train(), tokens(2, 9)

    def gradients() -> list[Tensor]:
        llama.zero_grad()
        llama(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters()]

    with by_hand(llama.model.layers, push):
        expected = gradients()
    if checkpoints:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    with apply(llama, Changes(push)):
        assert all(torch.equal(*pair) for pair in zip(gradients(), expected, strict=True))


# -- order, and what else sees it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_methods_act_in_the_order_in_which_they_are_applied(nested: bool) -> None:
    llama, ids = model("llama"), tokens()

    def logits(first: Change, second: Change) -> Tensor:
        outer, inner = [Changes(first)], [Changes(second)]
        if not nested:
            outer, inner = [*outer, *inner], []
        with apply(llama, *outer), apply(llama, *inner):
            return llama(ids).logits

    with by_hand(blocks("llama"), push, double):
        pushed_first = llama(ids).logits
    with by_hand(blocks("llama"), double, push):
        doubled_first = llama(ids).logits
    assert torch.equal(logits(push, double), pushed_first) and torch.equal(logits(double, push), doubled_first)
    assert not torch.allclose(pushed_first, doubled_first, atol=1e-3)


@pytest.mark.parametrize("asked_before", [False, True])
@torch.no_grad()
def test_the_hidden_states_that_a_model_returns_are_changed(asked_before: bool) -> None:
    llama, ids = copy.deepcopy(model("llama")), tokens()
    if asked_before:  # transformers then has hooks of its own on the blocks
        llama(ids, output_hidden_states=True)
    plain = llama(ids, output_hidden_states=True).hidden_states if asked_before else None
    with apply(llama, Changes(push)):
        states = llama(ids, output_hidden_states=True).hidden_states
    plain = plain or llama(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], plain[1]) and torch.equal(states[2], push(1, plain[2]))


@torch.no_grad()
def test_attention_stays_native() -> None:
    """No site is made: the run counts the model's own calls."""
    llama = model("llama")
    with apply(llama, SameHidden()) as run:
        assert run.is_plain and not run.has_hooks
        llama(tokens())
    assert run.stats.calls == 3


@torch.no_grad()
def test_the_model_is_what_it_was_and_a_copy_is_plain() -> None:
    llama, ids = subject("llama"), tokens()
    before, plain = trace(llama), llama(ids).logits
    with apply(llama, Changes(push)):
        changed, twin = llama(ids).logits, copy.deepcopy(llama)
        assert torch.equal(twin(ids).logits, plain) and not torch.equal(changed, plain)
    with pytest.raises(ZeroDivisionError), apply(llama, Changes(lambda layer, hidden: hidden / (1 // layer))):
        llama(ids)
    assert trace(llama) == before and torch.equal(llama(ids).logits, plain)


# -- spans -------------------------------------------------------------------------------------------------------------


class Notes(Method):
    """Notes the spans of the tokens of each call behind the first block."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
        if layer == 0:
            self.seen.append({name: span.clone() for name, span in spans.items()})
            assert all(span.shape == hidden.shape[:2] for span in spans.values())
        return hidden


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_spans_are_those_of_the_calls_own_tokens(beams: int) -> None:
    (ids, mask), notes = padded(tokens(), "left"), Notes()
    with apply(model("llama"), notes) as run:
        run.spans = {"name": torch.tensor([5, 6]), "rows": torch.arange(14) < torch.tensor([[3], [4]])}
        model("llama").generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, num_beams=beams)
    prompt, *later = notes.seen
    assert torch.equal(prompt["text"], mask.bool().repeat_interleave(beams, 0)) and not prompt["generated"].any()
    assert prompt["name"].nonzero()[:, 1].tolist() == [5, 6] * 2 * beams
    assert prompt["rows"].sum(1).tolist() == [3] * beams + [4] * beams
    for step in later:
        assert step["generated"].all() and step["generated"].shape == (2 * beams, 1)
        assert not any(step[name].any() for name in ("text", "name", "rows", "image"))


@torch.no_grad()
def test_a_change_to_a_span_is_the_same_in_a_padded_batch() -> None:
    class Mutes(Method):
        def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
            third = spans["text"] & (spans["text"].cumsum(1) == 3)
            return hidden.masked_fill(third[..., None], 0.0)

    ids, mask = padded(tokens(), "left")
    with apply(model("llama"), Mutes()):
        both = model("llama")(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        alone = model("llama")(ids[:1, 4:]).logits
    torch.testing.assert_close(both[:1, 4:], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, model("llama")(ids[:1, 4:]).logits, atol=1e-2)


# -- blocks and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "gpt2", "gpt_oss"])
@torch.no_grad()
def test_every_block_of_the_stack_is_counted(name: str) -> None:
    """Also those that do not attend."""
    seen: list[int] = []
    subject = build(name)
    with apply(subject, Changes(lambda layer, hidden: seen.append(layer) or hidden)):
        subject(torch.randint(2, 60, (1, 6)))
    assert seen == list(range(subject.config.num_hidden_layers))


def test_the_stack_is_the_list_with_as_many_items_as_layers() -> None:
    """A list within a block, and a list of stages around the stack, are not taken for it."""

    class Attends(nn.Module): ...

    def block() -> nn.Module:
        holder = nn.Module()
        holder.parts = nn.ModuleList([Attends(), nn.Linear(2, 2)])
        return holder

    root = nn.Module()
    root.stages = nn.ModuleList([nn.ModuleList([block() for _ in range(3)])])
    attending = [module for module in root.modules() if isinstance(module, Attends)]
    assert blocks_of(root, attending, 3) == list(root.stages[0])
    with pytest.raises(UnsupportedModel, match="Attends of Sequential stands in no list of blocks"):
        blocks_of(nn.Sequential(attending[0]), attending[:1], 1)
    with pytest.raises(UnsupportedModel, match="has 3 lists of blocks that attend, and edit_hidden needs one"):
        blocks_of(root, attending, 7)


def test_malformed_changes_are_refused() -> None:
    with apply(model("llama"), Changes(lambda layer, hidden: hidden[:, 1:])), pytest.raises(OptionError) as caught:
        model("llama")(tokens())
    assert str(caught.value) == "edit_hidden() of Changes must be (2, 14, 32); got (2, 13, 32)"
    with apply(model("llama"), Changes(lambda layer, hidden: None)), pytest.raises(OptionError, match="got NoneType"):
        model("llama")(tokens())


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (torch.tensor([0.5]), 'spans: "x" must be positions (M,), none below 0, or bool; got Tensor (1,) float32'),
        (torch.tensor([-1]), 'spans: "x" must be positions (M,), none below 0, or bool; got Tensor (1,) int64'),
        (torch.ones(3, 4, dtype=torch.bool), "with B=2; got Tensor (3, 4) bool"),
    ],
)
def test_malformed_spans_are_refused(span: Tensor, words: str) -> None:
    with apply(model("llama"), Notes()) as run:
        run.spans["x"] = span
        with pytest.raises(OptionError) as caught:
            model("llama")(tokens())
    assert words in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_a_step_by_hand_is_generation() -> None:
    """Chunks and single tokens give what one call gives."""
    ids = tokens(1, 12)
    with apply(model("llama"), Changes(push)):
        whole, cache = model("llama")(ids).logits, DynamicCache()
        parts = [model("llama")(piece, past_key_values=cache).logits for piece in ids.split([5, 4, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert whole.shape == (1, 12, VOCAB) and Host(model("llama")).language_part is model("llama").model
