"""Every method of the catalogue that acts on a decoder, with options for a small model."""

from __future__ import annotations

from collections.abc import Callable

from foveate.core.catalog import systems
from foveate.host import Method, Packed
from foveate.host.operator_swap import PrefillSwap
from foveate.ops.operator import Operator
from foveate.steer.text.act_calibration import ActCalibration
from foveate.steer.vision.avisc import AvisCDecoding
from foveate.steer.vision.flowcut import FlowCut
from tests.contracts.policies import LENGTHS, POLICIES, policy

OPERATORS: dict[str, type[Operator]] = {
    row.key: cls
    for row in systems(room="ops")
    if isinstance(cls := row.load(), type) and issubclass(cls, Operator) and "causal self" in cls.capabilities.patterns
}


def swap(key: str) -> PrefillSwap:
    """Make an operator of small size, in the model's float64."""
    return PrefillSwap(OPERATORS[key].example(4, 8, LENGTHS[0]).double().eval())


#: Policies, operators that read a prompt, and the catalogue's other methods, with options that have an effect.
METHODS: dict[str, Callable[[], Method]] = {
    **{key: lambda key=key: policy(key, 0.25, LENGTHS[0] + 6) for key in POLICIES},  # type: ignore[misc]
    **{key: lambda key=key: swap(key) for key in OPERATORS},  # type: ignore[misc]
    "act_calibration": lambda: ActCalibration([(1, 0), (2, 3)], beta=0.2, alpha=1.0),
    # all layers: over a whole text each of them has attention 1, and rounding would decide which count
    "avisc": lambda: AvisCDecoding(alpha=1.0, beta=0.0, over="text", gamma=1.0),
    "flowcut": lambda: FlowCut(6, llm_layer=1, over="text"),
    "packed": Packed,
}

#: Methods that act on diffusion models alone; see `tests/contracts/test_diffusion_hosts.py`.
ON_DIFFUSION = {"structured_diffusion"}

#: Methods that change no more than the last bits.
EXACT = {"packed", *(key for key, cls in OPERATORS.items() if cls.__name__ in ("Softmax", "MemoryEfficientAttention"))}
#: Methods that can read a prompt in one call only.
WHOLE = {
    "avisc",
    "flowcut",
    *(key for key, cls in OPERATORS.items() if "causal cross" not in cls.capabilities.patterns),
}
