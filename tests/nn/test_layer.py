"""The base class of layers: prefill of a prompt, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn.base.layer import Layer, StreamingLayer
from tests.support.tensors import assert_near


class Sums(StreamingLayer):
    """The running sum of tokens, each times a factor from the call."""

    capabilities = replace(
        Layer.capabilities,
        patterns=frozenset({"causal self"}),
        masks=frozenset(),
        streaming="exact",
        inputs=frozenset({"factor"}),
    )

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return (inputs["factor"] * x).cumsum(1)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(batch, 1, self.dim, dtype=dtype, device=device)

    def _step(self, x: Tensor, state: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        state = state + inputs["factor"] * x
        return state, state


class Rows(Layer):
    """A layer of grids, with a class token before them."""

    capabilities = replace(Layer.capabilities, grid=True, prefix=1)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        return x * inputs["size"][0]


def test_a_prompt_goes_token_by_token_with_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = torch.randn(2, 6, 3, generator=generator), torch.randn(2, 6, 1, generator=generator)
    layer = Sums(3)
    whole = layer(x, causal=True, factor=factor)
    out, state = layer.prefill(x[:, :4], factor=factor[:, :4])
    assert_near(out, whole[:, :4], 1e-6)
    y, _ = layer.step(x[:, 4:5], state, factor=factor[:, 4:5])
    assert_near(y, whole[:, 4:5], 1e-6)
    with pytest.raises(ShapeError, match="step takes one token; got N=2"):
        layer.step(x[:, :2], state)
    with pytest.raises(OptionError, match="Sums takes no input 'rate'; it takes \"factor\""):
        layer(x, causal=True, rate=factor)
    with pytest.raises(UnsupportedPattern, match='Sums does not define "self" attention; it does "causal self"'):
        layer(x, factor=factor)
    with pytest.raises(UnsupportedPattern, match='Sums does not take a mask of kind "keys"; it takes none'):
        layer(x, causal=True, factor=factor, mask=torch.ones(1, 1, 1, 6, dtype=torch.bool))
    with pytest.raises(OptionError, match=r"Sums takes no grid; got size=\(2, 3\)"):
        layer(x, causal=True, factor=factor, size=(2, 3))


def test_a_grid_has_its_size() -> None:
    x = torch.ones(2, 7, 3)
    assert_near(Rows(3)(x, size=(2, 3)), 2 * x, 0)
    for size in (None, (2, 2), (2, 3, 1), (6,), (7, 1)):
        with pytest.raises(ShapeError, match=r"must be \(H, W\) with H \* W = N - 1 = 6"):
            Rows(3)(x, size=size)
    assert not hasattr(Rows(3), "init_state"), "no stub"


def test_tokens_fit_the_layer() -> None:
    for given, source, message in (
        (torch.ones(2, 6, 4), None, r"x must be \(B, N, C=3\); got \(2, 6, 4\)"),
        (torch.ones(6, 3), None, r"x must be \(B, N, C=3\); got \(6, 3\)"),
        ([1.0], None, r"x must be \(B, N, C=3\)"),
        (torch.ones(2, 7, 3), torch.ones(2, 5, 2), r"source must be \(B, N, C=3\); got \(2, 5, 2\)"),
        (torch.ones(2, 7, 3), torch.ones(1, 5, 3), "source has B=1; x has B=2"),
    ):
        with pytest.raises(ShapeError, match=message):
            Rows(3)(given, source, size=(2, 3))
    with pytest.raises(OptionError, match="causal=1 must be True or False"):
        Rows(3)(torch.ones(2, 7, 3), causal=1, size=(2, 3))
    with pytest.raises(OptionError, match="dim=0"):
        Rows(0)
