"""BiFormer, CrossFormer, VSA and FlatFormer against their releases, as recorded by `vision_releases_record.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.models.vision.biformer import BiFormer
from foveate.models.vision.crossformer import CrossFormer
from foveate.nn.parts.blocks import Block, gelu_mlp
from foveate.nn.parts.flat_windows import flat_window_order
from foveate.nn.vision.biformer import BiLevelRoutingAttention
from foveate.nn.vision.crossformer import LongShortAttention
from foveate.nn.vision.flatformer import ORDERS, FlatFormer
from foveate.nn.vision.vsa import VariedSizeWindowAttention
from tests.parity.speechbrain_record import parameters
from tests.parity.vision_releases_record import BLOCKS, CLOUDS, DIM, HEADS, ROUTED, VARIED, cloud, images, maps
from tests.support.tensors import assert_near


def recorded(name: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text("utf-8"))


def released(shapes: dict[str, list[int]], integers: tuple[str, ...] = ("num_batches_tracked", "index")) -> Any:
    """Return the parameters of the record; whole numbers are no parameters."""
    return parameters({name: shape for name, shape in shapes.items() if not name.endswith(integers)})


def load(net: Any, shapes: dict[str, list[int]]) -> Any:
    """Load a release's parameters; counters of batches, which norms keep, are zeros."""
    counters = {name: torch.zeros(()) for name in shapes if name.endswith("num_batches_tracked")}
    net = net.double().eval()
    net.load_released({**released(shapes), **counters})
    return net


def loaded(layer: nn.Module, shapes: dict[str, list[int]], names: dict[str, str]) -> Any:
    """Load a released layer's parameters under our names; 1x1 convolutions are linear maps here."""
    own, layer = layer.state_dict(), layer.double().eval()
    given = {
        f"{names[head]}.{tail}": x
        for name, x in released(shapes).items()
        for head, tail in [name.rsplit(".", 1) if "." in name else (name, "table")]
    }
    layer.load_state_dict({name: x.reshape(own[name].shape) for name, x in given.items()})
    return layer


# -- BiFormer ----------------------------------------------------------------------------------------------------------


def test_biformer() -> None:
    record = recorded("biformer")
    net = BiFormer(
        (1, 2, 1, 1), (8, 16, 24, 32), channels=2, classes=5, topk=(1, 3, 2, None), n_win=2, head_dim=4
    )  # fmt: skip
    load(net, record["parameters"])
    assert_near(net(images(2, 64)), torch.tensor(record["out"], dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("index", range(len(ROUTED)))
def test_bi_level_routing(index: int) -> None:
    record, size = recorded("biformer"), ROUTED[index]
    layer = loaded(
        BiLevelRoutingAttention(DIM, HEADS, 2, 2, scale=DIM**-0.5, padding="seen"), record["layer"],
        {"qkv_linear": "qkv", "output_linear": "out", "lepe": "local.conv"},
    )  # fmt: skip
    assert_near(layer(tokens(size), size=size), torch.tensor(record["outs"][index], dtype=torch.float64), 1e-9)


def tokens(size: tuple[int, int]) -> Tensor:
    return maps(1, DIM, *size).flatten(2).mT


# -- CrossFormer -------------------------------------------------------------------------------------------------------


def test_crossformer() -> None:
    record = recorded("crossformer")
    net = CrossFormer(
        (2, 2, 1), (32, 64, 128), (2, 4, 8), channels=2, classes=5, group=3, intervals=(3, 2, 1), mlp_ratio=2.0,
        fit="release",
    )  # fmt: skip
    load(net, record["parameters"])
    assert_near(net(images(2, 48)), torch.tensor(record["out"], dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_crossformer_s_blocks(index: int) -> None:
    (size, kind, interval), record = BLOCKS[index], recorded("crossformer")
    layer = LongShortAttention(32, 4, 3, ("short", "long")[kind], interval=interval, fit="release")
    block = Block(layer, gelu_mlp(32, 1.0), nn.LayerNorm)
    prefix = "stages.0.0."
    names = {f"layers.0.blocks.0.{name}": x for name, x in released(record["layer"]).items()}
    ours = {name.removeprefix(prefix): x for name, x in CrossFormer.renamed(names).items()}
    block.double().load_state_dict(ours)
    out = block(maps(1, size[0] * size[1], 32), size=size)
    assert_near(out, torch.tensor(record["outs"][index], dtype=torch.float64), 1e-9)


@pytest.mark.parametrize(("name", "make"), [("biformer", BiFormer), ("crossformer", CrossFormer)])
def test_the_smallest_published_network_takes_the_release_s_names(name: str, make: Any) -> None:
    shapes = recorded(name)["released"]
    with torch.device("meta"):
        own = make.of_size("tiny").state_dict()
        given = make.renamed({key: torch.empty(tuple(shape)) for key, shape in shapes.items()})
    assert {key: x.shape for key, x in own.items()} == {key: x.shape for key, x in given.items()}


# -- VSA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(VARIED)))
def test_varied_size_windows(index: int) -> None:
    record, size = recorded("vsa"), VARIED[index]
    layer = loaded(
        VariedSizeWindowAttention(DIM, HEADS, 3, padding="seen"), record["parameters"],
        {"sampling_offsets.2": "offset", "sampling_scales.2": "scale", "qkv": "qkv", "proj": "out",
         "relative_position_bias_table": "bias"},
    )  # fmt: skip
    out = layer(tokens(size), size=size)
    assert_near(out, torch.tensor(record["outs"][index], dtype=torch.float64), 1e-5)  # theirs has places in float32


# -- FlatFormer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(CLOUDS)))
def test_flattened_windows(index: int) -> None:
    """Orders are the release's, cell by cell, and so are the outputs of eight layers."""
    record, (counts, window) = recorded("flatformer"), CLOUDS[index]
    x, coords = cloud(counts)
    orders = [flat_window_order(coords, window, axis, shift).tolist() for axis, shift in ORDERS]
    assert orders == record["orders"][index]
    net = FlatFormer(DIM, HEADS, 2, window, 16).double()
    net.load_released(released(record["parameters"]))
    assert_near(net(x, coords), torch.tensor(record["outs"][index], dtype=torch.float64), 1e-5)  # places in float32
