"""The contract that every sequence-to-sequence decoder has to keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from foveate.core.errors import OptionError, ShapeError
from foveate.nn.base.seq2seq import Seq2Seq
from tests.contracts.decoders import (
    BATCH,
    DIM,
    PLACES,
    STEPS,
    SYSTEMS,
    TRAINED_ELSEWHERE,
    VOCAB,
    decoders,
    drawable,
    every_sequence,
    example,
    first,
    given,
    hiding,
    likelihood,
    memories,
    stepwise,
)
from tests.support.tensors import assert_near, gradients


def test_the_seam_is_proved_on_unlike_decoders() -> None:
    assert {"show_attend_tell", "luong_attention", "pointer_network", "monotonic_location_attention"} <= set(SYSTEMS)


# -- teacher forcing ---------------------------------------------------------------------------------------------------


@decoders()
def test_shapes(key: str) -> None:
    decoder, memory = example(key), memories()
    logits, weights = decoder(memory, given(decoder, memory))
    assert logits.shape == (BATCH, STEPS, decoder.vocab_of(memory))
    assert weights.shape[:2] == (BATCH, STEPS)
    assert weights.shape[2] >= PLACES, "learned slots come behind the memory"
    assert not logits.isnan().any()


@decoders()
def test_teacher_forcing_is_step_by_step(key: str) -> None:
    decoder, memory, mask = example(key), memories(), hiding(2)
    tokens = given(decoder, memory)
    for one, other in zip(decoder(memory, tokens, mask), stepwise(decoder, memory, tokens, mask), strict=True):
        assert_near(one.exp(), other.exp(), 1e-12)


@decoders()
def test_later_tokens_have_no_effect(key: str) -> None:
    decoder, memory = example(key), memories()
    tokens = given(decoder, memory)
    whole = decoder(memory, tokens)
    for t in range(STEPS - 1):
        changed = tokens.clone()
        changed[:, t + 1 :] = (tokens[:, t + 1 :] + 1) % drawable(decoder, memory)
        for one, other in zip(decoder(memory, changed), whole, strict=True):
            assert_near(one[:, : t + 1].exp(), other[:, : t + 1].exp(), 1e-12)
        cut = decoder(memory, tokens[:, : t + 1]).logits
        assert_near(cut.exp(), whole.logits[:, : t + 1].exp(), 1e-12)


@decoders()
def test_the_last_token_has_an_effect(key: str) -> None:
    decoder, memory = example(key), memories()
    tokens = given(decoder, memory)
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % drawable(decoder, memory)
    one, other = (decoder(memory, t).logits[:, -1].exp() for t in (tokens, changed))
    assert (one - other).abs().max() > 1e-3


@decoders(lambda decoder: hasattr(decoder, "embed"))
def test_no_gradient_goes_to_later_tokens(key: str) -> None:
    """The embeddings of the tokens of a call get a gradient up to the step of a logit, and none after it."""
    decoder, memory, seen = example(key), memories(), list[Tensor]()

    def keep(module: torch.nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        seen.append(out)
        return out

    decoder.embed.register_forward_hook(keep)
    logits = decoder(memory, torch.zeros(BATCH, STEPS, dtype=torch.long) + 1).logits
    for t in range(STEPS):
        found = torch.autograd.grad(logits[:, t].exp().sum(), seen, retain_graph=True, allow_unused=True)
        each = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(seen, found, strict=True)]
        by_step = torch.stack(each, 1) if len(each) == STEPS else each[0]
        assert by_step[:, : t + 1].abs().amax((0, 2)).min() > 0
        assert not by_step[:, t + 1 :].any()


# -- the memory --------------------------------------------------------------------------------------------------------


@decoders()
def test_hidden_vectors_have_no_effect(key: str) -> None:
    decoder, memory, mask = example(key), memories(), hiding(1, PLACES - 1)
    tokens = given(decoder, memory)
    found = []
    for garbage in (0.0, 7.0, 1e30, float("inf"), float("nan")):
        changed = memory.masked_fill(~mask[..., None], garbage).requires_grad_()
        logits, weights = decoder(changed, tokens, mask)
        assert not weights[..., :PLACES][~mask[:, None].expand(-1, STEPS, -1)].any()
        made = decoder.generate(changed, first(decoder, memory), 4, mask=mask, beams=2)
        grads = gradients(logits.softmax(-1), [changed, *decoder.parameters()])
        assert not grads[0][~mask].any()
        found.append((logits.exp(), weights, made.tokens, made.log_prob, *grads))
    for others in found[1:]:
        for one, other in zip(others, found[0], strict=True):
            assert_near(one, other, 1e-12)


@decoders()
def test_hidden_vectors_are_as_none(key: str) -> None:
    """A memory with hidden vectors gives what the memory without them gives."""
    decoder, memory, kept = example(key), memories(), [0, 2, 3]
    mask = torch.zeros(BATCH, PLACES, dtype=torch.bool)
    mask[:, kept] = True
    tokens = given(decoder, memory[:, kept])
    full = tokens if decoder.vocab is not None else torch.where(tokens < 0, tokens, torch.tensor(kept)[tokens])
    padded, cut = decoder(memory, full, mask), decoder(memory[:, kept], tokens)
    slots = [*kept, *range(PLACES, padded.weights.shape[2])]
    assert_near(padded.weights[..., slots], cut.weights, 1e-12)
    chosen = slots if decoder.vocab is None else slice(None)
    assert_near(padded.logits[..., chosen].exp(), cut.logits.exp(), 1e-12)


@decoders()
def test_weights_add_up_to_one_over_the_real_memory(key: str) -> None:
    decoder, memory, mask = example(key), memories(), hiding(0, 3)
    weights = decoder(memory, given(decoder, memory), mask).weights
    assert (weights >= 0).all()
    assert_near(weights.sum(-1), torch.ones(BATCH, STEPS, dtype=torch.float64), 1e-12)


@decoders()
def test_the_memory_has_an_effect(key: str) -> None:
    decoder, memory = example(key), memories().requires_grad_()
    logits = decoder(memory, given(decoder, memory)).logits
    (grad,) = torch.autograd.grad(logits[:, -1].softmax(-1)[:, 0].sum(), memory)
    assert (grad.abs().amax(-1) > 0).any(-1).all()


# -- generation --------------------------------------------------------------------------------------------------------


@decoders()
def test_greedy_tokens_are_the_likeliest_of_forward(key: str) -> None:
    decoder, memory, mask = example(key), memories(batch=BATCH), hiding(2)
    begun = given(decoder, memory)[:, 0]
    tokens, log_prob = decoder.generate(memory, first(decoder, memory), STEPS, mask=mask)
    logits = decoder(memory, torch.cat([begun[:, None], tokens[:, :-1]], 1), mask).logits
    assert torch.equal(logits.argmax(-1), tokens)
    assert_near(log_prob, logits.log_softmax(-1).amax(-1).sum(-1), 1e-10)
    assert len(tokens.unique()) > 1


def plain_beam(decoder: Seq2Seq, memory: Tensor, begun: int, steps: int, beams: int) -> tuple[list[int], float]:
    """Search for one example, with every prefix computed from the start."""
    kept = [((), 0.0)]
    for _ in range(steps):
        every = []
        for prefix, total in kept:
            logits = decoder(memory[None], torch.tensor([[begun, *prefix]])).logits[0, -1]
            every += [((*prefix, token), total + gain) for token, gain in enumerate(logits.log_softmax(-1).tolist())]
        kept = sorted(every, key=lambda one: -one[1])[:beams]
    return list(kept[0][0]), kept[0][1]


@pytest.mark.parametrize("beams", [2, 3])
@decoders()
def test_beams_carry_every_state(key: str, beams: int) -> None:
    """A search that computes each prefix anew finds the same: every part of a state follows its sequence."""
    decoder, memory = example(key), memories(3)
    begun = given(decoder, memory)[:, 0]
    tokens, log_prob = decoder.generate(memory, first(decoder, memory), STEPS, beams=beams)
    for i in range(BATCH):
        expected, total = plain_beam(decoder, memory[i], int(begun[i]), STEPS, beams)
        assert tokens[i].tolist() == expected
        assert abs(log_prob[i].item() - total) < 1e-9
    assert_near(log_prob, likelihood(decoder, memory, begun, tokens), 1e-9)


@pytest.mark.parametrize("stop", [None, 1])
@decoders()
def test_a_beam_as_wide_as_the_tree_finds_the_best(key: str, stop: int | None) -> None:
    decoder, memory = example(key), memories(4)
    begun = given(decoder, memory)[:, 0]
    every = every_sequence(decoder.vocab_of(memory), 3, stop)
    tokens, log_prob = decoder.generate(memory, first(decoder, memory), 3, beams=len(every), stop=stop)
    for i in range(BATCH):
        beside = memory[i : i + 1].expand(len(every), -1, -1)
        each = likelihood(decoder, beside, begun[i].expand(len(every)), every)
        assert abs(log_prob[i].item() - each.max().item()) < 1e-9
        assert tokens[i].tolist() == every[each.argmax()].tolist()


@decoders()
def test_a_stop_token_ends_a_sequence(key: str) -> None:
    decoder, memory = example(key), memories(5)
    begun = given(decoder, memory)[:, 0]
    free = decoder.generate(memory, first(decoder, memory), STEPS).tokens
    for stop in free[0].unique().tolist():
        ended = decoder.generate(memory, first(decoder, memory), STEPS, stop=stop)
        assert ended.tokens.shape == (BATCH, STEPS)
        for row, whole in zip(ended.tokens.tolist(), free.tolist(), strict=True):
            end = whole.index(stop) + 1 if stop in whole else STEPS
            assert row == whole[:end] + [-1] * (STEPS - end)
        assert_near(ended.log_prob, likelihood(decoder, memory, begun, ended.tokens), 1e-9)


@decoders()
def test_examples_are_independent(key: str) -> None:
    decoder, memory, mask = example(key), memories(), hiding(2)
    tokens = given(decoder, memory)
    begun = first(decoder, memory)
    together = decoder(memory, tokens, mask)
    made = decoder.generate(memory, begun, STEPS, mask=mask, beams=2)
    for i in range(BATCH):
        one = slice(i, i + 1)
        for alone, all_of_them in zip(decoder(memory[one], tokens[one], mask[one]), together, strict=True):
            assert_near(alone.exp(), all_of_them[one].exp(), 1e-12)
        own = decoder.generate(memory[one], None if begun is None else begun[one], STEPS, mask=mask[one], beams=2)
        assert torch.equal(own.tokens, made.tokens[one])
        assert_near(own.log_prob, made.log_prob[one], 1e-10)


@decoders()
def test_generation_leaves_no_graph(key: str) -> None:
    decoder, memory = example(key), memories()
    assert not decoder.generate(memory, first(decoder, memory), 2, beams=2).log_prob.requires_grad


# -- parameters and numbers --------------------------------------------------------------------------------------------


@decoders()
def test_gradients_reach_every_parameter(key: str) -> None:
    decoder, memory = example(key).train(), memories()
    out = decoder(memory, given(decoder, memory)).logits.softmax(-1)
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    grads = gradients(out, parameters)
    assert {name for name, grad in zip(names, grads, strict=True) if not grad.any()} == TRAINED_ELSEWHERE.get(
        key, set()
    )
    assert all(grad.isfinite().all() for grad in grads)


@decoders()
def test_a_state_dict_makes_a_twin(key: str) -> None:
    decoder, memory = example(key), memories()
    tokens, twin = given(decoder, memory), copy.deepcopy(decoder)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(decoder.state_dict())
    assert torch.equal(twin(memory, tokens).logits, decoder(memory, tokens).logits)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@decoders()
def test_narrow_numbers(key: str, dtype: torch.dtype, near: float) -> None:
    decoder, memory = example(key).to(dtype), memories().to(dtype)
    tokens = given(decoder, memory)
    narrow, wide = decoder(memory, tokens), copy.deepcopy(decoder).double()(memory.double(), tokens)
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == dtype
        assert (one.double().exp() - other.exp()).norm() < near * other.exp().norm()
    made = decoder.generate(memory, first(decoder, memory), 3, beams=2)
    assert made.log_prob.dtype == torch.float32
    assert made.tokens.shape == (BATCH, 3)


@decoders(lambda decoder: decoder.takes_state)
def test_the_state_of_a_call_has_an_effect(key: str) -> None:
    decoder, memory = example(key), memories()
    tokens, begun = given(decoder, memory), given(decoder, memory)[:, 0]
    state = tree_map(lambda x: x.double(), decoder.example_state(BATCH))
    zeros = tree_map(torch.zeros_like, state)
    plain, begun_with = decoder(memory, tokens), decoder(memory, tokens, state=state)
    assert_near(decoder(memory, tokens, state=zeros).logits, plain.logits, 1e-12)
    assert (begun_with.logits - plain.logits).abs().amax((1, 2)).min() > 1e-2
    made = decoder.generate(memory, first(decoder, memory), STEPS, state=state).tokens
    logits = decoder(memory, torch.cat([begun[:, None], made[:, :-1]], 1), state=state).logits
    assert torch.equal(logits.argmax(-1), made)
    with pytest.raises(ShapeError, match="state must be"):
        decoder(memory, tokens, state=memory)


# -- refusals ----------------------------------------------------------------------------------------------------------


@decoders()
def test_malformed_calls(key: str) -> None:
    decoder, memory = example(key), memories()
    tokens, begun = given(decoder, memory), given(decoder, memory)[:, 0]
    low, high = -int(decoder.has_start), decoder.vocab_of(memory) - 1
    for bad in (memory[0], memory[..., 1:], memory[:, :0], None):
        with pytest.raises(ShapeError, match=rf"memory must be \(B, S, D={DIM}\) with S > 0; got"):
            decoder(bad, tokens)
        with pytest.raises(ShapeError, match=r"memory must be \(B, S"):
            decoder.generate(bad, begun, 2)
    for bad in (tokens[0], tokens[1:], tokens[:, :0], tokens.double(), None):
        with pytest.raises(ShapeError, match=rf"tokens must be whole numbers \(B={BATCH}, T\) with T > 0; got"):
            decoder(memory, bad)
    for bad in (tokens.clamp(max=0) + high + 2, tokens.clamp(max=0) - 2):
        with pytest.raises(ShapeError, match=rf"tokens must be in {low}\.\.{high}; got"):
            decoder(memory, bad)
    for bad in (tokens, begun[1:], begun.double(), 0):
        with pytest.raises(ShapeError, match=rf"first must be whole numbers \(B={BATCH},\); got"):
            decoder.generate(memory, bad, 2)
    with pytest.raises(ShapeError, match=r"mask must be bool \(B, S\)"):
        decoder(memory, tokens, torch.ones(BATCH, PLACES + 1, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"mask must be bool \(B, S\)"):
        decoder(memory, tokens, torch.ones(BATCH, PLACES))


@decoders()
def test_malformed_options_of_generation(key: str) -> None:
    decoder, memory = example(key), memories()
    begun = given(decoder, memory)[:, 0]
    for options, message in (
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"steps": 2, "beams": 0}, "beams=0 must be a whole number, at least 1"),
        ({"steps": 2, "stop": 99}, r"stop=99 must be in 0\.\."),
    ):
        with pytest.raises(OptionError, match=message):
            decoder.generate(memory, begun, **options)
    if not decoder.has_start:
        with pytest.raises(ShapeError, match="first must be whole numbers"):
            decoder.generate(memory, None, 2)
    if not decoder.takes_state:
        with pytest.raises(OptionError, match=rf"must be None: {decoder.name} makes its first state from the memory"):
            decoder(memory, given(decoder, memory), state=memory)


@pytest.mark.parametrize("key", SYSTEMS)
def test_sizes_of_zero_are_refused(key: str) -> None:
    sizes = [(0, VOCAB), (DIM, 0)] if example(key).vocab is not None else [(0, VOCAB)]
    for dim, vocab in sizes:
        with pytest.raises(OptionError, match="=0 must be a whole number, at least 1"):
            SYSTEMS[key].example(dim, vocab)
