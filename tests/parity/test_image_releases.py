"""CATANet, DFFreq and PT-DiT against their releases, as recorded by `image_releases_record.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.models.vision.catanet import CATANet
from foveate.models.vision.dffreq import DFFreqDetector
from foveate.nn.parts.released import renamed
from foveate.nn.vision.dual_frequency import DualFrequencyBlock, WindowChannelAttention
from foveate.nn.vision.pt_dit import PTDiTBlock, TimeSlots
from tests.parity.image_releases_record import BLOCKS, DIM, HEADS, SIZE, cut, trained
from tests.parity.speechbrain_record import parameters
from tests.parity.vision_releases_record import maps
from tests.support.tensors import assert_near

#: The release's names of a block, and of the vectors for times, and ours.
BLOCK = (
    (r"^proxy_attn1\.", "proxies.among."), (r"^pvisual_attn2\.", "proxies.reading."), (r"^attn1\.", "windows."),
    (r"^attn2\.", "text."), (r"^attn3\.", "shifted."), (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".out."),
    (r"^linear_1_visual\.", "from_proxies."), (r"^linear_2\.", "from_shifted."), (r"^ff\.net\.0\.proj\.", "mlp.0."),
    (r"^ff\.net\.2\.", "mlp.2."), (r"^scale_shift_table$", "slots"), (r"^proxy_scale_shift_table$", "shifted_slots"),
)  # fmt: skip
SLOTS = (
    (r"^emb\.timestep_embedder\.linear_1\.", "embed.0."), (r"^emb\.timestep_embedder\.linear_2\.", "embed.2."),
    (r"^linear\.", "slots.1."),
)  # fmt: skip


def recorded(name: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text("utf-8"))


def outcome(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def load(net: Any, shapes: dict[str, list[int]]) -> Any:
    """Load a release's parameters; flags and counters are 1."""
    given = parameters(trained(shapes))
    net = net.double().eval()
    net.load_released({name: given.get(name, torch.ones(tuple(shape))) for name, shape in shapes.items()})
    return net


def catanet() -> CATANet:
    net = CATANet(2, 8, 2, channels=2, qk_dim=6, mlp_dim=12, centres=(3, 4), groups=(16, 8), windows=(4, 5), rounds=2)
    return load(net, recorded("catanet")["parameters"])


def test_catanet() -> None:
    assert_near(catanet()(maps(2, 2, *SIZE)), outcome(recorded("catanet")["out"]), 1e-9)


def test_catanet_s_centres_after_a_step_of_training() -> None:
    net, record = catanet().train(), recorded("catanet")
    net(maps(3, 2, *SIZE))
    for group, centres in zip(net.blocks, record["centres"], strict=True):
        assert_near(group[0].mixer.centres, outcome(centres), 1e-9)


def test_dffreq() -> None:
    record = recorded("dffreq")
    net = load(DFFreqDetector(2, depths=(1, 1)), record["parameters"])
    assert_near(net(maps(2, 3, 32, 24)), outcome(record["out"]), 1e-6)  # their filters are in float32


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        ("layer", lambda: WindowChannelAttention(6, 2, 3, bias=True), (1, 6, 7, 8)),
        ("block", DualFrequencyBlock, (1, 3, 16, 20)),
    ],
)
def test_dffreq_s_parts(name: str, make: Any, shape: tuple[int, ...]) -> None:
    record, prefix = recorded("dffreq"), "FreqLCBlock." + ("dwt_attn." if name == "layer" else "")
    shapes = trained(record[name])
    ours = DFFreqDetector.renamed({prefix + key: x for key, x in parameters(shapes).items()})
    head = "frequency.dwt." if name == "layer" else "frequency."
    part = make().double()
    part.load_state_dict({key.removeprefix(head): x for key, x in ours.items()})
    assert_near(part(maps(*shape)), outcome(record[f"{name}_out"]), 1e-6)


@pytest.mark.parametrize(("name", "make"), [("catanet", lambda: CATANet(4)), ("dffreq", DFFreqDetector)])
def test_the_networks_take_the_release_s_names(name: str, make: Any) -> None:
    with torch.device("meta"):
        net = make()
        given = {key: torch.empty(tuple(shape)) for key, shape in recorded(name)["released"].items()}
    assert {key: x.shape for key, x in net.renamed(given).items()} == {
        key: x.shape for key, x in net.state_dict().items()
    }


def part(module: nn.Module, shapes: dict[str, list[int]], names: tuple[tuple[str, str], ...]) -> Any:
    module.double().eval().load_state_dict(renamed(parameters(trained(shapes)), names))
    return module


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_pt_dit_s_blocks(index: int) -> None:
    (grid, window), record = BLOCKS[index], recorded("pt_dit")
    block = part(PTDiTBlock(DIM, HEADS, window, text_dim=DIM), record["block"], BLOCK)
    z = maps(1, *grid, DIM)
    out = block(z.flatten(1, 3), grid, maps(1, 6 * DIM), maps(1, 5, DIM))
    assert_near(cut(out.unflatten(1, grid), window), outcome(record["outs"][index]), 1e-9)


def test_pt_dit_s_times() -> None:
    record = recorded("pt_dit")
    slots = part(TimeSlots(DIM), record["slots"], SLOTS)
    assert_near(slots(torch.tensor([0.0, 10.0, 999.0]).double()), outcome(record["times"]), 1e-5)
