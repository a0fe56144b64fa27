"""The contract of cache policies: every policy of the catalogue meets it, at the budgets that `compare` uses."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import FoveateError, OptionError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.kv import Policy, ScorePolicy
from foveate.kv.base.encoding import EncodingPolicy
from tests.contracts.policies import (
    CASES,
    LENGTHS,
    PADDINGS,
    PIECES,
    POLICIES,
    VOCAB,
    Batch,
    batch_error,
    encodes,
    here,
    learnt,
    live_bytes,
    policy,
    subject,
)  # fmt: skip
from tests.support import host_models

EVERY = pytest.mark.parametrize("key", POLICIES)
CASE = pytest.mark.parametrize("key, variant", CASES, ids=[f"{key}-{name}" if name else key for key, name in CASES])
TOTAL = LENGTHS[0] + 6


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- exact limits ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("name", ["llama", "windowed", "hybrid"])
@torch.no_grad()
def test_a_full_budget_is_the_model_bit_for_bit(key: str, name: str) -> None:
    method = policy(key, 1.0, TOTAL, name=name)
    for side in ("none",) if name == "hybrid" else ("left", "right"):
        batch = Batch.of([LENGTHS[0]] * 2 if side == "none" else LENGTHS, side, 6)
        for pieces in PIECES.values() if name == "llama" else [PIECES["chunks"]]:
            expected = batch.feed(subject(name), pieces)
            with apply(subject(name), method):
                got = batch.feed(subject(name), pieces)
            for a, b in zip(got, expected, strict=True):
                if name == "windowed" and (
                    method.evicts or encodes(key)
                ):  # a window's slots are summed in another order
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
                else:
                    assert torch.equal(a, b), (side, pieces)


# -- a budget ----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("name", ["deep", "hybrid", "windowed"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
@torch.no_grad()
def test_a_budget_is_what_is_kept_or_read(key: str, name: str, budget: float) -> None:
    """A policy that evicts keeps its share of the bytes; the others read their share of the keys.

    Each head may have one token more (the newest), half a token for rounding, and a 32nd of its buffer as room. A
    policy that evicts nothing reads its share in the layers that see all tokens. A policy with dense layers cannot read
    less than those do, here four of twenty. A policy that encodes holds its share of the bytes, positions included.
    One that decodes densely reads its share of the prompt's tiles.
    """
    if name == "deep" and (POLICIES[key].evicts or encodes(key)):
        name = "llama"  # depth only matters for policies with dense layers
    budget = max(budget, POLICIES[key].least(here(name), 160))
    length, cache = 160, DynamicCache(config=subject(name).config)
    method = policy(key, budget, length, name=name)
    if method.decodes_densely:
        shares = prompt_shares(method, name, length)
        if name == "windowed":  # windows and soft caps in every layer: the model's own attention
            assert not shares
        else:
            assert 0.5 * budget <= sum(shares) / len(shares) <= budget + 0.02
        return
    steps = min(getattr(method, "stride", 1), 16)
    layers = [layer for layer in range(len(subject(name).model.layers)) if _attends(name, layer)]
    far = [layer for layer in layers if (name, layer) != ("windowed", 0)]
    with apply(subject(name), method) as run:
        subject(name)(prompt(1, length - 1), past_key_values=cache)
        for step in range(steps):
            subject(name)(prompt(1, 1, step), past_key_values=cache)
        if encodes(key):
            assert run.stats.kept <= budget + 1e-9
            assert run.stats.cache_bytes == sum(cache.layers[layer].store.needed_bytes for layer in layers)
            assert all(cache.layers[layer].store.codes is not None for layer in far)
            assert isinstance(method, EncodingPolicy)
            assert all(_whole(cache.layers[layer]) >= method.residual for layer in far)
        elif method.evicts:
            token = 2 * 2 * 8 * subject(name).dtype.itemsize  # keys and values, heads, width
            stored = sum(_bytes(cache.layers[layer]) for layer in layers)
            full = len(layers) * (length - 1 + steps) * token
            assert stored * (1 + method.tables) <= budget * full * (1 + 1 / 32) + 1.5 * len(layers) * token
            assert stored >= 0.5 * budget * len(far) / len(layers) * full
            assert run.stats.kept <= budget + 1.5 / length
        elif name == "deep" and steps == getattr(method, "stride", 1):
            shallow = key == "tidal_decode" and budget < 0.25  # four of its twenty layers are dense
            assert run.stats.read <= (0.2 + 0.8 * budget if shallow else budget) + 0.02
            assert run.stats.read >= 0.5 * budget
        if not method.evicts and not encodes(key):
            assert run.stats.kept == 1.0 or name == "windowed"
            read = [run.stats.of(cache).layers[layer] for layer in far]
            assert min(one.read / one.decodes for one in read) < 1.0


def prompt_shares(method: Policy, name: str, length: int) -> list[float]:
    """Read a prompt, and return the share of its causal pairs that each layer's selection holds."""
    shares: list[float] = []

    class Watch(Method):
        def read(self, site: Site, out: Tensor) -> None:
            shares.extend(selection.density(causal=True) for selection in site.selections)

    with apply(subject(name), method, Watch()):
        subject(name)(prompt(1, length), past_key_values=DynamicCache(config=subject(name).config))
    return shares


def _attends(name: str, layer: int) -> bool:
    return name != "hybrid" or layer % 2 == 1


def _bytes(layer: Any) -> int:
    kept = [x for group in layer.store.groups for x in (group._buffer.k, group._buffer.v)]
    for chunk in [] if layer.store.codes is None else layer.store.codes.chunks:
        kept += [*chunk.k.values(), *chunk.v.values(), chunk.positions]
    return sum(x.untyped_storage().nbytes() for x in kept)


def _whole(layer: Any) -> int:
    """Count the tokens of a head that are held in full precision."""
    return min(group.length - group.holes[1] for group in layer.store.groups)


@EVERY
@torch.no_grad()
def test_a_budget_that_is_too_small_is_refused_by_name(key: str) -> None:
    least = POLICIES[key].least(here(), 160)
    if not encodes(key):
        assert least == 0.0
        return
    with pytest.raises(OptionError, match=r"^budget=.* is less than the .* of the bytes of 160 tokens") as caught:
        POLICIES[key].at_budget(0.99 * least, here(), 160)
    assert "\n" not in str(caught.value)


@EVERY
def test_calibration_without_data_is_refused_or_needs_none(key: str) -> None:
    reason = ""
    try:
        POLICIES[key].calibrate(here("llama"), iter(()))
    except OptionError as error:
        reason = str(error)
    assert not reason or reason.startswith("data must hold")


@EVERY
@pytest.mark.parametrize("bad", [{"budget": -0.1}, {"budget": 1.5}, {"budget": "a"}, {"length": 0}, {"length": 2.5}])
def test_a_bad_budget_is_refused_by_name(key: str, bad: dict[str, Any]) -> None:
    given = {"budget": 0.25, "length": 100, **bad}
    with pytest.raises(FoveateError, match=f"^{next(iter(bad))}="):
        POLICIES[key].at_budget(given["budget"], here(), given["length"], **learnt(key, "llama"))


# -- batches -----------------------------------------------------------------------------------------------------------


@CASE
@pytest.mark.parametrize("side, pieces", PADDINGS)
def test_a_sequence_gets_the_same_result_in_a_batch_and_alone(key: str, variant: str, side: str, pieces: str) -> None:
    """Prompts are read whole, in chunks or token by token, at a budget that changes the result."""
    method = policy(key, 0.25, TOTAL, variant)
    off, got = batch_error(subject("llama"), side, pieces, lambda: apply(subject("llama"), method))
    assert off < 1e-5  # a summary and a selection are made in float32
    if pieces == "decode":
        with torch.no_grad():
            full = Batch.of(LENGTHS, side, 6).feed(subject("llama"), PIECES[pieces])
        assert min(float((a - b)[-6:].abs().max()) for a, b in zip(got, full, strict=True)) > 1e-3


@EVERY
def test_windows_and_soft_caps_in_a_padded_batch(key: str) -> None:
    """The batch is padded on the left: the model's own windows count padding that lies within them."""
    method = policy(key, 0.25, TOTAL, name="windowed")
    for pieces in ("chunks",):
        off, _ = batch_error(subject("windowed"), "left", pieces, lambda: apply(subject("windowed"), method))
        assert off < 1e-4, (pieces, off)


@EVERY
@torch.no_grad()
def test_beams(key: str) -> None:
    """A beam's cache and a method's notes are reordered together: each sequence gets the same beams as alone."""
    method, batch = policy(key, 0.25, 30), Batch.of((24, 15), "left", 0)

    def search(ids: Tensor, mask: Tensor) -> Tensor:
        with apply(subject("llama"), method):
            made = subject("llama").generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=False)
        return made[:, -8:]

    together = search(batch.ids, batch.mask)
    for row in range(2):
        single, _ = batch.row(row, [24])
        assert torch.equal(together[row : row + 1], search(single.ids, single.mask))


def test_two_threads_on_one_run_with_a_cache_each() -> None:
    names, found = list(POLICIES), {}

    def generate(name: str, seed: int) -> None:
        with torch.no_grad():
            found[name, seed] = Batch.of((30,), "none", 8, seed).feed(subject("llama"), [30, *[1] * 8])[0]

    for key in names:
        method = policy(key, 0.25, 38)
        with apply(subject("llama"), method):
            for seed in (1, 2):
                generate("alone", seed)
            threads = [threading.Thread(target=generate, args=("together", seed)) for seed in (1, 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for seed in (1, 2):
            assert torch.equal(found["alone", seed], found["together", seed]), key
        found.clear()


#: Policies under which drafted queries may see other keys than without drafts, with the reason.
OTHER_DRAFTS = {
    "razor_attention": "drafted queries see the tokens themselves in place of their summary",
    "finch": "keys are rotated once the drafts are accepted, for all of them together",
    "act_qkv": "layers share a budget by the step before, which drafts of one call do not have",
    "kivi": "tokens are encoded once the drafts are accepted", "turboquant": "the same", "think": "the same",
    "eight_bit": "the same",
}  # fmt: skip


@CASE
@torch.no_grad()
def test_drafts_do_not_change_the_text(key: str, variant: str) -> None:
    """Prompt lookup reads several tokens at once. A policy drops and chooses as it does token by token."""
    if key in OTHER_DRAFTS:
        pytest.skip(OTHER_DRAFTS[key])
    method, sizes = policy(key, 0.25, 40, variant), []

    def text(seed: int, **options: Any) -> Tensor:
        ids = prompt(1, 6, seed).repeat(1, 6)
        with apply(subject("llama"), method):
            return subject("llama").generate(ids, max_new_tokens=20, do_sample=False, **options)

    def note_size(module: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        sizes.append(options["input_ids"].shape[1])

    for seed in range(16):
        expected = text(seed)
        hook = subject("llama").register_forward_pre_hook(note_size, with_kwargs=True)
        try:
            assert torch.equal(text(seed, prompt_lookup_num_tokens=4), expected), seed
        finally:
            hook.remove()
        if seed >= 3 and len(sizes) < (seed + 1) * 20:
            break
    assert 1 < max(size for size in sizes if size < 36) and len(sizes) < 16 * 20  # some drafts were accepted


# -- memory ------------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_live_memory_is_what_is_kept(key: str) -> None:
    """All live tensors, after the prompt and after 60 steps, take what is kept, a tenth more, and a constant.

    The constant covers, for each layer, its heads' row of a table (8 bytes), a start and a length. The tenth covers a
    slot's position (4 bytes), beside its 128 bytes in float64 with heads of width 8. A whole prompt's queries or states
    would be ten times as much. A policy with tables of its own says how large they are.
    """
    model, length = subject("llama"), 400
    budget = max(0.25, POLICIES[key].least(here(), length))
    method, constant = policy(key, budget, length), 4 * 1024
    with apply(model, method):
        model(prompt(1, 2), past_key_values=DynamicCache())  # tables that are made once
    before, cache = live_bytes(), DynamicCache()
    with apply(model, method):
        ids = prompt(1, length)
        model(ids, past_key_values=cache)
        del ids
        for steps in (0, 60):
            for step in range(steps):
                model(prompt(1, 1, step), past_key_values=cache)
            kept = sum(_held(layer) for layer in cache.layers)
            assert live_bytes() - before <= (1.1 + method.tables) * kept + constant, steps
            later = steps if isinstance(method, ScorePolicy) else 0.3 * steps  # those drop no token that is made
            if encodes(key):
                tokens = 1.05 * budget * (length + steps)
            else:
                tokens = 0.3 * length + later if method.evicts else 1.04 * (length + steps)
            assert kept <= 3 * tokens * 2 * 2 * 8 * 8
    del cache
    assert live_bytes() - before <= constant


def _held(layer: Any) -> int:
    return _bytes(layer) if hasattr(layer, "store") else sum(x.numel() * 8 for x in (layer.keys, layer.values))


# -- models ------------------------------------------------------------------------------------------------------------


@EVERY
def test_models_without_a_cache_are_refused_on_entering(key: str) -> None:
    for name in ("bert", "vit"):
        with pytest.raises(UnsupportedModel, match="has no decoder"), apply(host_models.model(name), _any(key)):
            pass


def _any(key: str) -> Any:
    return policy(key, 0.25, 40)


@EVERY
@torch.no_grad()
def test_a_call_without_a_cache_is_refused(key: str) -> None:
    method, ids = policy(key, 0.25, 40), prompt(1, 40)
    with (
        apply(subject("llama"), method),
        pytest.raises(OptionError, match=f"{type(method).__name__} acts on the cache, and this call has none"),
    ):
        subject("llama")(ids, use_cache=False)
