"""Parameters of a release under our names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveate.core.errors import OptionError
from foveate.nn.parts.released import load, renamed


def test_names_are_replaced_in_order_and_parameters_cut_into_parts() -> None:
    given = {"net.qkv.weight": torch.arange(12.0).reshape(6, 2), "old.bias": torch.ones(1), "drop": torch.ones(2)}
    out = renamed(
        given, [(r"^net\.", "layer."), (r"^layer\.", "block."), ("^old", "new"), ("^drop$", "")],
        [(r"\bqkv\b", ("q", "k", "v")), (r"\bk", ("never",))],
    )  # fmt: skip
    assert list(out) == ["block.q.weight", "block.k.weight", "block.v.weight", "new.bias"]
    for index, name in enumerate("qkv"):
        assert torch.equal(out[f"block.{name}.weight"], given["net.qkv.weight"][2 * index : 2 * index + 2])


def test_what_cannot_be_renamed_is_refused() -> None:
    with pytest.raises(OptionError, match="have two that would be called 'c'"):
        renamed({"a": torch.ones(1), "b": torch.ones(1)}, [("a|b", "c")])
    with pytest.raises(OptionError, match="have two that would be called 'k'"):
        renamed({"kv": torch.ones(2), "k": torch.ones(1)}, [], [("kv", ("k", "v"))])
    for shape in ((5, 2), ()):
        with pytest.raises(OptionError, match="'kv' must have 2 equal parts; its shape is"):
            renamed({"kv": torch.ones(shape)}, [], [("kv", ("k", "v"))])


def test_all_is_loaded_or_nothing() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    with pytest.raises(OptionError, match=r"do not fit this Linear: 1 missing \(bias\), 1 unknown \(more\)"):
        load(module, {"weight": torch.ones(2, 3), "more": torch.ones(1)})
    with pytest.raises(OptionError, match=r"1 of another shape \(weight\)"):
        load(module, {"weight": torch.ones(3, 2), "bias": torch.ones(2)})
    assert torch.equal(module.weight, before)
    load(module, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert torch.equal(module(torch.ones(1, 3)), torch.full((1, 2), 3.0))
