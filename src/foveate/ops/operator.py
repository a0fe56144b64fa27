"""The seam of operators: `q, k, v -> out`, under one signature, with declared capabilities.

An `Operator` is an `nn.Module`. The base class checks a call, refuses by name what the mechanism does not define, and
leaves the mathematics to one of four families: `Scored`, `Selective`, `Linear`, `Memory`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.call import Plan
from foveate.core.engines import ENGINES
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.base.kv_state import KVState

Pattern = Literal["self", "causal self", "cross", "causal cross"]
MaskKind = Literal["keys", "pairs", "bias"]
Growth = Literal["N", "N log N", "N²"]
Transform = Literal["meta", "vmap", "export"]

ALL_PATTERNS: frozenset[Pattern] = frozenset({"self", "causal self", "cross", "causal cross"})
ALL_MASKS: frozenset[MaskKind] = frozenset({"keys", "pairs", "bias"})
ALL_TRANSFORMS: frozenset[Transform] = frozenset({"meta", "vmap", "export"})


class Gate(NamedTuple):
    """How a layer makes one of an operator's inputs: `squash(w x + bias)`, one number per head.

    Args:
        squash: the function of that name.
        bias: where training starts.
        of: whether x is the token that the query comes from, or the one that key and value come from.
    """

    squash: Literal["sigmoid", "softplus", "exp", "logsigmoid"]
    bias: float
    of: Literal["query", "key"] = "key"


class Operator(nn.Module, ABC):
    """Attention from queries, keys and values.

    Declared facts, which programs may read:
        patterns: what it can compute: "self" and "cross" over all keys, "causal self" and "causal cross" over the past.
        masks: kinds of mask it takes: "keys" (bool `(B, 1, 1, Nk)`), "pairs" (any bool mask), "bias" (float).
        has_weights: whether there is a matrix of weights such that `out = weights @ values(v)`.
        steps: "exact" where `step` gives what the causal call over the whole sequence gives, "own" where one query at
            a time chooses or learns differently by design, None where it cannot stream.
        default_scale: the factor on `q k`, None for `D ** -0.5`.
        inputs: names of further per-token tensors that a call may bring (gates, rates).
        gates: for those that a layer should learn to make from the tokens, how, and where they start.
        engines: names that `engine` may take besides "auto"; a call that one of them cannot run is refused.
        state_type: what `init_state` gives and `step` takes.
        grain: neighbouring queries that choose their keys together, counted from the first. Causal calls never let a
            later token into an earlier output, but within such a group it may have a say in which keys are seen.
        growth: how time grows with the number of tokens.
        reads_keys: whether keys have a say at all; a layer does not train what makes them where they have none.
        transforms: what a call goes through besides running: "meta" (the meta device, shapes alone), "vmap", "export"
            (`torch.export`, where what chooses keys makes the whole matrix).
    """

    patterns: ClassVar[frozenset[Pattern]] = ALL_PATTERNS
    masks: ClassVar[frozenset[MaskKind]] = ALL_MASKS
    has_weights: ClassVar[bool] = True
    steps: ClassVar[Literal["exact", "own"] | None] = "exact"
    default_scale: ClassVar[float | None] = None
    inputs: ClassVar[frozenset[str]] = frozenset()
    gates: ClassVar[Mapping[str, Gate]] = {}
    engines: ClassVar[tuple[str, ...]] = tuple(ENGINES)
    state_type: ClassVar[type] = KVState
    grain: int = 1
    growth: ClassVar[Growth] = "N²"
    transforms: ClassVar[frozenset[Transform]] = ALL_TRANSFORMS
    reads_keys: bool = True

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuses an option of the wrong type before anything is made."""
        validate.options(cls, args, options)
        return super().__new__(cls)

    # -- what a user calls ---------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Float[Tensor, "b hq nq d"],
        k: Float[Tensor, "b hkv nk d"],
        v: Float[Tensor, "b hkv nk dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        engine: str = "auto",
        **inputs: Tensor,
    ) -> Float[Tensor, "b hq nq dv"]:
        """Attend.

        Args:
            q: queries `(B, Hq, Nq, D)`.
            k: keys `(B, Hkv, Nk, D)`; `Hq` is a multiple of `Hkv`.
            v: values `(B, Hkv, Nk, Dv)`.
            mask: bool, True = may attend, or a float bias; broadcastable to `(B, Hq, Nq, Nk)`.
            causal: only the past; the last query sees the last key.
            scale: factor on the dot products; the mechanism's own default where None.
            engine: who computes; see `foveate.core.engines`.
            inputs: further per-token inputs of the mechanism (gates, rates), by name.

        Raises:
            ShapeError, OptionError: a malformed call.
            UnsupportedPattern: something that the mechanism does not define.
        """
        self._check(q, k, v, mask, causal, inputs)
        return self._attend(q, k, v, mask, causal, self._scale(scale, q), engine, **inputs)

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        **inputs: Tensor,
    ) -> Float[Tensor, "b hq nq nk"]:
        """The matrix that multiplies the values, `(B, Hq, Nq, Nk)`; O(N²) memory, for looking and testing."""
        if not self.has_weights:
            raise UnsupportedPattern(f"{self.name} has no matrix of weights over keys")
        self._check(q, k, k, mask, causal, inputs)
        return self._weights(q, k, mask, causal, self._scale(scale, q), **inputs)

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        engine: str = "auto",
    ) -> Plan:
        """What such a call would cost, who would compute it, and why."""
        self._check(q, k, v, mask, causal)
        return self._plan(q, k, v, mask, causal, self._scale(scale, q), engine)

    def init_state(
        self, batch: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> Any:  # fmt: skip
        """An empty state for `step`. `heads` is Hq."""
        self._check_steps()
        for name, value in (
            ("batch", batch),
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("key_dim", key_dim),
            ("value_dim", value_dim),
        ):
            validate.count(name, value, 1)
        if heads % kv_heads:
            raise OptionError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        return self._init_state(batch, heads, kv_heads, key_dim, value_dim, dtype, torch.device(device))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, *, scale: float | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Any]:
        """One token: `q (B, Hq, 1, D)`, `k, v (B, Hkv, 1, ·)` and a state give `(out (B, Hq, 1, Dv), state)`."""
        self._check_steps()
        validate.tensors(q, k, v)
        self._check_inputs(inputs)
        if not isinstance(state, self.state_type):
            raise OptionError(f"state must come from init_state or step; got {type(state).__name__}")
        if q.shape[2] != 1 or k.shape[2] != 1:
            raise ShapeError(f"step takes one token; got Nq={q.shape[2]}, Nk={k.shape[2]}")
        return self._step(q, k, v, state, self._scale(scale, q), **inputs)

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: Tensor
    ) -> tuple[Float[Tensor, "b hq nq dv"], Any]:
        """A causal call, and the state after it: `step` goes on from a long prompt without going through it.

        Args:
            q, k, v: as for a call; queries may be the last few only.
            scale, inputs: as for a call.

        Returns:
            What `forward(q, k, v, causal=True)` gives, and what `step` takes.
        """
        self._check_steps()
        self._check(q, k, v, None, True, inputs)
        return self._prefill(q, k, v, self._scale(scale, q), **inputs)

    def values(self, v: Tensor) -> Tensor:
        """What `weights` multiplies: v, unless the mechanism weighs values by what they hold."""
        return v

    # -- what tests and tables read ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        """An instance fit for inputs of such a size, and in which the mechanism really is at work.

        Tests run it: a window shorter than `length`, learned parts away from where they do nothing.
        """
        return cls()

    @classmethod
    def example_input(cls, name: str, batch: int, heads: int, length: int) -> Tensor:
        """One of `inputs` for calls of such a size: `(batch, heads, length)` unless a mechanism wants another shape."""
        return torch.full((batch, heads, length), 0.123)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self | None:
        """The instance at which the mechanism equals softmax attention exactly; None where there is no such limit."""
        return None

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        """The instance that reads about this share of `length` keys; the only one, where there is no such knob."""
        return cls()

    # -- what a family writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        engine: str,
        **inputs: Tensor,
    ) -> Tensor: ...

    @abstractmethod
    def _weights(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, **inputs: Tensor
    ) -> Tensor: ...

    @abstractmethod
    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, engine: str
    ) -> Plan: ...

    @abstractmethod
    def _init_state(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any: ...

    @abstractmethod
    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, scale: float, **inputs: Tensor
    ) -> tuple[Tensor, Any]: ...

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **inputs: Tensor) -> tuple[Tensor, Any]:
        """Families that know better than one token after the other override it."""
        heads, kv_heads, past = q.shape[1], k.shape[1], k.shape[2] - q.shape[2]
        state = self._init_state(q.shape[0], heads, kv_heads, k.shape[3], v.shape[3], q.dtype, q.device)
        padded, out = F.pad(q, (0, 0, past, 0)), []
        for t in range(k.shape[2]):
            at = slice(t, t + 1)
            here = {name: x[:, :, at] for name, x in inputs.items()}
            y, state = self._step(padded[:, :, at], k[:, :, at], v[:, :, at], state, scale, **here)
            out.append(y)
        return torch.cat([*out[past:], q.new_zeros(*q.shape[:2], 0, v.shape[3])], 2), state

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        inputs: dict[str, Tensor] | None = None,
    ) -> None:
        validate.tensors(q, k, v, mask, causal)
        self._check_inputs(inputs or {})
        pattern = ("causal " if causal else "") + ("self" if q.shape[2] == k.shape[2] else "cross")
        if pattern not in self.patterns:
            raise UnsupportedPattern(
                f'{self.name} does not define "{pattern}" attention; it does {listed(self.patterns)}'
            )
        if mask is not None and (kind := mask_kind(mask)) not in self.masks:
            raise UnsupportedPattern(
                f'{self.name} does not take a mask of kind "{kind}"; it takes {listed(self.masks)}'
            )

    def _check_steps(self) -> None:
        if self.steps is None:
            why = "its output depends on the whole sequence"
            raise UnsupportedPattern(f"{self.name} cannot go one token at a time: {why}")

    def _check_inputs(self, inputs: dict[str, Tensor]) -> None:
        for name in inputs:
            if name not in self.inputs:
                raise OptionError(f"{self.name} takes no input {name!r}; it takes {listed(self.inputs)}")

    def _scale(self, scale: float | None, q: Tensor) -> float:
        return validate.scale(self.default_scale if scale is None else scale, q.shape[-1])


def mask_kind(mask: Tensor) -> MaskKind:
    """ "bias" for a float mask, "keys" for a bool mask that is the same for all heads and queries, else "pairs"."""
    if mask.dtype != torch.bool:
        return "bias"
    same = all(size == 1 for size in mask.shape[max(mask.dim() - 3, 0) : -1])
    return "keys" if same else "pairs"


def listed(names: frozenset[Any]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"
