"""The feature gates of the catalogue, for the contract: those that are a row's object, or one of its parts."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.catalog import systems
from foveate.nn.base.feature_gate import FeatureGate
from foveate.nn.channel.eca import EfficientChannelAttention
from foveate.nn.vision.attention_gate import AttentionGate
from foveate.nn.vision.bot import BottleneckAttention
from foveate.nn.vision.cbam import CBAM
from foveate.nn.vision.coordinate_attention import CoordinateAttention
from foveate.nn.vision.danet import DualAttentionGate
from foveate.nn.vision.dual_frequency import DualFrequencyBlock, WindowChannelAttention
from foveate.nn.vision.non_local import NonLocal
from foveate.nn.vision.residual_attention import ResidualAttentionModule
from foveate.nn.vision.triplet_attention import TripletAttention
from foveate.nn.vision.ulsam import ULSAM

CHANNELS, BATCH = 8, 3

#: Sizes of maps for each number of axes: one position, odd and uneven sides, a long side.
SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,), (2,), (7,), (40,)),
    2: ((1, 1), (1, 6), (5, 7), (8, 6)),
    3: ((1, 1, 1), (2, 1, 3), (3, 5, 4)),
}

#: The size that most tests take.
MAIN: dict[int, tuple[int, ...]] = {1: (7,), 2: (5, 7), 3: (3, 5, 4)}

#: Second ways through a gate of the catalogue, and gates of networks, by name: a class and the options that lead there.
EXTRA: dict[str, tuple[type[FeatureGate], dict[str, Any]]] = {
    "ulsam-paper": (ULSAM, {"num_splits": 4}),
    "residual_attention-nal": (ResidualAttentionModule, {"down": 1, "t": 1, "mode": "nal", "gate": "spatial"}),
    "residual_attention-channel": (ResidualAttentionModule, {"down": 1, "t": 1, "gate": "channel"}),
    "eca-wide": (EfficientChannelAttention, {"kernel": 5}),
    "cbam-formula": (CBAM, {"hidden": 3, "kernel": 5, "bias": False, "norm": False}),
    "coordinate_attention-wide": (CoordinateAttention, {"bias": False}),
    "triplet_attention-rotated": (TripletAttention, {"kernel": 5, "spatial": False}),
    "non_local-gaussian": (NonLocal, {"kind": "gaussian", "scale": 0.3}),
    "non_local-dot": (NonLocal, {"kind": "dot", "subsample": True, "norm": False}),
    "non_local-concatenation": (NonLocal, {"kind": "concatenation", "hidden": 3}),
    "danet-release": (DualAttentionGate, {"variant": "release"}),
    "bot-plain": (BottleneckAttention, {"heads": 2, "relative": False, "bias": True}),
    "attention_gate-normed": (AttentionGate, {"hidden": 3, "stride": 1, "norm": True}),
    "dffreq-windows": (WindowChannelAttention, {"heads": 2, "window": 3, "bias": True}),
    "dffreq-block": (DualFrequencyBlock, {}),
}


def _catalogued() -> dict[str, type[FeatureGate]]:
    found = {}
    for row in systems(room="nn"):
        for target in (row.object, *row.parts):
            module, _, name = target.partition(":")
            value = getattr(import_module(module), name)
            if isinstance(value, type) and issubclass(value, FeatureGate):
                found[row.key if target == row.object else f"{row.key}-{name}"] = value
    return found


#: The gates by key; a part's key has its name behind it.
GATES = _catalogued()
KEYS = [*GATES, *EXTRA]


def gate_type(key: str) -> type[FeatureGate]:
    return GATES[key] if key in GATES else EXTRA[key][0]


def example(key: str, dims: int, channels: int = CHANNELS) -> FeatureGate:
    """Make the gate's example with the same parameters each time, none of which is at a special value such as 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if key in EXTRA:
            cls, options = EXTRA[key]
            gate = cls.for_map(channels, dims, **options)
        else:
            gate = GATES[key].example(channels, dims)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return gate.double().eval()


def a_map(size: tuple[int, ...], *, batch: int = BATCH, channels: int = CHANNELS, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=random, dtype=torch.float64)


def gates(*, by_size: bool = False) -> pytest.MarkDecorator:
    """Parametrise over gates and their numbers of axes; with `by_size` over all sizes too."""
    cases = [
        pytest.param(key, size, id=f"{key}-{'x'.join(map(str, size))}")
        for key in KEYS
        for dims in sorted(gate_type(key).axes)
        for size in (SIZES[dims] if by_size else [MAIN[dims]])
    ]
    return pytest.mark.parametrize(("key", "size"), cases)
