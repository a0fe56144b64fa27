"""`drop` takes tokens out of the stream between blocks: those that stay give what they give by hand.

By hand is: plain blocks called one by one on the tokens that are left, with their rows and columns of the mask and
their own positions. A decoder is causal, so that a token that is generated is one more token of such a pass.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, Site, Spans, apply
from foveate.host.stream import Stream
from foveate.kv.sink_recent import SinkRecent
from tests.contracts.architectures import build
from tests.contracts.policies import subject, trace
from tests.support.dropping import Drops, behind, by_hand, some
from tests.support.host_models import DECODERS, SLIDING, Reads, feed, model, padded, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*attention mask.*")

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def blocks(name: str) -> nn.ModuleList:
    return model(name).get_decoder().layers


def logits_of(name: str, hidden: Tensor) -> Tensor:
    """Return the logits of the last block's output."""
    subject = model(name)
    out = subject.lm_head(subject.get_decoder().norm(hidden))
    cap = getattr(subject.config, "final_logit_softcapping", None)
    return out if cap is None else torch.tanh(out / cap) * cap


def expected(name: str, ids: Tensor, drops: dict[int, Tensor], positions: Tensor | None = None) -> Tensor:
    """Return the logits of what is left of one sequence, by hand."""
    hidden, _ = by_hand(model(name), blocks(name), drops, input_ids=ids, position_ids=positions)
    return logits_of(name, hidden)[0]


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layer", [-1, 0, 1])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_what_is_left_is_what_it_is_by_hand(name: str, layer: int, use_cache: bool) -> None:
    """Also behind a window, which ends at a distance in the sequence. Each sequence keeps other tokens."""
    ids, keep = tokens(2, 14), some(2, 14, 8)
    with apply(model(name), behind(layer, keep)) as run:
        got = model(name)(ids, use_cache=use_cache).logits
    assert got.shape[:2] == (2, 14)
    for row in range(2):
        torch.testing.assert_close(got[row, keep[row]], expected(name, ids[row : row + 1], {layer: keep[row]}), **CLOSE)
    assert run.streams["text"].counts == [14] * (layer + 1) + [8] * (2 - layer)
    assert not torch.allclose(got[keep], model(name)(ids).logits[keep], atol=1e-2)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_two_drops(name: str) -> None:
    ids, first, second = tokens(1, 14), some(1, 14, 11), some(1, 14, 9, seed=1)
    both = first & second

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        if layer == 1:
            assert stream.index is not None
            return second.gather(1, stream.index)
        return first if layer == 0 else None

    with apply(model(name), Drops(choose)):
        got = model(name)(ids).logits[0, both[0]]
    torch.testing.assert_close(got, expected(name, ids, {0: first[0], 1: both[0]}), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_padded_batches_and_rows_that_keep_different_numbers(name: str, use_cache: bool, side: str) -> None:
    ids, mask = padded(tokens(2, 14), side)
    keep = torch.stack([some(1, 14, 10)[0], some(1, 14, 7, seed=1)[0]])
    keep[0, [9, 13]] = True
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with apply(model(name), behind(0, keep)):
        got = model(name)(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
    for row in range(2):
        real = mask[row].bool()
        alone = expected(name, ids[row : row + 1, real], {0: keep[row, real]})
        torch.testing.assert_close(got[row, real & keep[row]], alone, **CLOSE)


@pytest.mark.parametrize("layer", [-1, 0, 1])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generation_goes_on_at_the_right_positions(name: str, layer: int) -> None:
    """Greedy, with the prompt padded on the left: each token is the best one of a pass by hand over all before it."""
    (ids, mask), keep, new = padded(tokens(2, 14), "left"), some(2, 14, 8), 6
    with apply(model(name), behind(layer, keep)):
        made = model(name).generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        again = model(name).generate(
            ids, attention_mask=mask, max_new_tokens=new, num_beams=3, num_return_sequences=3, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    for row in range(2):
        real = torch.cat([mask[row].bool(), torch.ones(new, dtype=torch.bool)])
        stays = torch.cat([keep[row], torch.ones(new, dtype=torch.bool)])[real]
        logits = expected(name, made[row : row + 1, real], {layer: stays})
        assert torch.equal(logits[-new - 1 : -1].argmax(-1), made[row, -new:])
    for sequence, score in zip(again.sequences, again.sequences_scores, strict=True):
        row = int((ids == sequence[:14]).all(1).nonzero()[0, 0])
        real = torch.cat([mask[row].bool(), torch.ones(new, dtype=torch.bool)])
        stays = torch.cat([keep[row], torch.ones(new, dtype=torch.bool)])[real]
        logits = expected(name, sequence[None, real], {layer: stays}).log_softmax(-1)[-new - 1 : -1]
        picked = logits.gather(1, sequence[-new:, None])[:, 0]
        torch.testing.assert_close(picked.sum() / new, score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_later_turns_and_chunks_drop_of_their_own_tokens(name: str) -> None:
    """Three calls with a cache: the first two drop, the third does not, and all see what is left of those before."""
    ids, keep = tokens(2, 20), some(2, 20, 12, last=5)
    keep[:, [7, 14]] = True

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        return keep[:, stream.past : stream.past + stream.tokens] if layer == 0 else None

    with apply(model(name), Drops(choose)):
        got = feed(model(name), ids, torch.ones_like(ids), [8, 7, 1, 4]).view(2, 20, -1)
    for row in range(2):
        torch.testing.assert_close(got[row, keep[row]], expected(name, ids[row : row + 1], {0: keep[row]}), **CLOSE)


@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_a_mask_of_the_callers_own(kind: str) -> None:
    ids, keep = tokens(1, 14), some(1, 14, 8)
    allowed = (torch.rand(1, 1, 14, 14, generator=torch.Generator().manual_seed(1)) > 0.4) | torch.eye(14).bool()
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
    hidden, _ = by_hand(
        model("llama"), blocks("llama"), {0: keep[0]}, input_ids=ids,
        attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, -1e9),
    )  # fmt: skip
    for use_cache in (True, False):
        with apply(model("llama"), behind(0, keep)):
            got = model("llama")(ids, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(got[0, keep[0]], logits_of("llama", hidden)[0], **CLOSE)


@pytest.mark.parametrize("name", ["bert", "vit"])
@torch.no_grad()
def test_encoders(name: str) -> None:
    encoder = model(name)
    if name == "vit":
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        inputs, n, stack = {"pixel_values": images}, 17, encoder.vit.layers
    else:
        inputs, n, stack = {"input_ids": tokens(2, 12)}, 12, encoder.bert.encoder.layer
    keep = some(2, n, 7)
    keep = keep.flip(1) if name == "vit" else keep

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        return keep if layer == 0 else None

    part = "image" if name == "vit" else "text"
    with apply(encoder, Drops(choose, drops_in=(part,))) as run:
        states = encoder(**inputs, output_hidden_states=True).hidden_states
    plain = encoder(**inputs, output_hidden_states=True).hidden_states
    assert run.streams[part].counts == [n, int(keep[0].sum())] and states[1].shape == states[2].shape == plain[1].shape
    torch.testing.assert_close(states[1], plain[1], **CLOSE)
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        hidden, _ = by_hand(encoder, stack, {0: keep[row]}, **alone)
        torch.testing.assert_close(states[2][row, keep[row]], hidden[0], **CLOSE)
        assert torch.equal(states[2][row, ~keep[row]], states[1][row, ~keep[row]])


# -- renumbered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", sorted({*DECODERS} - {*SLIDING}))
@torch.no_grad()
def test_dropped_before_the_first_block_and_renumbered_is_a_shorter_prompt(name: str, side: str) -> None:
    (ids, mask), keep, new = padded(tokens(2, 14), side), some(2, 14, 8), 6
    plain = [
        model(name).generate(ids[row : row + 1, keep[row] & mask[row].bool()], max_new_tokens=new, do_sample=False)
        for row in range(2)
    ]
    for beams in (1, 3):
        if beams > 1:
            plain = [
                model(name).generate(
                    ids[row : row + 1, keep[row] & mask[row].bool()], max_new_tokens=new, do_sample=False, num_beams=3
                )
                for row in range(2)
            ]
        with apply(model(name), behind(-1, keep, renumbers=True)):
            made = model(name).generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, num_beams=beams)
        for row in range(2):
            assert torch.equal(made[row, 14:], plain[row][0, -new:])


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_renumbered_between_blocks(name: str) -> None:
    """By hand, the blocks behind get embeddings of consecutive positions, also in later calls, which drop too.

    A window counts in the sequence, whatever the numbers are.
    """
    ids, keep, decoder = tokens(2, 18), some(2, 18, 12, last=5), model(name).get_decoder()
    keep[:, 7] = True

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        return keep[:, stream.past : stream.past + stream.tokens] if layer == 0 else None

    def rotate(number: int, hidden: Tensor, left: Tensor) -> Any:
        kind = [decoder.config.layer_types[number]] if name == "gemma3" else []
        return decoder.rotary_emb(hidden, torch.arange(len(left))[None], *kind)

    with apply(model(name), Drops(choose, renumbers=True)):
        cache = DynamicCache(config=model(name).config)
        got = feed(model(name), ids, torch.ones_like(ids), [8, 6, 1, 3], cache).view(2, 18, -1)
    for row in range(2):
        hidden, _ = by_hand(model(name), blocks(name), {0: keep[row]}, rotate, input_ids=ids[row : row + 1])
        torch.testing.assert_close(got[row, keep[row]], logits_of(name, hidden)[0], **CLOSE)


def test_numbers_that_are_missing() -> None:
    """Dropped tokens count before those that are left; dropped padding has no number. A second drop adds to it."""
    real = torch.tensor([[False, False, True, True, True, True, True]])
    stream, hidden = Stream("text", 3, 1, 7, real=real), torch.arange(7.0).view(1, 7, 1)
    keep = torch.tensor([[False, True, True, False, True, True, True]])
    left = stream.narrow(keep, hidden, "x", True)
    assert stream.index is not None and stream.shift is not None and stream.later_shift is not None
    assert left.flatten().tolist() == stream.index[0].tolist() == [1, 2, 4, 5, 6]
    assert stream.shift.tolist() == [[0, 0, 1, 1, 1]] and stream.later_shift.tolist() == [1]
    again = stream.narrow(torch.tensor([[True, False, True, True, True]]), left + 10, "x", True)
    assert again.flatten().tolist() == [11, 14, 15, 16] and stream.index.tolist() == [[1, 4, 5, 6]]
    assert stream.shift.tolist() == [[0, 2, 2, 2]] and stream.later_shift.tolist() == [2]
    assert stream.restore(again * 10).flatten().tolist() == [0, 110, 12, 3, 140, 150, 160]


def test_a_renumbered_cache_is_used_with_a_method_that_drops() -> None:
    llama, ids, keep = model("llama"), tokens(1, 10), some(1, 10, 6)
    cache = DynamicCache()
    with torch.no_grad(), apply(llama, behind(-1, keep, renumbers=True)) as run:
        llama(ids, past_key_values=cache)
        copied = copy.deepcopy(cache)
        expected = llama(tokens(1, 1), past_key_values=copied).logits
    for methods in ((), (SinkRecent(2, 20),)):
        with torch.no_grad(), pytest.raises(UnsupportedModel, match="took other positions"), apply(llama, *methods):
            llama(tokens(1, 1), past_key_values=copy.deepcopy(cache))
    with pytest.raises(UnsupportedModel, match="took other positions"):
        llama(tokens(1, 1), past_key_values=copy.deepcopy(cache))
    with torch.no_grad(), apply(llama, behind(-1, keep)):
        assert torch.equal(llama(tokens(1, 1), past_key_values=cache).logits, expected)
    assert run.streams["text"].index is not None


@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 1, 1]])
@torch.no_grad()
def test_a_reordered_cache_takes_the_numbers_of_its_sequences_along(order: list[int]) -> None:
    """Beam search, and a server that joins batches, put another sequence in a row, which may have dropped more."""
    llama, ids, new = model("llama"), tokens(2, 14), tokens(2, 1, seed=5)
    keep = torch.stack([some(1, 14, 11)[0], some(1, 14, 5, seed=1)[0]])
    with apply(llama, behind(-1, keep, renumbers=True)):
        cache = DynamicCache()
        llama(ids, past_key_values=cache)
        assert cache.layers[0].shift.tolist() == [3, 9]
        moved = copy.deepcopy(cache)
        moved.reorder_cache(torch.tensor(order))
        assert all(layer.shift.tolist() == [[3, 9][row] for row in order] for layer in moved.layers)
        expected = llama(new, past_key_values=cache).logits[order]
        torch.testing.assert_close(llama(new[order], past_key_values=moved).logits, expected, **CLOSE)


# -- no trace, order, and what else sees it ----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, True])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_nothing_dropped_is_the_model_bit_for_bit(name: str, answer: bool | None) -> None:
    (ids, mask), seen = padded(tokens(), "left"), []

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        seen.append((layer, stream.depth))
        return None if answer is None else torch.ones(hidden.shape[:2], dtype=torch.bool)

    plain = model(name)(ids, attention_mask=mask).logits
    made = model(name).generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with apply(model(name), Drops(choose, renumbers=True)) as run:
        assert torch.equal(model(name)(ids, attention_mask=mask).logits, plain)
        assert seen == [(-1, 3), (0, 3), (1, 3)] and run.streams["text"].index is None
        assert torch.equal(model(name).generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), made)


@torch.no_grad()
def test_the_model_is_what_it_was_and_a_copy_is_plain() -> None:
    llama, ids = subject("llama"), tokens()
    before, plain = trace(llama), llama(ids).logits
    with apply(llama, behind(0, some(2, 14, 5))):
        changed, twin = llama(ids).logits, copy.deepcopy(llama)
        assert torch.equal(twin(ids).logits, plain) and not torch.equal(changed, plain)

    def fails(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        return some(2, 14, 5 // (1 - layer)) if layer >= 0 else None

    with pytest.raises(ZeroDivisionError), apply(llama, Drops(fails)):
        llama(ids)
    assert trace(llama) == before and torch.equal(llama(ids).logits, plain)


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_methods_drop_in_the_order_in_which_they_are_applied(nested: bool) -> None:
    """The second one gets what the first one leaves."""
    ids, sizes = tokens(2, 14), []

    def halve(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        if layer != 0:
            return None
        sizes.append(hidden.shape[1])
        return (torch.arange(hidden.shape[1]) % 2 == (hidden.shape[1] - 1) % 2).expand(hidden.shape[:2])

    outer, inner = [Drops(halve)], [Drops(halve)]
    if not nested:
        outer, inner = [*outer, *inner], []
    with apply(model("llama"), *outer) as run, apply(model("llama"), *inner):
        model("llama")(ids)
    assert sizes == [14, 7] and run.streams["text"].index.tolist() == [[1, 5, 9, 13]] * 2


@torch.no_grad()
def test_spans_and_edits_are_those_of_what_is_left() -> None:
    (ids, mask), keep, seen = padded(tokens(2, 14), "left"), some(2, 14, 8), []
    keep[:, 5] = True

    class Edits(Method):
        def edit_hidden(self, layer: int, hidden: Tensor, spans: Spans) -> Tensor:
            seen.append((layer, hidden.shape[1], spans["name"].sum(1).tolist(), spans["text"].sum(1).tolist()))
            return hidden

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        assert stream.spans["name"].shape == hidden.shape[:2]
        return keep if layer == 0 else None

    with apply(model("llama"), Drops(choose), Edits()) as run:
        run.spans = {"name": torch.tensor([5, 6])}
        model("llama")(ids, attention_mask=mask)
    name, text = keep[:, 5:7].sum(1).tolist(), (keep & mask.bool()).sum(1).tolist()
    n = int(keep.sum(1).max())
    assert seen[0] == (0, 14, [2, 2], [10, 14]) and seen[1] == (1, n, name, text)
    assert seen[2][:3] == (2, n, name)


@torch.no_grad()
def test_sites_see_the_positions_of_what_is_left() -> None:
    ids, keep = tokens(1, 14), some(1, 14, 8)
    places = keep[0].nonzero()[:, 0]

    def look(site: Site) -> Any:
        return site.phase, site.positions[0, 0].tolist(), site.query_positions.tolist(), site.mask is not None

    reads = Reads(look)
    with apply(model("llama"), behind(0, keep), reads) as run:
        run_out = model("llama")(ids)
        model("llama")(tokens(1, 1), past_key_values=run_out.past_key_values)
    assert reads.seen[0][1:3] == (list(range(14)), list(range(14)))
    assert reads.seen[1][:3] == reads.seen[2][:3] == ("prefill", places.tolist(), places.tolist())
    assert reads.seen[4][:3] == ("decode", [*places.tolist(), 14], [14])
    assert [layer.stored for layer in run.stats.layers] == [15 * 2, 9 * 2, 9 * 2]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_a_policy_evicts_of_what_is_left(name: str) -> None:
    """Sinks and a window count in the sequence: by hand, as masks on the tokens that are left."""
    ids, keep = tokens(1, 18), some(1, 18, 12, last=6)
    with apply(model(name), behind(0, keep[:, :13]), SinkRecent(3, 9)) as run:
        cache = DynamicCache(config=model(name).config)
        model(name)(ids[:, :13], past_key_values=cache)
        for piece in ids[:, 13:].split(1, 1):
            model(name)(piece, past_key_values=cache)
        held = [set(layer.store.padded("positions")[0, 0].tolist()) - {-1} for layer in cache.layers]
    ends = {place for place in range(18) if place < 3 or place >= 9}
    left = set(keep[0].nonzero()[:, 0].tolist())
    windows = [range(11, 18), range(18), range(11, 18)] if name == "gemma3" else [range(18)] * 3
    assert held[0] == ends & set(windows[0]) and held[1] == ends & left & set(windows[1])
    assert held[2] == ends & left & set(windows[2]) and run.stats.calls > 0


@torch.no_grad()
def test_a_later_drop_among_slots_that_a_policy_moves() -> None:
    """The policy's own record of slots begins anew: behind a drop, the same tokens stay as by position."""
    ids, cache = tokens(1, 21), DynamicCache()

    def choose(layer: int, hidden: Tensor, stream: Stream) -> Tensor | None:
        gone = torch.tensor([[True, False, True]])
        return gone if layer == 0 and stream.past and stream.tokens == 3 else None

    with apply(model("llama"), Drops(choose), SinkRecent(2, 6)):
        for piece in ids.split([10, 1, 1, 1, 1, 3, 1, 1, 1, 1], 1):
            model("llama")(piece, past_key_values=cache)
            seen = cache.get_seq_length()
            for number, layer in enumerate(cache.layers):
                held = sorted(set(layer.store.padded("positions")[0, 0].tolist()) - {-1})
                ends = [place for place in range(seen) if place < 2 or place >= seen - 6]
                assert held == [place for place in ends if number == 0 or place != 15], (seen, number)


def test_gradients() -> None:
    """They flow through what is left, and through the last states of what is dropped."""
    llama, ids, keep = copy.deepcopy(model("llama")).train(), tokens(1, 9), some(1, 9, 5)
    with apply(llama, behind(0, keep)):
        loss = llama(ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in llama.parameters())
    layer = llama.model.layers[0].mlp.down_proj
    got = layer.weight.grad.clone()
    llama.zero_grad()
    llama.set_attn_implementation("eager")
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    handles = [
        block.register_forward_pre_hook(
            lambda block, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
        )
        for block in llama.model.layers
    ]  # fmt: skip
    llama(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = whole = seen[1][0]
    left = keep[0].nonzero()[:, 0]
    hidden = hidden[:, left]
    for number in (1, 2):
        given = dict(seen[number][1])
        cos, sin = given["position_embeddings"]
        given |= {
            "attention_mask": given["attention_mask"][:, :, left][..., left],
            "position_embeddings": (cos[:, left], sin[:, left]), "position_ids": given["position_ids"][:, left],
        }  # fmt: skip
        hidden = llama.model.layers[number](hidden, **given)
    full = whole.index_copy(1, left, hidden)
    logits = llama.lm_head(llama.model.norm(full))
    nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    torch.testing.assert_close(layer.weight.grad, got, atol=1e-5, rtol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (torch.ones(2, 13, dtype=torch.bool), "drop() of Drops must be bool (2, 14), True for the tokens that stay"),
        (torch.ones(2, 14), "must be bool (2, 14)"),
        (torch.zeros(2, 14, dtype=torch.bool), "must keep at least one token of each sequence"),
        (torch.arange(14).expand(2, 14) < 9, "must keep the last token of each sequence, whose logits are read"),
    ],
)  # fmt: skip
def test_malformed_choices_are_refused(keep: Tensor, words: str) -> None:
    with pytest.raises(OptionError) as caught, apply(model("llama"), behind(0, keep)):
        model("llama")(tokens())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_models_and_calls_that_cannot_drop_are_refused() -> None:
    keep = behind(0, some(2, 14, 5))
    with pytest.raises(UnsupportedModel, match="its blocks attend to another sequence too"), apply(model("bart"), keep):
        pass
    for name in ("lfm2_moe", "gemma3n_text", "zamba2"):
        with pytest.raises(UnsupportedModel), apply(build(name), keep):
            pass
    with pytest.raises(UnsupportedModel, match="must be a DynamicCache"), apply(model("llama"), keep):
        model("llama")(tokens(), past_key_values=StaticCache(config=model("llama").config, max_cache_len=32))
    llama = copy.deepcopy(model("llama")).train()
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UnsupportedModel, match="gradient_checkpointing_disable"), apply(llama, keep):
        llama(tokens(), use_cache=False)


def test_positions_that_entered_before_the_blocks_cannot_be_renumbered() -> None:
    """GPT-2 adds them to the embeddings: original positions work, others are refused."""
    gpt2, ids, keep = build("gpt2"), torch.randint(2, 60, (2, 14)), some(2, 14, 8)
    with torch.no_grad(), apply(gpt2, behind(0, keep)):
        assert gpt2(ids).logits.shape[:2] == (2, 14)
    with pytest.raises(UnsupportedModel, match="no positions that could"), apply(gpt2, behind(0, keep, True)):
        gpt2(ids)


@torch.no_grad()
def test_a_cache_is_not_cropped_to_before_a_drop() -> None:
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, behind(0, some(2, 14, 8))):
        llama(tokens(), past_key_values=cache)
        llama(tokens(2, 3), past_key_values=cache)
        cache.crop(15)
        with pytest.raises(UnsupportedModel, match="cannot be cropped to 13"):
            cache.crop(13)
