"""What each operator and layer of the catalogue can do, as facts that a program reads.

They are declared on the classes, or found by trying, and hold for a system's defaults; where the options of its example
give it other powers, these stand beside them. `snapshot` is kept beside the catalogue (`capabilities.json`), so
that `foveate systems` shows them without importing torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from foveate.core.catalog import systems
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer
from foveate.ops.base.linear import Linear
from foveate.ops.base.scored import Scored
from foveate.ops.base.selective import Selective
from foveate.ops.base.state_size import state_bytes
from foveate.ops.base.test_time import Memory
from foveate.ops.calls import sized
from foveate.ops.operator import Operator

HEADS, WIDTH, LENGTH = 4, 16, 64
DIM = HEADS * WIDTH


@dataclass(frozen=True)
class Capabilities:
    """The facts of one system.

    Args:
        kind: "operator" (`q, k, v -> out`) or "layer" (`(B, N, C) -> (B, N, C)`).
        family: of an operator: "scored", "selective", "linear", "memory", or "own".
        patterns: "self", "cross", "causal self", "causal cross".
        masks: "keys", "pairs", "bias".
        streams: "exact" where token by token is the causal call, "own" where it differs by design, None.
        state: what a stream keeps: "constant", "grows", or None where nothing streams.
        weights: whether there is a matrix of weights over keys to look at.
        growth: of the time, in the number of tokens: "N", "N log N", "N²".
        transforms: of "meta", "vmap" and "export", those that a call goes through.
        parameters: trained numbers with 4 heads of 16 channels.
        inputs: further tensors that a call may bring.
        by_options: facts that options change, with what they are in the class's example.
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
    """The facts of an operator or a layer, read from its class and an instance with its defaults."""
    example = cls.example(HEADS, WIDTH, LENGTH) if issubclass(cls, Operator) else cls.example(DIM, HEADS, LENGTH)
    state = _state(example)  # of sizes fit for what is streamed: a default window may be longer
    other = _facts(example, state)
    try:
        made = sized(cls, HEADS, WIDTH) if issubclass(cls, Operator) else cls(DIM, HEADS)  # type: ignore[call-arg]
    except (TypeError, OptionError):  # it has no defaults, or none for such sizes
        return Capabilities(**other)
    facts = _facts(made, state)
    changed = {name: fact for name, fact in other.items() if name != "parameters" and fact != facts[name]}
    return Capabilities(**facts, by_options=changed)


def snapshot() -> dict[str, dict[str, Any]]:
    """The facts of every operator and layer of the catalogue, by key, as they are saved."""
    found = {}
    for row in systems():
        if row.room in ("ops", "nn"):
            cls = row.load()
            if isinstance(cls, type) and issubclass(cls, Operator | Layer):
                found[row.key] = json.loads(json.dumps(asdict(capabilities(cls))))
    return found


def _facts(made: Any, state: str | None) -> dict[str, Any]:
    operates = isinstance(made, Operator)
    return {
        "kind": "operator" if operates else "layer",
        "family": _family(type(made)) if operates else None,
        "patterns": tuple(sorted(made.capabilities.patterns)),
        "masks": tuple(sorted(made.capabilities.masks)),
        "streams": made.capabilities.streaming,
        "state": None if made.capabilities.streaming is None else state,
        "weights": operates and made.capabilities.has_weights,
        "growth": made.capabilities.growth,
        "transforms": tuple(sorted(made.capabilities.transforms)),
        "parameters": sum(p.numel() for p in made.parameters() if p.requires_grad),
        "inputs": tuple(sorted(made.capabilities.inputs)),
    }


def _family(cls: type[Operator]) -> str:
    bases = {"scored": Scored, "selective": Selective, "linear": Linear, "memory": Memory}
    return next((name for name, base in bases.items() if issubclass(cls, base)), "own")


@torch.no_grad()
def _state(made: Operator | Layer) -> str | None:
    """Whether the state of a stream is larger after more tokens."""
    if made.capabilities.streaming is None:
        return None
    sizes = [state_bytes(_after(made, length)) for length in (LENGTH // 2, LENGTH)]
    return "constant" if sizes[0] == sizes[1] else "grows"


def _after(made: Operator | Layer, length: int) -> Any:
    if isinstance(made, Layer):
        return made.prefill(torch.zeros(1, length, made.dim))[1]
    q = torch.zeros(1, HEADS, length, WIDTH)
    inputs = {name: made.example_input(name, 1, HEADS, length) for name in made.capabilities.inputs}
    return made.prefill(q, q, q, **inputs)[1]
