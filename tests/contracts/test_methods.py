"""The contract of methods: every method of the catalogue acts on a decoder, and leaves it unchanged afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from foveate.core.catalog import systems
from foveate.core.errors import FoveateError
from foveate.host import Method, apply
from tests.contracts.methods import EXACT, METHODS, ON_DIFFUSION, OPERATORS, WHOLE
from tests.contracts.policies import LENGTHS, POLICIES, VOCAB, Batch, batch_error, subject, trace

EVERY = pytest.mark.parametrize("key", METHODS)
#: Policies have a contract of their own for batches; see `test_policies`.
OTHERS = pytest.mark.parametrize("key", [key for key in METHODS if key not in POLICIES])


def test_every_method_of_the_catalogue_is_here() -> None:
    rows = [row for room in ("kv", "steer") for row in systems(room=room)]
    methods = [row.key for row in rows if isinstance(row.load(), type) and issubclass(row.load(), Method)]
    assert set(methods) <= METHODS.keys() | ON_DIFFUSION
    assert len(OPERATORS) > 15


@OTHERS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_gets_the_same_result_in_a_batch_and_alone(key: str, side: str) -> None:
    for pieces in ("whole",) if key in WHOLE else ("whole", "chunks"):
        off, _ = batch_error(subject("llama"), side, pieces, lambda: apply(subject("llama"), METHODS[key]()))
        assert off < 1e-4, pieces  # some operators compute parts in float32


@EVERY
@torch.no_grad()
def test_it_acts_and_leaves_no_trace(key: str) -> None:
    """Using an object twice gives the same result. After the block, also after an error, the model is unchanged."""
    model, batch, pieces = subject("llama"), Batch.of(LENGTHS[:1], "none", 6), [LENGTHS[0], *[1] * 6]
    before, plain, method = trace(model), batch.feed(model, pieces)[0], METHODS[key]()
    results = []
    for _ in range(2):
        with apply(model, method):
            results.append(batch.feed(model, pieces)[0])
    assert torch.equal(*results)
    off = float((results[0] - plain).abs().max())
    assert off < 1e-4 if key in EXACT else off > 1e-3
    with pytest.raises(IndexError), apply(model, method):
        model(batch.ids + VOCAB, past_key_values=DynamicCache())
    assert trace(model) == before
    assert torch.equal(batch.feed(model, pieces)[0], plain)


@pytest.mark.parametrize("key", [key for key in METHODS if key not in OPERATORS or key == "hip"])
def test_bad_options_are_refused_by_name(key: str) -> None:
    method = METHODS[key]()
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    for field in (field for field in fields if field.init):
        value = getattr(method, field.name)
        wrong: list[object] = [object()]
        if type(value) is int:
            wrong += [2.5, -7, True, "3"]
        if type(value) is float:
            wrong += [float("nan"), -7.0, "3"]
        if type(value) is bool or isinstance(value, str):
            wrong += ["x", 1.5]
        for bad in wrong:
            with pytest.raises(FoveateError, match=field.name) as caught:
                dataclasses.replace(method, **{field.name: bad})
            assert "\n" not in str(caught.value)
