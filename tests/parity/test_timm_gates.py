"""Gates of convolutional networks against `timm`, by shared weights; its classes are taken out of their files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.models import ConViT
from foveate.nn import (
    CBAM,
    BottleneckAttention,
    CoordinateAttention,
    EfficientChannelAttention,
    GatedPositionalAttention,
    NonLocal,
    SqueezeExcitation,
)
from tests.parity import peers
from tests.support.tensors import assert_near

peers.source("timm", "")  # skips where it is missing

CHANNELS, WIDTH = 12, 5


def activation(layer: Any, **_: Any) -> nn.Module:
    return nn.Sigmoid() if layer == "sigmoid" else layer()


def renamed(w: Mapping[str, Tensor], names: Mapping[str, str], *, maps: bool = True) -> dict[str, Tensor]:
    """Return the weights by timm's names; matrices become convolutions."""
    made = {}
    for name, value in w.items():
        module, _, part = name.rpartition(".")
        matrix = value.dim() == 2 and maps
        made[f"{names.get(module, module)}.{part}"] = value[..., None, None] if matrix else value
    return made


def compare(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str], *size: int) -> None:
    """Compare outputs and all gradients, in eval mode, where batch norms have the statistics of their start."""
    ours, theirs = ours.double().eval(), theirs.double().eval()
    w, x = peers.weights(ours), peers.leaf(2, CHANNELS, *(size or (5, 7)), seed=1)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, renamed(w, names), x), {"x": x, **w}, 1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_squeeze_and_excitation(bias: bool) -> None:
    made = peers.pick("timm", "layers/squeeze_excite.py", "SEModule", create_act_layer=activation)
    theirs = made.SEModule(CHANNELS, rd_channels=WIDTH, bias=bias)
    compare(
        SqueezeExcitation(CHANNELS, hidden=WIDTH, bias=bias), theirs, {"excite.narrow": "fc1", "excite.widen": "fc2"}
    )


@pytest.mark.parametrize("channels", [8, 12, 64, 200, 512])
def test_efficient_channel_attention(channels: int) -> None:
    made = peers.pick("timm", "layers/eca.py", "EcaModule", create_act_layer=activation)
    ours, theirs = EfficientChannelAttention(channels).double(), made.EcaModule(channels).double()
    w, x = peers.weights(ours), peers.leaf(2, channels, 3, 4, seed=1)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, w, x), {"x": x, **w}, 1e-10)


class ConvNormAct(nn.Module):
    """Timm's convolution and batch norm, as its spatial attention asks for them."""

    def __init__(self, channels: int, out: int, kernel: int, apply_act: bool, **_: Any) -> None:
        super().__init__()
        assert not apply_act
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize("bias", [True, False])
def test_cbam(bias: bool) -> None:
    """Theirs has the mean in front of the maximum."""
    made = peers.pick(
        "timm", "layers/cbam.py", "ChannelAttn", "SpatialAttn", "CbamModule", create_act_layer=activation,
        ConvNormAct=ConvNormAct,
    )  # fmt: skip
    ours = CBAM(CHANNELS, hidden=WIDTH, kernel=3, bias=bias).double().eval()
    theirs = made.CbamModule(CHANNELS, rd_channels=WIDTH, spatial_kernel_size=3, mlp_bias=bias).double().eval()
    w, x = peers.weights(ours), peers.leaf(2, CHANNELS, 5, 7, seed=1)
    names = {
        "channel.narrow": "channel.fc1", "channel.widen": "channel.fc2", "spatial.conv": "spatial.conv.conv",
        "spatial.norm": "spatial.conv.bn",
    }  # fmt: skip

    def other() -> Tensor:
        given = renamed(w, names)
        return peers.call(theirs, {**given, "spatial.conv.conv.weight": w["spatial.conv.weight"].flip(1)}, x)

    peers.agree(lambda: peers.call(ours, w, x), other, {"x": x, **w}, 1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_coordinate_attention(bias: bool) -> None:
    made = peers.pick("timm", "layers/coord_attn.py", "CoordAttn", create_act_layer=activation)
    ours = CoordinateAttention(CHANNELS, hidden=WIDTH, bias=bias).double().eval()
    theirs = made.CoordAttn(CHANNELS, rd_channels=WIDTH, bias=bias).double().eval()
    w, x = peers.weights(ours), peers.leaf(2, CHANNELS, 5, 7, seed=1)
    names = {"narrow": "conv1", "norm": "bn1", "widen.0": "conv_h", "widen.1": "conv_w"}

    def other() -> Tensor:
        given = {name: p[..., None] if p.dim() == 3 else p for name, p in renamed(w, names).items()}
        return peers.call(theirs, given, x)

    peers.agree(lambda: peers.call(ours, w, x), other, {"x": x, **w}, 1e-10)


@pytest.mark.parametrize("scaled", [True, False])
def test_non_local(scaled: bool) -> None:
    made = peers.pick("timm", "layers/non_local_attn.py", "NonLocalAttn")
    ours = NonLocal(CHANNELS, hidden=WIDTH, scale=CHANNELS**-0.5 if scaled else 1.0)
    theirs = made.NonLocalAttn(CHANNELS, use_scale=scaled, rd_channels=WIDTH)
    compare(ours, theirs, {"theta": "t", "phi": "p", "out": "z"})


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_bottlenecks(scaled: bool, bias: bool) -> None:
    """Where theirs does not scale the relative part, its tables are ours over `sqrt(D)`."""
    made = peers.pick(
        "timm", "layers/bottleneck_attn.py", "rel_logits_1d", "PosEmbedRel", "BottleneckAttn",
        trunc_normal_=nn.init.trunc_normal_, to_2tuple=tuple, _assert=lambda holds, message: None,
    )  # fmt: skip
    heads, size = 3, (4, 5)
    ours = BottleneckAttention(CHANNELS, heads, size=size, bias=bias).double()
    theirs = made.BottleneckAttn(
        CHANNELS, feat_size=size, num_heads=heads, dim_head=CHANNELS // heads, qkv_bias=bias, scale_pos_embed=scaled
    ).double()
    w, x = peers.weights(ours), peers.leaf(2, CHANNELS, *size, seed=1)
    factor = 1.0 if scaled else (CHANNELS // heads) ** -0.5

    def other() -> Tensor:
        given = {name: p[..., None, None] if p.dim() == 2 else p for name, p in w.items() if name.startswith("qkv")}
        tables = {"pos_embed.height_rel": factor * w["tables.0"], "pos_embed.width_rel": factor * w["tables.1"]}
        return peers.call(theirs, {**given, **tables}, x)

    peers.agree(lambda: peers.call(ours, w, x), other, {"x": x, **w}, 1e-10)


# -- ConViT's layer ----------------------------------------------------------------------------------------------------


def convit(**options: Any) -> nn.Module:
    theirs = peers.pick("timm", "models/convit.py", "GPSA").GPSA(18, num_heads=9, **options).double()
    theirs.rel_indices = theirs.get_rel_indices(16).double()
    return theirs


@pytest.mark.parametrize("bias", [True, False])
def test_gated_positional_attention(bias: bool) -> None:
    ours, theirs = GatedPositionalAttention(18, 9, bias=bias).double(), convit(qkv_bias=bias)
    w, x = peers.weights(ours), peers.leaf(2, 16, 18, seed=1)

    def other() -> Tensor:
        given = {"gating_param": w["gate"], "pos_proj.weight": w["place"], "pos_proj.bias": torch.zeros(9).double()}
        for part in ("weight", "bias") if bias else ("weight",):
            given |= {f"qk.{part}": torch.cat([w[f"q.{part}"], w[f"k.{part}"]]), f"v.{part}": w[f"v.{part}"]}
        given |= {f"proj.{part}": w[f"out.{part}"] for part in ("weight", "bias")}
        return peers.call(theirs, given, x)

    peers.agree(lambda: peers.call(ours, w, x, size=(4, 4)), other, {"x": x, **w}, 1e-10)


@pytest.mark.parametrize("heads", [4, 9, 16])
def test_its_start(heads: int) -> None:
    theirs = peers.pick("timm", "models/convit.py", "GPSA").GPSA(48 * 3, num_heads=heads, locality_strength=2.0)
    theirs.local_init()
    ours = GatedPositionalAttention(48 * 3, heads, locality=2.0)
    assert_near(ours.place, theirs.pos_proj.weight, 1e-6)
    assert torch.equal(ours.v.weight, theirs.v.weight)
    assert torch.equal(ours.gate, theirs.gating_param)


class PatchEmbed(nn.Module):
    """Timm's patches: a convolution, and tokens row by row."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT

    def feat_ratio(self) -> int:
        return self.proj.stride[0]


def convit_network(**options: Any) -> nn.Module:
    mlp = peers.pick("timm", "layers/mlp.py", "Mlp", to_2tuple=lambda x: (x, x), partial=partial)
    rates = peers.pick("timm", "layers/drop.py", "calculate_drop_path_rates")
    made = peers.pick(
        "timm", "models/convit.py", "GPSA", "MHSA", "Block", "ConVit", PatchEmbed=PatchEmbed, Mlp=mlp.Mlp,
        trunc_normal_=nn.init.trunc_normal_, LayerNorm=nn.LayerNorm, LayerScale=None, DropPath=None,
        HybridEmbed=None,
        calculate_drop_path_rates=rates.calculate_drop_path_rates,
    )  # fmt: skip
    norm = partial(nn.LayerNorm, eps=1e-6)
    return made.ConVit(local_up_to_layer=options.pop("local"), norm_layer=norm, **options)


def test_a_small_convit() -> None:
    shape = {"img_size": 12, "patch_size": 3, "in_chans": 2, "num_classes": 5, "embed_dim": 3, "depth": 3}
    theirs = convit_network(local=2, num_heads=4, **shape).double().eval()
    ours = ConViT.example().double().eval()
    for block in theirs.blocks[:2]:
        block.attn.rel_indices = block.attn.get_rel_indices(16).double()
    w, x = peers.weights(theirs), peers.leaf(2, 2, 12, 12, seed=1)
    peers.agree(
        lambda: peers.call(ours, ours.renamed(w), x), lambda: peers.call(theirs, w, x),
        {"x": x, **{name: p for name, p in w.items() if not name.endswith("pos_proj.bias")}}, 1e-10,
    )  # fmt: skip


@pytest.mark.parametrize("size", ConViT.sizes)
def test_published_convits_load(size: str) -> None:
    with torch.device("meta"):
        ours = ConViT.of_size(size)
        theirs = convit_network(local=10, num_heads={"tiny": 4, "small": 9, "base": 16}[size], embed_dim=48)
    given = ours.renamed(theirs.state_dict())
    assert {name: p.shape for name, p in given.items()} == {name: p.shape for name, p in ours.state_dict().items()}
