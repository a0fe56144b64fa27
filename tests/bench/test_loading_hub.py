"""A model on a hub that cannot be reached is refused at once, and nothing else is asked."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from foveate.bench.loading import hub, load
from foveate.bench.loading.source import Source
from foveate.core.errors import UnsupportedModel


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the addresses of connections, all of which fail."""
    found: list[Any] = []

    def connect(address: Any, timeout: float) -> None:
        found.append((address, timeout))
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    return found


def test_a_hub_that_cannot_be_reached_is_tried_once(asked: list[Any]) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        load("no/such")
    assert str(raised.value) == (
        f"model='no/such' is no folder and no file here, and the hub {hub.constants.ENDPOINT} cannot be reached: "
        "Name or service not known"
    )
    assert len(asked) == 1 and asked[0][0][1] == 443 and asked[0][1] <= 10


def test_a_proxy_is_asked_in_place_of_the_hub(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    with pytest.raises(UnsupportedModel):
        hub.check(Source("no/such", "no/such"))
    assert asked[0][0] == ("proxy.example", 3128)


def test_local_cached_and_offline_models_ask_nobody(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    hub.check(Source("here", str(tmp_path)))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    hub.check(Source("no/such", "no/such"))
    monkeypatch.undo()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.check(Source("no/such", "no/such"))
    assert asked == []


def test_a_hub_that_answers_is_used(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        closed = False

        def close(self) -> None:
            Connection.closed = True

    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: Connection())
    hub.check(Source("some/model", "some/model"))
    assert Connection.closed
