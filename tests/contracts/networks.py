"""The networks of the catalogue, with their variants, for the contract.

A network is in it by being the object or a part of a row. `Decoder` and `ImageEncoder`, which are no paper's, are out:
tests/models has their tests, and the contract of layers has those of what one builds them from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.core.catalog import systems
from foveate.models import Network
from foveate.models.audio.ecapa_tdnn import ECAPATDNN
from foveate.models.graph.hallucination_gat import HallucinationGAT
from foveate.models.recommendation.autoint import AutoInt
from foveate.models.recommendation.fields import TabularField
from foveate.models.vision.biformer import BiFormer
from foveate.models.vision.catanet import CATANet
from foveate.models.vision.crossformer import CrossFormer
from foveate.models.vision.dffreq import DFFreqDetector
from foveate.models.vision.twins import TwinsPCPVT, TwinsSVT

BATCH = 3
PARITY = Path(__file__).parents[1] / "parity"


def _catalogued() -> Iterator[type[Network]]:
    for row in systems():
        for target in (row.object, *row.parts):
            if target.startswith("foveate.models."):
                module, _, name = target.partition(":")
                found = getattr(import_module(module), name)
                if isinstance(found, type) and issubclass(found, Network):
                    yield found


NETWORKS: dict[str, type[Network]] = {each.__name__: each for each in _catalogued()}

#: Further ways through a network: its class, and a function that makes an instance for the class's example inputs.
EXTRA: dict[str, tuple[type[Network], Callable[[], Network]]] = {
    "ECAPATDNN-release": (
        ECAPATDNN,
        lambda: ECAPATDNN(6, 16, 5, scale=4, se=4, aggregate=12, attention_channels=4, variant="release"),
    ),
    "ECAPATDNN-without context": (
        ECAPATDNN,
        lambda: ECAPATDNN(6, 8, 5, dilations=(2, 1), scale=2, se=4, aggregate=12, global_context=False),
    ),
    "AutoInt-release": (
        AutoInt,
        lambda: AutoInt(
            (TabularField("a", 5), TabularField("x"), TabularField("tags", 4, 3), TabularField("y")),
            6, layers=3, heads=3, units=2, dropout=(0.1, 0.2, 0.3), variant="release",
        ),
    ),
    "TwinsSVT-release": (
        TwinsSVT,
        lambda: TwinsSVT(
            (2, 1, 2), (8, 12, 12), (2, 3, 2), (2, 2, 1), (2, 2, 2), window=3, channels=2, classes=5, patch=2,
            variant="release",
        ),
    ),
}  # fmt: skip

MAKE: dict[str, Callable[[], Network]] = {
    **{name: cls.example for name, cls in NETWORKS.items()},
    **{name: make for name, (_, make) in EXTRA.items()},
}
CLASSES: dict[str, type[Network]] = NETWORKS | {name: cls for name, (cls, _) in EXTRA.items()}
SIZES = [(name, size) for name, cls in NETWORKS.items() for size in cls.sizes]


def _recorded(name: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a release's parameters, from the record of a parity test."""
    found = json.loads((PARITY / name).read_text("utf-8"))["parameters"]
    return {each: tuple(shape) for each, shape in found.items()}


def _twins(net: TwinsSVT | TwinsPCPVT, windows: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the release's parameters; `windows` are in every second block, from the first."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def conv(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def norm(name: str, dim: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

    before = 2
    for i, blocks in enumerate(net.blocks):
        dim, side = net.embeds[i].norm.normalized_shape[0], 2
        conv(f"patch_embeds.{i}.proj", dim, before, side, side)
        norm(f"patch_embeds.{i}.norm", dim)
        conv(f"pos_block.{i}.proj.0", dim, 1, 3, 3)
        for j, block in enumerate(blocks):
            at, ratio = f"blocks.{i}.{j}", getattr(block.mixer, "ratio", 1)
            names = {"qkv": 3} if windows and j % 2 == 0 else {"q": 1, "kv": 2}
            for name, many in {**names, "proj": 1}.items():
                linear(f"{at}.attn.{name}", dim, many * dim)
            if ratio > 1:
                conv(f"{at}.attn.sr", dim, dim, ratio, ratio)
                norm(f"{at}.attn.norm", dim)
            norm(f"{at}.norm1", dim)
            norm(f"{at}.norm2", dim)
            hidden = block.mlp[0].out_features
            linear(f"{at}.mlp.fc1", dim, hidden)
            linear(f"{at}.mlp.fc2", hidden, dim)
        before = dim
    norm("norm", before)
    linear("head", before, 5)
    return shapes


def _catanet() -> dict[str, tuple[int, ...]]:
    """Return names and shapes in the release for the example's sizes: C=8, 6 for queries, 12 inside the MLPs."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, 3, 3), (outputs,)

    def attention(name: str, *outs: str) -> None:
        for out in outs:
            shapes[f"{name}.{out}.weight"] = (6 if out in ("to_q", "to_k") else 8, 8)

    def mlp(name: str) -> None:
        shapes[f"{name}.fc1.weight"], shapes[f"{name}.fc1.bias"] = (12, 8), (12,)
        shapes[f"{name}.fc2.weight"], shapes[f"{name}.fc2.bias"] = (8, 12), (8,)
        at = f"{name}.dwconv.depthwise_conv.0"
        shapes[f"{at}.weight"], shapes[f"{at}.bias"] = (12, 1, 5, 5), (12,)

    conv("first_conv", 2, 8)
    for i, centres in enumerate((3, 4)):
        like, near = f"blocks.{i}.0", f"blocks.{i}.1.layer"
        shapes |= {f"{like}.means": (centres, 8), f"{like}.initted": (), f"{like}.conv1x1.weight": (8, 8, 1, 1)}
        for norm in (f"{like}.norm", f"{like}.mlp.norm", f"{near}.0.norm", f"{near}.1.norm"):
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (8,)
        attention(f"{like}.irca_attn", "to_k", "to_v")
        for part in (f"{like}.iasa_attn", f"{near}.0.fn"):
            attention(part, "to_q", "to_k", "to_v", "proj")
        mlp(f"{like}.mlp.fn")
        mlp(f"{near}.1.fn")
        conv(f"mid_convs.{i}", 8, 8)
    conv("upconv", 8, 32)
    conv("last_conv", 8, 2)
    return shapes


def _dffreq() -> dict[str, tuple[int, ...]]:
    """Return names and shapes in the release for the example's sizes: 4 channels, two blocks, then one."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, norm: str, inputs: int, outputs: int, side: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, side, side)
        for each in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{each}"] = (outputs,)
        shapes[f"{norm}.num_batches_tracked"] = ()

    def bottleneck(name: str, inputs: int, width: int, changes: bool) -> None:
        conv(f"{name}.conv1", f"{name}.bn1", inputs, width, 1)
        conv(f"{name}.conv2", f"{name}.bn2", width, width, 3)
        conv(f"{name}.conv3", f"{name}.bn3", width, 4 * width, 1)
        if changes:
            conv(f"{name}.downsample.0", f"{name}.downsample.1", inputs, 4 * width, 1)

    conv("conv1", "bn1", 3, 4, 3)
    bottleneck("layer1.0", 4, 4, True)
    bottleneck("layer1.1", 16, 4, False)
    bottleneck("layer2.0", 16, 8, True)
    shapes |= {"fc1.weight": (2, 32), "fc1.bias": (2,), "FreqLCBlock.fft_scale": (1,)}
    shapes |= {"dwt_transform.h0_col": (1, 1, 2, 1), "FreqLCBlock.idwt_transform.g1_row": (1, 1, 1, 2)}
    shapes |= {f"FreqLCBlock.norm1.body.{each}": (3,) for each in ("weight", "bias")}
    for way in ("FreqLCBlock.dwt_attn", "FreqLCBlock.fft_attn"):
        shapes |= {
            f"{way}.temperature": (1, 1, 1), f"{way}.mlp.0.weight": (16, 16), f"{way}.mlp.0.bias": (16,),
            f"{way}.qkv.weight": (9, 3, 1, 1), f"{way}.qkv_dwconv.weight": (9, 1, 3, 3),
            f"{way}.project_out.weight": (3, 3, 1, 1), f"{way}.project_out.bias": (3,),
        }  # fmt: skip
    return shapes


#: The names and shapes of parameters in releases, and the network that takes them.
RELEASED: dict[str, tuple[Callable[[], Network], Callable[[], dict[str, tuple[int, ...]]]]] = {
    "ECAPATDNN": (MAKE["ECAPATDNN-release"], lambda: _recorded("speechbrain.json")),
    "BiFormer": (
        lambda: BiFormer(
            (1, 2, 1, 1), (8, 16, 24, 32), channels=2, classes=5, topk=(1, 3, 2, None), n_win=2, head_dim=4
        ),
        lambda: _recorded("biformer.json"),
    ),
    "CrossFormer": (
        lambda: CrossFormer(
            (2, 2, 1), (32, 64, 128), (2, 4, 8), channels=2, classes=5, group=3, intervals=(3, 2, 1), mlp_ratio=2.0
        ),
        lambda: _recorded("crossformer.json"),
    ),
    "HallucinationGAT": (
        HallucinationGAT,
        lambda: {
            "embedder.0.weight": (768, 768), "embedder.0.bias": (768,), "embedder.2.weight": (128, 768),
            "embedder.2.bias": (128,), "linear.weight": (32, 128), "linear.bias": (32,), "conv.att_src": (1, 2, 3),
            "conv.att_dst": (1, 2, 3), "conv.bias": (3,), "conv.lin_src.weight": (6, 32),
            "conv.lin_dst.weight": (6, 32),
        },
    ),
    "CATANet": (CATANet.example, _catanet),
    "DFFreqDetector": (DFFreqDetector.example, _dffreq),
    "TwinsSVT": (MAKE["TwinsSVT-release"], lambda: _twins(MAKE["TwinsSVT-release"](), windows=True)),
    "TwinsPCPVT": (TwinsPCPVT.example, lambda: _twins(TwinsPCPVT.example(), windows=False)),
}  # fmt: skip


def networks(where: Callable[[type[Network]], Any] = lambda cls: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if where(cls)])


def example(name: str) -> Network:
    """Make the network with the same parameters each time, in float64 and eval mode, none where it has no effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MAKE[name]().double().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean += 0.1 * torch.randn(part.num_features, generator=draw, dtype=torch.float64)
                part.running_var += 0.2 * torch.rand(part.num_features, generator=draw, dtype=torch.float64)
    return net


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return converted(CLASSES[name].example_inputs(BATCH), dtype)


def converted(given: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in given)
