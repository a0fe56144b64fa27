"""Multi-head attention by hand, option by option: projections, norms, convolution and gate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention, Rotary
from foveate.nn.parts.heads import HeadState
from foveate.nn.parts.multi_head import ConvState
from tests.support.tensors import assert_near

DIM, HEADS, LENGTH = 12, 4, 7


def tokens(seed: int = 0, n: int = LENGTH) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options: object) -> MultiHeadAttention:
    """Make the layer with random parameters, so that each has an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = MultiHeadAttention(DIM, HEADS, **options).double()
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
    return layer


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.RMSNorm):
        return rms(x, norm.weight)
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() + norm.bias


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def by_hand(layer: MultiHeadAttention, x: Tensor, source: Tensor, *, causal: bool, width: int, value: int) -> Tensor:
    q, k, v = layer.q(x), layer.k(source), layer.v(source)
    if layer.conv is not None:
        kernel, mixed = layer.conv.conv.weight[:, 0], torch.cat([q, k, v], -1)
        taps = kernel.shape[1]
        padded = F.pad(mixed, (0, 0, taps - 1, 0))
        mixed = sum(padded[:, j : j + x.shape[1]] * kernel[:, j] for j in range(taps)) + layer.conv.conv.bias
        q, k, v = mixed.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    q, k, v = heads(q, width), heads(k, width), heads(v, value)
    if layer.q_norm is not None:
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    if layer.position is not None:
        q, k = (layer.position.rotate(t, torch.arange(t.shape[2])) for t in (q, k))
    out = oracle.attention(q, k, v, causal=causal)
    if layer.out_norm is not None:
        out = rms(out, layer.out_norm.weight)
    out = out.transpose(1, 2).flatten(2)
    if layer.gating is not None:
        gate = layer.gating(x)
        out = out * (torch.sigmoid(gate) if layer.gate == "sigmoid" else gate * torch.sigmoid(gate))
    return layer.out(out)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"kv_heads": 2}, {"head_dim": 5, "value_dim": 2}, {"bias": True}, {"qk_norm": True}, {"qk_norm": "rms"},
        {"qk_norm": "layer"}, {"out_norm": True},
        {"gate": "sigmoid"}, {"gate": "silu", "bias": True}, {"position": Rotary(), "head_dim": 4}, {"conv": 3},
        {"kv_heads": 1, "head_dim": 4, "value_dim": 5, "bias": True, "qk_norm": True, "out_norm": True,
         "gate": "silu", "position": Rotary(100.0), "conv": 2},
    ], ids=lambda options: ", ".join(options) or "plain",
)  # fmt: skip
def test_the_layer_by_hand(options: dict) -> None:
    layer, x, source = built(**options), tokens(), tokens(1, 5)
    width = options.get("head_dim", DIM // HEADS)
    sizes = dict(width=width, value=options.get("value_dim", width))
    assert_near(layer(x, causal=True), by_hand(layer, x, x, causal=True, **sizes), 1e-10)
    if layer.conv is None:
        assert_near(layer(x), by_hand(layer, x, x, causal=False, **sizes), 1e-10)
        assert_near(layer(x, source), by_hand(layer, x, source, causal=False, **sizes), 1e-10)
    assert (layer.out.bias is not None) == options.get("bias", False)


def test_a_convolution_leaves_the_causal_pattern_and_masks_of_keys() -> None:
    layer = built(conv=2)
    assert layer.capabilities.patterns == {"causal self"}
    assert layer.capabilities.masks == {"keys"}
    assert isinstance(layer.init_state(1), ConvState)
    assert isinstance(built().init_state(1), HeadState)
    x, seen = tokens(), torch.tensor([False, False, True, True, True, True, True])
    garbage = x.clone()
    garbage[:, :2] = torch.nan
    padded = layer(garbage, mask=seen[None, None, None], causal=True)
    blank = x.masked_fill(~seen[:, None], 0.0)
    assert_near(padded[:, 2:], layer(blank, mask=seen[None, None, None], causal=True)[:, 2:], 1e-12)


def test_defaults() -> None:
    layer = MultiHeadAttention(DIM, HEADS)
    assert (layer.kv_heads, layer.head_dim, layer.value_dim, layer.conv, layer.position) == (4, 3, 3, None, None)
    assert layer.q_norm is layer.k_norm is layer.out_norm is layer.gating is None
    for options, message in (
        (dict(qk_norm="batch"), "qk_norm='batch' must be one of False, True, 'rms', 'layer'"),
        (dict(conv=-1), "conv=-1"), (dict(gate="relu"), "gate='relu'"), (dict(kv_heads=3), "must divide heads=4"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            MultiHeadAttention(DIM, HEADS, **options)
