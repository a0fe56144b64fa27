"""Vision layers against `timm`, whose import asks for torchvision: its classes are taken out of their files."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveate.models.vision.mambaout import SIZES, GatedCNNBlock, MambaOut
from foveate.nn import MultiHeadAttention
from foveate.nn.parts.window import WindowAttention, Windows
from foveate.nn.vision.efficient_attention_2d import EfficientAttention2d
from foveate.ops.dense.softmax import Softmax
from foveate.train.objectives.cutmix import _kept, _Random, cut_box
from tests.parity import peers
from tests.support.tensors import assert_near

peers.source("timm", "")  # skips where it is missing

DIM, HEADS, N = 20, 4, 7


def attention(**options: Any) -> nn.Module:
    """Theirs, computed without a fused kernel."""
    made = peers.pick(
        "timm", "layers/attention.py", "Attention", "maybe_add_mask", "resolve_self_attn_mask",
        use_fused_attn=lambda: False,
    )  # fmt: skip
    return made.Attention(DIM, HEADS, qkv_bias=True, **options).double()


def converted(w: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {f"qkv.{part}": torch.cat([w[f"{name}.{part}"] for name in "qkv"]) for part in ("weight", "bias")}
    named = {"q_norm": "q_norm", "k_norm": "k_norm", "gating": "gate", "out": "proj"}
    for name, value in w.items():
        module, _, part = name.rpartition(".")
        if module in named:
            made[f"{named[module]}.{part}"] = value
    return made


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["none", "pairs", "bias", "causal"])
def test_attention(qk_norm: bool, gated: bool, kind: str) -> None:
    ours = MultiHeadAttention(DIM, HEADS, qk_norm=qk_norm, gate="sigmoid" if gated else None, bias=True).double()
    theirs = attention(qk_norm=qk_norm, gated=gated, norm_layer=nn.RMSNorm)
    w, x = peers.weights(ours), peers.leaf(2, N, DIM, seed=1)
    seen = (torch.rand(N, N, generator=torch.Generator().manual_seed(2)) < 0.5) | torch.eye(N, dtype=torch.bool)
    bias = peers.leaf(N, N, seed=3)
    mine = {"pairs": {"mask": seen}, "bias": {"mask": bias}, "causal": {"causal": True}}.get(kind, {})
    other = {"pairs": {"attn_mask": seen}, "bias": {"attn_mask": bias}, "causal": {"is_causal": True}}.get(kind, {})
    leaves = {"x": x, **w, **({"bias": bias} if kind == "bias" else {})}
    peers.agree(
        lambda: peers.call(ours, w, x, **mine), lambda: peers.call(theirs, converted(w), x, **other), leaves, 1e-12
    )


def test_windows_are_those_of_swin() -> None:
    swin = peers.pick("timm", "models/swin_transformer.py", "window_partition", "window_reverse")
    x = peers.leaf(2, 6, 8, 3, seed=1).detach()
    windows = Windows((6, 8), (2, 4))
    assert torch.equal(windows.partition(x.flatten(1, 2)).unflatten(1, (2, 4)), swin.window_partition(x, (2, 4)))
    parts = peers.leaf(2 * 6, 2, 4, 3, seed=2).detach()
    assert torch.equal(
        windows.merge(parts.flatten(1, 2)).unflatten(1, (6, 8)), swin.window_reverse(parts, (2, 4), 6, 8)
    )


def test_attention_inside_windows() -> None:
    swin = peers.pick("timm", "models/swin_transformer.py", "window_partition", "window_reverse")
    ours, theirs = WindowAttention(DIM, HEADS, (2, 4)).double(), attention()
    w, x = peers.weights(ours), peers.leaf(2, 48, DIM, seed=1)

    def other() -> Tensor:
        given = converted({name.removeprefix("attention."): value for name, value in w.items()})
        windows = swin.window_partition(x.unflatten(1, (6, 8)), (2, 4))
        out = peers.call(theirs, given, windows.flatten(1, 2)).unflatten(1, (2, 4))
        return swin.window_reverse(out, (2, 4), 6, 8).flatten(1, 2)

    peers.agree(lambda: peers.call(ours, w, x, size=(6, 8)), other, {"x": x, **w}, 1e-12)


def test_the_block_for_feature_maps_with_a_softmax_is_a_non_local_block() -> None:
    """Theirs scales by the width of the map unless told otherwise, and has a batch norm, here one that does nothing."""
    channels, width = 6, 4
    made = peers.pick("timm", "layers/non_local_attn.py", "NonLocalAttn")
    ours, theirs = (
        EfficientAttention2d(channels, width, op=Softmax()).double(),
        made.NonLocalAttn(channels, rd_channels=width),
    )
    theirs = theirs.double().eval()
    theirs.scale = width**-0.5
    nn.init.constant_(theirs.norm.weight, math.sqrt(1 + theirs.norm.eps))
    w, x = peers.weights(ours), peers.leaf(2, channels, 3, 5, seed=1)
    named = {"queries": "t", "keys": "p", "values": "g", "reprojection": "z"}

    def other() -> Tensor:
        given = {f"{named[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in w.items()}
        norm = {f"norm.{name}": p for name, p in theirs.norm.named_parameters()}
        return peers.call(theirs, {**given, **norm}, x)

    peers.agree(lambda: peers.call(ours, w, x), other, {"x": x, **w}, 1e-12)


# -- MambaOut, whose parts bear the same names on both sides -----------------------------------------------------------


@cache
def mambaout() -> Any:
    norm = peers.pick("timm", "layers/norm.py", "LayerNorm", is_fast_norm=lambda: False)
    rates = peers.pick("timm", "layers/drop.py", "calculate_drop_path_rates")
    parts = "Stem", "Downsample", "MlpHead", "GatedConvBlock", "MambaOutStage", "MambaOut"
    sizes = tuple(f"mambaout_{size}" for size in SIZES)
    return peers.pick(
        "timm", "models/mambaout.py", *parts, *sizes, OrderedDict=OrderedDict, LayerNorm=norm.LayerNorm,
        calculate_drop_path_rates=rates.calculate_drop_path_rates, get_act_layer=lambda act: act,
        trunc_normal_=nn.init.trunc_normal_, _create_mambaout=lambda _, **options: options,
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_mambaout(size: str) -> None:
    options = getattr(mambaout(), f"mambaout_{size}")()
    assert (tuple(options["depths"]), tuple(options["dims"])) == SIZES[size]


@pytest.mark.parametrize(
    "expansion, kernel, conv_ratio", [(8 / 3, 7, 1.0), (8 / 3, 3, 0.5), (2, 5, 2), (1.5, 1, 0.25)]
)  # fmt: skip
def test_a_gated_cnn_block(expansion: float, kernel: int, conv_ratio: float) -> None:
    ours = GatedCNNBlock(10, expansion, kernel, conv_ratio).double()
    theirs = mambaout().GatedConvBlock(10, expansion, kernel, conv_ratio).double()
    w, x = peers.weights(ours), peers.leaf(2, 5, 8, 10, seed=1)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, w, x), {"x": x, **w}, 1e-12)


def test_a_small_mambaout() -> None:
    options = {"depths": (1, 2, 1), "dims": (8, 12, 10), "conv_ratio": 0.5}
    ours = MambaOut(**options, classes=7).double()
    theirs = mambaout().MambaOut(**options, num_classes=7).double()
    w, x = peers.weights(ours), peers.leaf(2, 3, 37, 32, seed=1)
    peers.agree(lambda: peers.call(ours, w, x), lambda: peers.call(theirs, w, x), {"x": x, **w}, 1e-10)


def test_weights_of_mambaout_femto_load_as_they_are() -> None:
    options = mambaout().mambaout_femto()
    options.pop("pretrained")
    theirs, ours = mambaout().MambaOut(**options), MambaOut("femto")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = peers.leaf(1, 3, 64, 64, seed=1).detach().float()
    with torch.no_grad():
        assert_near(ours(x), theirs(x), 1e-5)


# -- CutMix ------------------------------------------------------------------------------------------------------------


def test_boxes_of_cutmix() -> None:
    """The same shares and centres give the same boxes, but for the last pixel of an odd side, which the release drops.

    Theirs draws the row of a centre first.
    """
    random = torch.Generator().manual_seed(0)
    lam, centre = torch.rand(200, generator=random).double(), torch.randint(0, 12, (200, 2), generator=random)
    drawn = iter(centre.flatten().tolist())
    numpy = SimpleNamespace(
        sqrt=np.sqrt, clip=np.clip, random=SimpleNamespace(randint=lambda low, high, size=None: next(drawn))
    )
    theirs = peers.pick("timm", "data/mixup.py", "rand_bbox", np=numpy)
    for ours, share in zip(cut_box((12, 17), lam, centre).tolist(), lam.tolist(), strict=True):
        other = [int(edge) for edge in theirs.rand_bbox((3, 12, 17), share)]
        for first, size in ((0, 12), (2, 17)):
            odd = int(size * math.sqrt(1 - share)) % 2
            assert ours[first] == other[first] and 0 <= other[first + 1] - ours[first + 1] <= odd


def test_shares_of_cutmix_are_alike() -> None:
    names = "rand_bbox", "rand_bbox_minmax", "cutmix_bbox_and_lam", "one_hot", "mixup_target", "Mixup"
    drawn = np.random.default_rng(0)
    numpy = SimpleNamespace(
        sqrt=np.sqrt, clip=np.clip,
        random=SimpleNamespace(rand=drawn.random, beta=drawn.beta, randint=drawn.integers),
    )  # fmt: skip
    mix = peers.pick("timm", "data/mixup.py", *names, np=numpy).Mixup(0.0, cutmix_alpha=1.0, num_classes=2)
    theirs = [mix(torch.zeros(2, 1, 128, 128), torch.tensor([0, 1]))[1][0, 0].item() for _ in range(2000)]
    size = (128, 128)
    ours = _kept(_Random(torch.Generator().manual_seed(0)).boxes(size, 1.0, 2000), size, True)
    assert abs(ours.mean() - sum(theirs) / len(theirs)) < 0.02
