"""The dynamical systems framework: its normalized attention, and any linear operator as a state-space system.

Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks (2024),
arXiv 2405.15731. The framework itself is `foveate.ops.functional.state_space`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.base.kv_state import KVState
from foveate.ops.base.linear import Linear
from foveate.ops.base.state_size import tensors
from foveate.ops.base.streaming import Streaming
from foveate.ops.functional import state_space
from foveate.ops.functional.state_space import StateSpace
from foveate.ops.operator import CAUSAL_PATTERNS, Gate, Operator

Activation = Literal["exp", "softplus", "sigmoid"]
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
}
Equivalent = Literal["linear attention", "normalized linear attention", "SSD", "normalized SSD", "diagonal SSM"]


@final
class NormalizedAttention(Linear):
    """`y_i = (1 / eta_i) phi(q_i) . sum_{j <= i} phi(k_j) v_j`: linear attention with a normalizer of its own.

    The classic normalizer, the sum of the weights, ties the size of the output to queries and keys and needs positive
    features; here a positive number learned from the token replaces it, and features may have any sign. Cost O(N D Dv),
    a state of D x Dv numbers per head, causal only. Weights do not sum to 1 and nothing decays, so the output may grow
    with the length. The wrong choice if old tokens have to be forgotten.

    Args:
        features: phi. "identity", as in the release's experiments, or "elu1" (`elu + 1`).
        activation: a layer makes `eta = activation(w . token + b)`, and a call brings it as `eta (B, H, Nq)`, positive.
            The release has "exp"; the other two are reconstructed.
        learned: `(Hq, D)` makes eta from the queries instead, by a map per head in this module, at first 1 for "exp".
            Without it every call has to bring eta.

    `scale` is 1 unless a call gives another, as in the release.

    Raises:
        OptionError: an unknown option, or a call without eta if nothing is learned.
        ShapeError: eta of another shape.
    """

    capabilities = replace(Linear.capabilities, patterns=CAUSAL_PATTERNS, inputs=frozenset({"eta"}), default_scale=1.0)
    normalized: ClassVar[bool] = False

    def __init__(
        self, features: Literal["identity", "elu1"] = "identity", activation: Activation = "exp", *,
        learned: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        validate.one_of("features", features, ("identity", "elu1"))
        validate.one_of("activation", activation, ("exp", "softplus", "sigmoid"))
        self.features, self.activation = features, activation
        self._declare(gates={} if learned else {"eta": Gate(activation, 0.0, of="query")})
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if learned is not None:
            for name, size in zip(("learned heads", "learned head_dim"), learned, strict=True):
                validate.count(name, size, 1)
            self.weight = nn.Parameter(torch.zeros(learned))
            self.bias = nn.Parameter(torch.zeros(learned[0]))

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return self._features(q) * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return self._features(k)

    def _features(self, x: Tensor) -> Tensor:
        return x if self.features == "identity" else F.elu(x) + 1

    def encode_queries(self, q: Tensor, scale: float, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.query_features(q, scale) / self.normalizer(q, inputs.get("eta"))[..., None]

    def normalizer(self, q: Float[Tensor, "b h n d"], eta: Tensor | None = None) -> Float[Tensor, "b h n"]:
        """Return the divisor of each query's weights."""
        if eta is not None:
            if not isinstance(eta, Tensor) or eta.shape != q.shape[:3]:
                got = tuple(eta.shape) if isinstance(eta, Tensor) else eta
                raise ShapeError(f"eta must be a tensor (B, Hq, Nq)={tuple(q.shape[:3])}; got {got}")
            return eta.to(q.dtype)
        if self.weight is None or self.bias is None:
            raise OptionError("a call needs eta (B, Hq, Nq), or the operator learned=(Hq, D) to make it from q")
        if q.shape[1] != len(self.weight) or q.shape[3] != self.weight.shape[1]:
            built, got = tuple(self.weight.shape), (q.shape[1], q.shape[3])
            raise ShapeError(f"{self.name} was built with learned=(Hq, D)={built}; got {got}")
        value = torch.einsum("bhnd,hd->bhn", q, self.weight.to(q.dtype)) + self.bias.to(q.dtype)[:, None]
        return _ACTIVATIONS[self.activation](value)

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> NormalizedAttention:
        op = cls("elu1", "softplus", learned=(heads, head_dim))
        assert op.weight is not None  # `learned` sets it
        nn.init.normal_(op.weight, std=0.5)
        return op


@dataclass(frozen=True)
class Converted:
    """A call of a linear operator as a state-space system, whose output is `system.run(u)`.

    Args:
        system: the matrices, for every head.
        u: the inputs, which are the values: `(B, H, N, Dv)`.
        state_size: numbers in the state, per head.
        equivalent: the equivalent system in the framework: un-normalized or normalized linear attention if nothing
            decays; SSD (Mamba-2) if one factor decays the whole state; a diagonal SSM, like S6 and gated linear
            attention, if each feature has its own factor.
    """

    system: StateSpace
    u: Tensor
    state_size: int
    equivalent: Equivalent


def to_dsf(op: Operator, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: Tensor) -> Converted:
    """Convert a causal call of any linear operator to Lambda, B, C; the system's output is `op(q, k, v, causal=True)`.

    Args:
        op: an operator of the linear family.
        q, k, v: as for a call, with as many queries as keys.
        scale, inputs: as for a call.

    Raises:
        UnsupportedPattern: an operator whose state is no sum of features, so that no such finite system exists.
    """
    if not isinstance(op, Linear):
        raise UnsupportedPattern(f"{op.name} has no linear state; only operators of the linear family do")
    call = op._call(q, k, v, None, True, scale, "auto", inputs)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"a system needs as many queries as keys; got Nq={q.shape[2]}, Nk={k.shape[2]}")
    fq, fk, values, decay = op.encoded(call)
    if op.normalized:  # the operator's output for a row that sums to `total` and holds a single 1
        total = state_space.sum_of_weights(fq, fk, decay)
        fq = fq * op.normalize(torch.stack([torch.ones_like(total), total], -1))
    gate = None if decay is None else torch.exp(decay).expand(*fk.shape[: decay.dim()])
    system = state_space.linear(fq, fk, v.shape[-1], gate=gate)
    divided = op.normalized or isinstance(op, NormalizedAttention)
    if decay is None or not decay.any():
        found: Equivalent = "normalized linear attention" if divided else "linear attention"
    elif decay.dim() == fk.dim():
        found = "diagonal SSM"
    else:
        found = "normalized SSD" if divided else "SSD"
    return Converted(system, values[..., : v.shape[-1]], system.state_size, found)


def state_size(op: Operator, head_dim: int, value_dim: int, *, heads: int = 1) -> int | None:
    """Return the numbers per head in the state of a stream, sums for a normalizer included.

    None if the state grows with the length, like a cache of keys and values.

    Raises:
        UnsupportedPattern: an operator that cannot stream.
    """
    if not isinstance(op, Streaming):
        raise UnsupportedPattern(f"{op.name} cannot go one token at a time")
    state = op.init_state(1, heads, heads, head_dim, value_dim)
    return None if isinstance(state, KVState) else sum(x.numel() for x in tensors(state)) // heads
