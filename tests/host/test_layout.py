"""The table of a layout's heads, and the pass that finds a layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from foveate.host.hf.layout import AttendingLayer, Layout, _quiet, layout
from foveate.host.hf.model import host
from tests.support.host_models import WINDOW, model


def test_a_narrow_layer_has_fewer_heads_in_the_table() -> None:
    found = Layout((AttendingLayer(0, 4, 1, False, None), AttendingLayer(2, 2, 2, False, 8)))
    assert found.table.tolist() == [[True, False], [True, True]]
    assert (len(found), found.heads, found.kv_heads, found.expands) == (2, 4, 2, False)


def test_a_layer_that_expands_what_it_stores_makes_the_layout_expand() -> None:
    assert Layout((AttendingLayer(0, 4, 1, False, None), AttendingLayer(1, 4, 1, True, None))).expands


def test_the_layers_of_a_decoder_and_their_windows() -> None:
    assert [(x.layer, x.heads, x.kv_heads, x.expanded, x.window) for x in layout(host(model("gemma3"))).layers] == [
        (0, 4, 2, False, WINDOW), (1, 4, 2, False, None), (2, 4, 2, False, WINDOW),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "index", "devices"), [("cuda", None, [0]), ("cuda", 3, [3]), ("cpu", None, []), ("meta", None, [])]
)
def test_the_pass_restores_the_random_state_of_the_models_device(
    kind: str, index: int | None, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[list[int]] = []

    @contextmanager
    def fork(devices: list[int]) -> Iterator[None]:
        forked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    inner = nn.Dropout().train()
    subject: Any = SimpleNamespace(modules=inner.modules, device=SimpleNamespace(type=kind, index=index))
    with _quiet(subject):
        assert not inner.training
    assert inner.training and forked == [devices]
