"""Roles of heads, on a decoder whose heads were built by hand: all planted heads are found, and none is invented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.lens import AtOffset, Role, roles
from foveate.lens.lens import look
from tests.lens.models import text, tiny
from tests.support.constructed import FILLER, VOCAB, induction_lm, recall
from tests.support.tensors import assert_near

SIZE = dict(layers=3, heads=4, kv_heads=4)
WORDS = range(1, VOCAB)


def named(found: list[Role], name: str) -> set[tuple[int, int]]:
    return {(role.layer, role.head) for role in found if role.name == name}


@pytest.mark.parametrize("matching", [[(1, 2)], [(1, 0), (2, 3)]])
def test_planted_heads_are_found_and_none_is_invented(matching: list[tuple[int, int]]) -> None:
    model, ids = induction_lm(**SIZE, matching=matching), recall(1, length=80, answer=3)[0]
    found = roles(model, ids, repeat=24, vocabulary=WORDS, delimiters=[FILLER[0]])
    assert named(found, "induction") == set(matching)
    others = {(layer, head) for layer in range(2) for head in range(4)} - set(matching)
    assert others <= named(found, "previous token")
    assert not named(found, "previous token") & set(matching)
    assert not named(found, "local") & set(matching)
    assert others <= named(found, "local") and others <= named(found, "redundant")
    assert not named(found, "redundant") & set(matching), "a head that matches shares no row with another"
    for name in ("duplicate", "broad", "delimiter", "retrieval"):
        assert not named(found, name)


def test_sinks_and_delimiters_on_a_text_made_for_them() -> None:
    """Without a match, the matching head goes to the first token; with an earlier match behind a delimiter, there."""
    model = induction_lm(**SIZE, matching=[(1, 2)])
    ids = torch.arange(0, VOCAB)[None]  # no token comes twice
    assert (1, 2) in named(roles(model, ids, repeat=24, vocabulary=WORDS), "sink")
    ids = torch.tensor([[0, *[5, 9] * 20]])
    found = roles(model, ids, repeat=24, vocabulary=WORDS, delimiters=[9], thresholds={"delimiter": 0.4})
    assert (1, 2) in named(found, "delimiter") and (1, 2) not in named(found, "sink")


def test_scores_are_means_over_the_second_copy() -> None:
    model = tiny("llama")
    found = roles(model, repeat=10, begin=[1], seed=3, thresholds=dict.fromkeys(("induction", "duplicate"), 0.0))
    draw = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:10]
    ids = torch.cat([torch.tensor([1]), draw, draw])[None]
    for name, offset in (("induction", 9), ("duplicate", 10)):
        value: Tensor = look(model, ids, measures=[AtOffset(offset)]).values(AtOffset(offset))[1][0, :, 11:20].mean(-1)
        ours = torch.tensor([role.score for role in found if role.name == name and role.layer == 1])
        assert_near(ours, value, 1e-6)


def test_every_role_has_its_reason_and_retrieval_its_own_scores() -> None:
    scores = torch.tensor([[0.0, 0.3, 0.05, 0.0], [0.1, 0.0, 0.0, 0.0]])
    found = roles(tiny("llama"), text()["input_ids"][:1], retrieval=scores, repeat=8)
    assert named(found, "retrieval") == {(0, 1), (1, 0)}
    assert all(role.score >= role.threshold and len(role.reason) > 20 for role in found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: roles(tiny("llama"), torch.ones(2, 20, dtype=torch.long)), "ids must be (1, N)"),
        (lambda: roles(tiny("llama"), repeat=1), "repeat"),
        (lambda: roles(tiny("llama"), repeat=64), "repeat=64"),
        (lambda: roles(tiny("llama"), repeat=8, thresholds={"inductive": 0.5}), 'did you mean "induction"'),
        (lambda: roles(tiny("bert"), repeat=8), "is no decoder"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
