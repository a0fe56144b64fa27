"""Halo attention and Twins against `timm`, by shared weights; its classes are taken out of their files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.models import TwinsPCPVT, TwinsSVT
from foveate.nn import GlobalSubsampledAttention, HaloAttention, WindowAttention
from foveate.nn.parts.released import renamed
from tests.parity import peers
from tests.support.tensors import assert_near

peers.source("timm", "")  # skips where it is missing

# -- halo attention ----------------------------------------------------------------------------------------------------

DIM, HEADS, WIDTH = 12, 3, 5


def halo(**options: Any) -> nn.Module:
    made = peers.pick(
        "timm", "layers/halo_attn.py", "rel_logits_1d", "PosEmbedRel", "HaloAttn", trunc_normal_=nn.init.trunc_normal_,
        _assert=lambda holds, message: None,
    )  # fmt: skip
    return made.HaloAttn(DIM, num_heads=HEADS, dim_head=WIDTH, **options).double()


def converted(w: Mapping[str, Tensor], shift: int) -> dict[str, Tensor]:
    """Return timm's parameters: keys and values of a head are neighbours, and the tables are shifted by the halo."""
    q, kv = w["q.weight"], w["kv.weight"]
    k, v = kv[: HEADS * WIDTH].unflatten(0, (HEADS, -1)), kv[HEADS * WIDTH :].unflatten(0, (HEADS, -1))
    out = {"q.weight": q[..., None, None], "kv.weight": torch.cat([k, v], 1).flatten(0, 1)[..., None, None]}
    if "rows" in w:
        for ours, theirs in (("rows", "height_rel"), ("columns", "width_rel")):
            out[f"pos_embed.{theirs}"] = w[ours].roll(shift, 0)
    return out


def on_maps(module: nn.Module, given: Mapping[str, Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
    return peers.call(module, given, x.mT.unflatten(2, size)).flatten(2).mT


@pytest.mark.parametrize(("block", "halo_size"), [(4, 1), (2, 2), (2, 0), (1, 1)])
def test_halo_attention(block: int, halo_size: int) -> None:
    size = (4, 8)
    ours = HaloAttention(DIM, HEADS, block, halo_size, WIDTH, padding="seen").double()
    theirs = halo(block_size=block, halo_size=halo_size)
    w, x = peers.weights(ours), peers.leaf(2, 32, DIM, seed=1)
    peers.agree(
        lambda: peers.call(ours, w, x, size=size), lambda: on_maps(theirs, converted(w, halo_size), x, size),
        {"x": x, **w}, 1e-12,
    )  # fmt: skip


@pytest.mark.parametrize(("block", "pool"), [(4, False), (4, True), (3, True)])
def test_halo_attention_with_a_stride(block: int, pool: bool) -> None:
    """Without positions for fewer queries, where timm's count queries and ours rows; with them for averages."""
    size = (12, 12)
    ours = HaloAttention(DIM, HEADS, block, 1, WIDTH, stride=2, pool=pool, relative=pool, padding="seen").double()
    theirs = halo(block_size=block, halo_size=1, stride=2, avg_down=pool)
    w, x = peers.weights(ours), peers.leaf(2, 144, DIM, seed=1)

    def other() -> Tensor:
        given = converted(w, 1)
        tables = {name: torch.zeros_like(p) for name, p in theirs.named_parameters() if name.startswith("pos_embed")}
        return on_maps(theirs, {**tables, **given}, x, size)

    peers.agree(lambda: peers.call(ours, w, x, size=size), other, {"x": x, **w}, 1e-12)


# -- Twins -------------------------------------------------------------------------------------------------------------


@cache
def twins() -> Any:
    pair = lambda x: x if isinstance(x, tuple) else (x, x)  # noqa: E731
    mlp = peers.pick("timm", "layers/mlp.py", "Mlp", to_2tuple=pair, partial=partial)
    rates = peers.pick("timm", "layers/drop.py", "calculate_drop_path_rates")
    parts = "LocallyGroupedAttn", "GlobalSubSampleAttn", "Block", "PosConv", "PatchEmbed", "Twins"
    sizes = tuple(f"twins_{kind}_{size}" for kind in ("svt", "pcpvt") for size in TwinsSVT.sizes)
    return peers.pick(
        "timm", "models/twins.py", *parts, *sizes, Mlp=mlp.Mlp, to_2tuple=pair, partial=partial,
        trunc_normal_=nn.init.trunc_normal_, use_fused_attn=lambda: False,
        calculate_drop_path_rates=rates.calculate_drop_path_rates,
        _create_twins=lambda _, pretrained, **options: options,
    )  # fmt: skip


ATTENTION = ((r"^(qkv|q|kv)\.", r"attention.\1."), (r"^proj\.", "attention.out."), (r"^sr\.", "conv."))


def ours_of(w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(w, ATTENTION, TwinsSVT.released_parts)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 2)])
def test_locally_grouped_attention(size: tuple[int, int]) -> None:
    """Also where windows do not divide the grid, or are larger: timm attends to the padding."""
    ours, theirs = WindowAttention(DIM, HEADS, 3).double(), twins().LocallyGroupedAttn(DIM, HEADS, ws=3).double()
    w, x = peers.weights(theirs), peers.leaf(2, size[0] * size[1], DIM, seed=1)
    peers.agree(
        lambda: peers.call(ours, ours_of(w), x, size=size), lambda: peers.call(theirs, w, x, size), {"x": x, **w}, 1e-12
    )


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
def test_global_sub_sampled_attention(size: tuple[int, int], ratio: int) -> None:
    ours = GlobalSubsampledAttention(DIM, HEADS, ratio, padding="dropped").double()
    theirs = twins().GlobalSubSampleAttn(DIM, HEADS, sr_ratio=ratio).double()
    w, x = peers.weights(theirs), peers.leaf(2, size[0] * size[1], DIM, seed=1)
    peers.agree(
        lambda: peers.call(ours, ours_of(w), x, size=size), lambda: peers.call(theirs, w, x, size), {"x": x, **w}, 1e-12
    )


@pytest.mark.parametrize("side", [(24, 24), (26, 37)])
@pytest.mark.parametrize("kind", ["svt", "pcpvt"])
def test_a_small_network_and_each_of_its_blocks(kind: str, side: tuple[int, int]) -> None:
    shape = {"depths": (2, 2), "num_heads": (2, 3), "mlp_ratios": (2, 3), "sr_ratios": (2, 1)}
    windows = {"wss": (3, 3)} if kind == "svt" else {}
    theirs = twins().Twins(24, 4, 2, 5, embed_dims=(8, 12), **shape, **windows).double()
    make, window = (TwinsSVT, {"window": 3}) if kind == "svt" else (TwinsPCPVT, {})
    options = {"channels": 2, "classes": 5, "variant": "release", **window}
    ours = make((2, 2), (8, 12), (2, 3), (2, 1), (2, 3), **options).double()
    w, x = peers.weights(theirs), peers.leaf(2, 2, *side, seed=1)
    peers.agree(lambda: peers.call(ours, ours.renamed(w), x), lambda: peers.call(theirs, w, x), {"x": x, **w}, 1e-10)
    ours.load_released({name: p.detach() for name, p in w.items()})
    theirs.load_state_dict(w)
    for stage, other in zip(ours.blocks, theirs.blocks, strict=True):
        for block, their_block in zip(stage, other, strict=True):
            tokens = peers.leaf(1, 30, block.norm.normalized_shape[0], seed=2)
            assert_near(block(tokens, size=(5, 6)), their_block(tokens, (5, 6)), 1e-12)


@pytest.mark.parametrize("size", TwinsSVT.sizes)
@pytest.mark.parametrize("kind", ["svt", "pcpvt"])
def test_published_networks_load(kind: str, size: str) -> None:
    """The names and shapes of all six networks are timm's, which are the release's."""
    options = getattr(twins(), f"twins_{kind}_{size}")()
    with torch.device("meta"):
        theirs, ours = twins().Twins(**options), {"svt": TwinsSVT, "pcpvt": TwinsPCPVT}[kind].of_size(size)
    given = ours.renamed(theirs.state_dict())
    assert {name: p.shape for name, p in given.items()} == {name: p.shape for name, p in ours.state_dict().items()}


def test_twins_svt_small_gives_the_same_logits() -> None:
    """At the paper's size both variants are the same function."""
    options = twins().twins_svt_small()
    theirs, x = twins().Twins(**options).eval(), peers.leaf(1, 3, 224, 224, seed=1).detach().float()
    for variant in ("paper", "release"):
        ours = TwinsSVT.of_size("small", variant=variant).eval()
        ours.load_released(theirs.state_dict())
        with torch.no_grad():
            assert_near(ours(x), theirs(x), 1e-5)
