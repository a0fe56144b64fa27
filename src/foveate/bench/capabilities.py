"""The capabilities of each operator and layer of the catalogue, as plain data.

They are declared on the classes, or found by experiment, and hold for a system's defaults; capabilities that the
options of its example change are listed too. `snapshot` is saved beside the catalogue (`capabilities.json`), so that
`foveate systems` shows it without importing torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from foveate.core.catalog import systems
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer, streaming
from foveate.ops.base.linear import Linear
from foveate.ops.base.scored import Scored
from foveate.ops.base.selective import Selective
from foveate.ops.base.state_size import state_bytes
from foveate.ops.base.streaming import Streaming
from foveate.ops.base.test_time import Memory
from foveate.ops.calls import sized
from foveate.ops.operator import Operator

HEADS, WIDTH, LENGTH = 4, 16, 64
DIM = HEADS * WIDTH


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of one system.

    Args:
        kind: "operator" (`q, k, v -> out`) or "layer" (`(B, N, C) -> (B, N, C)`).
        family: an operator's family: "scored", "selective", "linear", "memory", or "own".
        patterns: "self", "cross", "causal self", "causal cross".
        masks: "keys", "pairs", "bias".
        streams: "exact" if streaming equals the causal call, "own" if it differs by design, None if there is none.
        state: the size of a stream's state: "constant", "grows", or None without streaming.
        weights: True if the operator has a matrix of weights over keys.
        growth: the growth of time with the number of tokens: "N", "N log N", "N²".
        transforms: those of "meta", "vmap" and "export" that a call supports.
        parameters: the number of trainable parameters with 4 heads of 16 channels.
        inputs: names of optional further tensors of a call.
        by_options: capabilities that options change, with their values in the class's example.
    """

    kind: str
    family: str | None
    patterns: tuple[str, ...]
    masks: tuple[str, ...]
    streams: str | None
    state: str | None
    weights: bool
    growth: str
    transforms: tuple[str, ...]
    parameters: int
    inputs: tuple[str, ...]
    by_options: dict[str, Any] = field(default_factory=dict)


def capabilities(cls: type[Operator] | type[Layer]) -> Capabilities:
    """Return the capabilities of an operator or a layer, read from its class and a default instance."""
    example = cls.example(HEADS, WIDTH, LENGTH) if issubclass(cls, Operator) else cls.example(DIM, HEADS, LENGTH)
    state = _state(example)  # the example has sizes below LENGTH; a default window may be longer
    other = _facts(example, state)
    try:
        instance = sized(cls, HEADS, WIDTH) if issubclass(cls, Operator) else cls(DIM, HEADS)
    except (TypeError, OptionError):  # it has no defaults for these sizes
        return Capabilities(**other)
    facts = _facts(instance, state)
    changed = {name: fact for name, fact in other.items() if name != "parameters" and fact != facts[name]}
    return Capabilities(**facts, by_options=changed)


def snapshot() -> dict[str, dict[str, Any]]:
    """Return the capabilities of every operator and layer of the catalogue, by key, as they are saved."""
    found = {}
    for row in systems():
        if row.room in ("ops", "nn"):
            cls = row.load()
            if isinstance(cls, type) and issubclass(cls, Operator | Layer):
                found[row.key] = json.loads(json.dumps(asdict(capabilities(cls))))
    return found


def _facts(instance: Any, state: str | None) -> dict[str, Any]:
    operates = isinstance(instance, Operator)
    return {
        "kind": "operator" if operates else "layer",
        "family": _family(type(instance)) if operates else None,
        "patterns": tuple(sorted(instance.capabilities.patterns)),
        "masks": tuple(sorted(instance.capabilities.masks)),
        "streams": instance.capabilities.streaming,
        "state": None if instance.capabilities.streaming is None else state,
        "weights": operates and instance.capabilities.has_weights,
        "growth": instance.capabilities.growth,
        "transforms": tuple(sorted(instance.capabilities.transforms)),
        "parameters": sum(p.numel() for p in instance.parameters() if p.requires_grad),
        "inputs": tuple(sorted(instance.capabilities.inputs)),
    }


def _family(cls: type[Operator]) -> str:
    bases = {"scored": Scored, "selective": Selective, "linear": Linear, "memory": Memory}
    return next((name for name, base in bases.items() if issubclass(cls, base)), "own")


@torch.no_grad()
def _state(instance: Operator | Layer) -> str | None:
    """Return "grows" if a stream's state is larger after more tokens, else "constant"; None without streaming."""
    if instance.capabilities.streaming is None:
        return None
    sizes = [state_bytes(_after(instance, length)) for length in (LENGTH // 2, LENGTH)]
    return "constant" if sizes[0] == sizes[1] else "grows"


def _after(instance: Operator | Layer, length: int) -> Any:
    if isinstance(instance, Layer):
        return streaming(instance).prefill(torch.zeros(1, length, instance.dim))[1]
    assert isinstance(instance, Streaming)  # its capabilities say so
    q = torch.zeros(1, HEADS, length, WIDTH)
    names = instance.capabilities.inputs
    inputs: dict[str, Any] = {name: instance.example_input(name, 1, HEADS, length) for name in names}
    return instance.prefill(q, q, q, **inputs)[1]
