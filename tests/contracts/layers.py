"""The layers of the catalogue, and `MultiHeadAttention` with an operator of each family, for the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.catalog import systems
from foveate.models.language.based import CausalWindowAttention, GatedConv
from foveate.nn import MultiHeadAttention, Rotary
from foveate.nn.base.layer import Layer
from foveate.nn.parts.overlap import OverlappingWindowAttention
from foveate.nn.sequence.aaren import AarenLayer
from foveate.nn.sequence.base_conv import BaseConv
from foveate.nn.sequence.chosen_attention import ChosenAttention
from foveate.nn.sequence.interacting import InteractingLayer
from foveate.nn.sequence.neural_memory import NeuralMemory
from foveate.nn.sequence.routing_self_attention import RoutingSelfAttention
from foveate.nn.sequence.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from foveate.nn.vision.crossformer import LongShortAttention
from foveate.nn.vision.maformer import MAFBlock
from foveate.nn.vision.token_aggregation import TokenAggregation
from foveate.ops.operator import MaskKind, Pattern

DIM, HEADS, BATCH, LENGTH, MEMORY = 16, 4, 2, 12, 9

SYSTEMS: dict[str, type[Layer]] = {
    row.key: found
    for row in systems("nn")
    if isinstance(found := row.load(), type) and issubclass(found, Layer)
}  # fmt: skip

#: Layers whose row in the catalogue is an operator's, a network's or a task's.
EXTRA: dict[str, type[Layer]] = {
    "titans-memory": NeuralMemory, "titans-gate": MemoryAsGate, "titans-layer": MemoryAsLayer,
    "titans-context": MemoryAsContext, "aaren": AarenLayer, "autoint": InteractingLayer, "based-conv": GatedConv,
    "based-window": CausalWindowAttention, "zoology-conv": BaseConv, "zoology-chosen": ChosenAttention,
    "crossformer": LongShortAttention, "maformer": MAFBlock, "catanet": TokenAggregation,
    "catanet-windows": OverlappingWindowAttention,
    "routing": RoutingSelfAttention,
}  # fmt: skip
SYSTEMS |= EXTRA

#: `MultiHeadAttention` around an operator of each family, with and without a convolution.
AROUND: dict[str, dict[str, Any]] = {
    "multi_head": dict(kv_heads=2, position=Rotary(), qk_norm=True, out_norm=True, gate="sigmoid", bias=True),
    "multi_head-selective": dict(op="sliding_window", kv_heads=2),
    "multi_head-linear": dict(op="hedgehog", conv=3, out_norm=True, gate="silu"),
    "multi_head-memory": dict(op="titans", conv=3, position=Rotary()),
}

KEYS = [*SYSTEMS, *AROUND]


def example(key: str, length: int = LENGTH) -> Layer:
    """Make the layer's example with the same parameters each time, all of which have an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if key in AROUND:
            return MultiHeadAttention(DIM, HEADS, **AROUND[key]).double().eval()
        return SYSTEMS[key].example(DIM, HEADS, length).double().eval()


def example_inputs(key: str, length: int = LENGTH, batch: int = BATCH) -> dict[str, Any]:
    return {} if key in AROUND else SYSTEMS[key].example_inputs(batch, length)


@dataclass(frozen=True)
class Call:
    """One way to call one layer."""

    key: str
    pattern: Pattern
    mask_kind: MaskKind | None = None

    @property
    def causal(self) -> bool:
        return self.pattern.startswith("causal")

    @property
    def n_keys(self) -> int:
        return MEMORY if "cross" in self.pattern else LENGTH

    def tokens(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, LENGTH, DIM, generator=random, dtype=torch.float64).to(dtype)
        source = torch.randn(BATCH, MEMORY, DIM, generator=random, dtype=torch.float64).to(dtype)
        return x, source if "cross" in self.pattern else None

    def __call__(self, layer: Layer, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        inputs = example_inputs(self.key, x.shape[1], x.shape[0])
        given = {name: i.to(x.dtype) if is_real(i) else i for name, i in inputs.items()}
        return layer(x, source, mask=mask, causal=self.causal, **given)

    def __str__(self) -> str:
        return "-".join(part.replace(" ", "_") for part in (self.key, self.pattern, self.mask_kind) if part)


def is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def calls(*, masked: bool = False, causal: bool = False) -> pytest.MarkDecorator:
    """Parametrise over the patterns of every layer: with each kind of mask if `masked`, only causal if `causal`."""
    found = []
    for key in KEYS:
        layer = example(key)
        for pattern in sorted(layer.capabilities.patterns):
            if causal and not pattern.startswith("causal"):
                continue
            kinds = sorted(layer.capabilities.masks) if masked else [None]
            found += [Call(key, pattern, kind) for kind in kinds]
    return pytest.mark.parametrize("call", found, ids=str)


def layers(where=lambda layer: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("key", [key for key in KEYS if where(example(key))])


def main_call(key: str) -> Call:
    patterns = example(key).capabilities.patterns
    return Call(key, next(p for p in ("self", "causal self", "cross") if p in patterns))
