"""Slots with weights: a weight counts as so many tokens, follows its slot, and new tokens weigh 1."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import UnsupportedModel
from foveate.host import EMPTY, Method, Site, Slots, apply
from foveate.host.slots.store import Store
from tests.support.host_models import model, tokens


def weight_of(positions: Tensor, heads: Tensor) -> Tensor:
    """A weight that tells from which token and head it comes."""
    return torch.where(positions < 0, 7.0, 2.0 + positions + 100 * heads[:, None])


def marked(kept: Slots, dropped: Slots, heads: Tensor) -> Slots:
    return replace(kept, weight=weight_of(kept.positions, heads), v=kept.v + 1)


def held(store: Store) -> list[dict[int, tuple[float, float]]]:
    """Map, for each head of each sequence, positions to weight and value."""
    parts = [store.padded(what).flatten(0, 1).tolist() for what in ("positions", "bias")]
    values = store.padded("v")[..., 0].flatten(0, 1).tolist()
    return [
        {p: (round(torch.tensor(b).exp().item(), 2), round(v, 3)) for p, b, v in zip(*row, strict=True) if p != EMPTY}
        for row in zip(*parts, values, strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_weights_follow_their_slots(seed: int) -> None:
    """Appending, dropping in place and in bulk, cropping and selecting in the batch keep what each slot holds."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 3, 40, 4, generator=torch_draw) for _ in range(2))
    store = Store.empty(k, v)
    store.append(k, v, 0)
    keep = torch.rand(2, 3, 40, generator=torch_draw) < torch.tensor([0.3, 0.5, 0.5])[:, None]
    expected = [
        {p: (2.0 + p + 100 * head, round(float(v[row, head, p, 0]) + 1, 3)) for p in range(40) if keep[row, head, p]}
        for row in range(2)
        for head in range(3)
    ]
    assert store.evict(keep, refit=marked) and store.is_weighted and not store.is_even
    assert held(store) == expected
    seen = 40
    for step in range(30):
        n = draw.choice([1, 1, 2, 5])
        k, v = (torch.randn(2, 3, n, 4, generator=torch_draw) for _ in range(2))
        store.append(k, v, seen)
        for row, one in enumerate(expected):
            one |= {seen + i: (1.0, round(float(v[row // 3, row % 3, i, 0]), 3)) for i in range(n)}
        seen += n
        if draw.random() < 0.5:
            gone = draw.sample(range(seen), 2)
            store.evict(~torch.isin(store.padded("positions"), torch.tensor(gone)))
            expected = [{p: what for p, what in one.items() if p not in gone} for one in expected]
        if draw.random() < 0.2 and seen > 42:
            seen -= 1
            store.drop_after(seen)
            expected = [{p: what for p, what in one.items() if p < seen} for one in expected]
        if draw.random() < 0.2:
            index = draw.choices(range(2), k=2)
            store = store.batch(torch.tensor(index))
            expected = [dict(expected[3 * row + head]) for row in index for head in range(3)]
        assert held(store) == expected, step


class Halves(Method):
    """A method that keeps every other token of the prompt with twice the weight."""

    evicts = True

    def keep(self, site: Site) -> Tensor | None:
        return None if site.phase == "decode" else (site.positions % 2 == 0)

    def refit(self, site: Site, kept: Slots, dropped: Slots, heads: Tensor) -> Slots:
        return replace(kept, weight=torch.where(kept.positions >= 0, 2.0, 1.0))


class Same(Method):
    """Takes the path of the whole matrix."""

    def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
        return weights


@pytest.mark.parametrize("through", ["the kernel", "the matrix", "a mask of the caller's own"])
@torch.no_grad()
def test_two_equal_tokens_are_one_of_twice_the_weight(through: str) -> None:
    llama, ids = model("llama"), torch.full((2, 20), 7)
    where = dict(position_ids=torch.zeros(2, 20, dtype=torch.long))

    def call() -> Tensor:
        cache, out = DynamicCache(), []
        llama(ids, **where, past_key_values=cache)
        for step in range(3):
            given: dict[str, Any] = dict(position_ids=torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
            if through == "a mask of the caller's own":
                given["attention_mask"] = torch.ones(2, 1, 1, 21 + step, dtype=torch.bool)
            out.append(llama(torch.full((2, 1), 9 + step), **given).logits)
        return torch.cat(out, 1)

    expected = call()
    extra = [Same()] if through == "the matrix" else []
    with apply(llama, Halves(), *extra) as run:
        torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-5)
        assert run.stats.kept == 13 / 23
        assert run.stats.cache_bytes == 3 * 2 * 2 * 13 * (2 * 8 * 4 + 4), "a weight takes four bytes"


@torch.no_grad()
def test_drafts_and_copies_change_nothing() -> None:
    llama, ids, made = model("llama"), tokens(1, 30), []
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        with apply(llama, Halves()):
            made.append(llama.generate(ids, max_new_tokens=20, do_sample=False, **options))
    assert torch.equal(*made)
    with apply(llama, Halves()):
        cache = DynamicCache()
        llama(ids, past_key_values=cache)
        copies = [copy.deepcopy(cache.layers[0].store), pickle.loads(pickle.dumps(cache.layers[0].store))]
        assert all(held(one) == held(cache.layers[0].store) for one in copies)
    with pytest.raises(UnsupportedModel, match="or tokens with weights"):
        llama(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_inference_mode_and_gradients() -> None:
    """Weights that were made in inference mode are not written to outside it; those of a graph stay as they were."""
    llama, cache = model("llama"), DynamicCache()
    with apply(llama, Halves()):
        with torch.inference_mode():
            llama(tokens(1, 30), past_key_values=cache)
        before = held(cache.layers[0].store)
        llama(tokens(1, 2), past_key_values=cache)
        after = held(cache.layers[0].store)
        assert [{p: x for p, x in one.items() if p < 30} for one in after] == before
        with torch.enable_grad():
            cache = DynamicCache()
            first = llama(tokens(1, 30), past_key_values=cache).logits
            second = llama(tokens(1, 1), past_key_values=cache).logits
            llama(tokens(1, 1), past_key_values=cache)
            (first.sum() + second.sum()).backward()
    llama.zero_grad()
