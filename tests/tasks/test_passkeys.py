"""The stream of pass keys: it does not end, and the keys lie at even depths."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest

from foveate.core.errors import OptionError
from foveate.tasks.text.passkeys import Passkeys

SENTENCE = re.compile(r" The \w+ pass key is [a-z ]+\.")


@pytest.fixture(autouse=True)
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.tasks.text.passkeys.text", lambda split: "Ever and again it ran on. " * 400)


def stream(**options: Any) -> Passkeys:
    return Passkeys(lambda text: list(text.encode()), **options)


def test_the_stream_goes_on_with_other_examples() -> None:
    found = [ids.tolist() for ids, _ in islice(stream(length=200, count=2, words=3), 4)]
    assert len(found) == 4 and len({tuple(ids[0]) for ids in found}) == 4
    again = [ids.tolist() for ids, _ in islice(stream(length=200, count=2, words=3), 4)]
    other = [ids.tolist() for ids, _ in islice(stream(length=200, count=2, words=3, seed=1), 4)]
    assert found == again != other


@pytest.mark.parametrize(("count", "depths"), [(1, [0.05]), (3, [0.05, 0.5, 0.95]), (4, [0.05, 0.35, 0.65, 0.95])])
def test_the_keys_lie_at_even_depths(count: int, depths: list[float]) -> None:
    ids, answers = next(iter(stream(length=2000, count=count, words=3, begin=(256,))))
    body = bytes(ids[0, 1:].tolist()).decode().split("\nThe first pass key is")[0]
    places, filler = [], body
    while match := SENTENCE.search(filler):
        places.append(match.start() / 2000)
        filler = filler[: match.start()] + filler[match.end() :]
    assert places == pytest.approx(depths, abs=0.01) and len(filler) == 2000
    assert bytes(ids[answers].tolist()).decode().count(".") == count


def test_bad_options_are_refused_by_name() -> None:
    for options in (dict(length=63), dict(count=0), dict(count=11), dict(words=0)):
        with pytest.raises(OptionError, match="|".join(options)):
            stream(**options)
    for options in (dict(length=64), dict(count=10), dict(words=1)):
        stream(**options)
