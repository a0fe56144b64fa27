"""The keys of methods are checked before anything is loaded."""

from __future__ import annotations

import pytest

from foveate.bench import known
from foveate.core.errors import OptionError, UnknownKey


def test_every_key_is_checked() -> None:
    known.check([])
    known.check(list(known.DEFAULT))
    for keys in (["sink"], ["full", "sink_recent", "sink"]):
        with pytest.raises(UnknownKey, match='unknown method "sink"'):
            known.check(keys)


@pytest.mark.parametrize("keys", [["full", "full"], ["full", "hip", "sink_recent", "hip"]])
def test_a_repeated_key_is_refused(keys: list[str]) -> None:
    with pytest.raises(OptionError, match="must name each method once"):
        known.check(keys)


def test_readers_are_causal_operators_with_queries_for_each_token() -> None:
    assert "hip" in known.readers() and "aaren" not in known.readers()
    assert known.methods() == ["full", "packed", *known.policies(), *known.readers()]
    assert set(known.DEFAULT) <= set(known.methods())


def test_an_operator_whose_facts_are_not_written_yet_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, facts = known.readers(), known.catalog.capabilities
    monkeypatch.setattr(known.catalog, "capabilities", lambda key: {} if key == "hip" else facts(key))
    assert known.readers() == [key for key in before if key != "hip"]
