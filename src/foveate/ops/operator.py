"""The seam of operators: `q, k, v -> out`, under one signature, with declared capabilities.

An `Operator` is an `nn.Module`. The base class checks a call, refuses by name what the mechanism does not define, and
leaves the mathematics to one of four families: `Scored`, `Selective`, `Linear`, `Memory`. An operator that can go one
token at a time is also `Streaming` (`ops/base/streaming.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.call import AttentionCall, Plan
from foveate.core.engines import ENGINES
from foveate.core.errors import OptionError, UnsupportedEngine, UnsupportedPattern, nearest
from foveate.core.scoring import SOFTMAX

Pattern = Literal["self", "causal self", "cross", "causal cross"]
MaskKind = Literal["keys", "pairs", "bias"]
Growth = Literal["N", "N log N", "N²"]
Transform = Literal["meta", "vmap", "export"]

ALL_PATTERNS: frozenset[Pattern] = frozenset({"self", "causal self", "cross", "causal cross"})
CAUSAL_PATTERNS: frozenset[Pattern] = frozenset({"causal self", "causal cross"})
ALL_MASKS: frozenset[MaskKind] = frozenset({"keys", "pairs", "bias"})
ALL_TRANSFORMS: frozenset[Transform] = frozenset({"meta", "vmap", "export"})


#: Former names of what a subclass declares or overrides. Nothing would read them.
FORMER = {
    "steps": "capabilities.streaming", "grain": "capabilities.selection_group", "kept": "trim_state",
    "products": "score_macs", "choice_products": "selection_macs", "map_products": "feature_macs",
    "normalise": "normalize", "normalised": "normalized",
}  # fmt: skip


class Gate(NamedTuple):
    """The way in which a layer makes one of an operator's inputs: `activation(w x + bias)`, one number per head.

    Args:
        activation: the function of that name.
        bias: the value at which training starts.
        of: "query" where x is the token that the query comes from, "key" where key and value come from it.
    """

    activation: Literal["sigmoid", "softplus", "exp", "logsigmoid"]
    bias: float
    of: Literal["query", "key"] = "key"


@dataclass(frozen=True)
class Capabilities:
    """Facts that an operator declares about itself, which programs may read.

    Args:
        patterns: valid patterns: "self" and "cross" over all keys, "causal self" and "causal cross" over the past.
        masks: valid kinds of mask: "keys" (bool `(B, 1, 1, Nk)`), "pairs" (any bool mask), "bias" (float).
        has_weights: True if a matrix of weights exists such that `out = weights @ values(v)`.
        streaming: "exact" if `step` equals the causal call over the whole sequence, "own" if one query at a time
            chooses or learns differently by design, None if it cannot stream.
        default_scale: the factor on `q k`; None for `D ** -0.5`.
        inputs: names of further per-token tensors that a call may bring (gates, rates).
        gates: the maps from tokens to those inputs that a layer should learn to make.
        engines: valid names for `engine` besides "auto"; an engine that cannot run a call raises.
        selection_group: neighbouring queries that choose their keys together, counted from the first. In causal calls a
            later token never enters an earlier output, but within such a group it may change which keys are seen. None:
            all queries of a call choose together, so that a model trained so may learn from the choice.
        growth: the growth of time with the number of tokens.
        reads_keys: False if keys have no effect; a layer then does not train their projection.
        transforms: supported transforms of a call: "meta" (the meta device, shapes only), "vmap", "export"
            (`torch.export`; operators that choose keys compute the whole matrix there).
    """

    patterns: frozenset[Pattern] = ALL_PATTERNS
    masks: frozenset[MaskKind] = ALL_MASKS
    has_weights: bool = True
    streaming: Literal["exact", "own"] | None = "exact"
    default_scale: float | None = None
    inputs: frozenset[str] = frozenset()
    gates: Mapping[str, Gate] = field(default_factory=dict)
    engines: tuple[str, ...] = tuple(ENGINES)
    selection_group: int | None = 1
    growth: Growth = "N²"
    reads_keys: bool = True
    transforms: frozenset[Transform] = ALL_TRANSFORMS


class Operator(nn.Module, ABC):
    """Attention from queries, keys and values.

    Attributes:
        capabilities: its declared facts. A class declares them; an instance whose options change them sets its own.
    """

    capabilities: Capabilities = Capabilities()

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a fact that is declared outside `capabilities`, where nothing would read it."""
        super().__init_subclass__(**options)
        if astray := sorted({each.name for each in fields(Capabilities)} & vars(cls).keys()):
            raise TypeError(f"{cls.__name__} declares {', '.join(astray)}: that belongs into its `capabilities`")
        if former := sorted(FORMER.keys() & vars(cls).keys()):
            now = ", ".join(f"{name} is {FORMER[name]} now" for name in former)
            raise TypeError(f"{cls.__name__} declares names that nothing reads any more: {now}")

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse an option of the wrong type before anything is built; record the options, for recipes."""
        validate.options(cls, args, options)
        made = super().__new__(cls)
        named = validate.named(cls, args, options)
        made.__dict__["_given"] = {name: x for name, x in named.items() if not isinstance(x, torch.Generator)}
        return made

    @property
    def given(self) -> dict[str, Any]:
        """The options that the operator was made with, by name, without generators."""
        return dict(self.__dict__["_given"])

    # -- calls ---------------------------------------------------------------------------------------------------------

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
            mask: bool, True = may attend, or a float bias, in which -inf or its dtype's lowest value hides a key;
                broadcastable to `(B, Hq, Nq, Nk)`.
            causal: True = each query sees only the past; the last query sees the last key.
            scale: factor on the dot products; None for the mechanism's default.
            engine: the engine's name; see `foveate.core.engines`.
            inputs: further per-token inputs of the mechanism (gates, rates), by name.

        Raises:
            ShapeError, OptionError: a malformed call.
            UnsupportedPattern: something that the mechanism does not define.
        """
        return self._attend(self._call(q, k, v, mask, causal, scale, engine, inputs))

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
        """Return the matrix that multiplies the values, `(B, Hq, Nq, Nk)`. It takes O(N²) memory."""
        if not self.capabilities.has_weights:
            raise UnsupportedPattern(f"{self.name} has no matrix of weights over keys")
        call = self._call(q, k, k, mask, causal, scale, "auto", inputs)
        if not call.n_queries:
            return q.new_zeros(*q.shape[:3], call.n_keys)
        return self._weights(call)

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
        **inputs: Tensor,
    ) -> Plan:
        """Return the cost of such a call, the engine that would compute it, and the reason."""
        return self._plan(self._call(q, k, v, mask, causal, scale, engine, inputs))

    def values(self, v: Tensor) -> Tensor:
        """Return the tensor that `weights` multiplies: v, unless the mechanism transforms it."""
        return v

    # -- for tests and tables ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return type(self).__name__

    @classmethod
    def example(cls, heads: int, head_dim: int, length: int) -> Self:
        """Make an instance for inputs of this size, in which the mechanism has an effect.

        Tests run it: it has a window shorter than `length`, and learned parts away from values without effect.
        """
        return cls()

    @classmethod
    def example_input(cls, name: str, batch: int, heads: int, length: int) -> Tensor:
        """Make one of the inputs for such a call: `(batch, heads, length)` unless a mechanism needs another shape."""
        return torch.full((batch, heads, length), 0.123)

    @classmethod
    def exact(cls, heads: int, head_dim: int, length: int) -> Self | None:
        """Make the instance that equals softmax attention exactly; None if there is no such limit."""
        return None

    @classmethod
    def at_budget(cls, budget: float, length: int) -> Self:
        """Make the instance that reads about this share of `length` keys, or the default if no option controls it."""
        return cls()

    # -- for families --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _attend(self, call: AttentionCall) -> Tensor:
        """Return the output `(B, Hq, Nq, Dv)` of a checked call."""

    @abstractmethod
    def _weights(self, call: AttentionCall) -> Tensor:
        """Return the weights `(B, Hq, Nq, Nk)` of a checked call, whose v is its k."""

    @abstractmethod
    def _plan(self, call: AttentionCall) -> Plan:
        """Return the plan of a checked call."""

    # -- checks --------------------------------------------------------------------------------------------------------

    def _declare(self, **facts: Any) -> None:
        """Set the capabilities that this instance's options change; call it in `__init__`."""
        self.capabilities = replace(self.capabilities, **facts)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
        engine: str = "auto", inputs: Mapping[str, Tensor] | None = None,
    ) -> AttentionCall:  # fmt: skip
        """Check the arguments and return the call."""
        self._check(q, k, v, mask, causal, inputs or {})
        mask = masks.hide_lowest(mask)
        return AttentionCall(
            q, k, v, self._scale(scale, q), mask, causal, scoring=SOFTMAX, engine=engine, inputs=inputs or {}
        )

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, inputs: Mapping[str, Tensor]
    ) -> None:
        validate.tensors(q, k, v, mask, causal)
        self._check_inputs(inputs)
        can, pattern = (
            self.capabilities,
            ("causal " if causal else "") + ("self" if q.shape[2] == k.shape[2] else "cross"),
        )
        if pattern not in can.patterns:
            raise UnsupportedPattern(
                f'{self.name} does not define "{pattern}" attention; it does {listed(can.patterns)}'
            )
        if mask is not None:
            check_mask_kind(self.name, mask, can.masks)

    def _check_inputs(self, inputs: Mapping[str, object]) -> None:
        for name in inputs:
            if name not in self.capabilities.inputs:
                near = nearest(name, self.capabilities.inputs)
                hint = f'; did you mean "{near}"?' if near else f"; it takes {listed(self.capabilities.inputs)}"
                raise OptionError(f"{self.name} takes no input {name!r}{hint}")

    def _engine(self, call: AttentionCall) -> str:
        """Return the operator's own engine for a call: the first declared one for "auto"."""
        engines = self.capabilities.engines
        if call.engine == "auto":
            return engines[0]
        if call.engine not in engines:
            raise UnsupportedEngine(
                f'engine="{call.engine}" cannot run {self.name}; it runs on auto, {", ".join(engines)}'
            )
        return call.engine

    def _scale(self, scale: float | None, q: Tensor) -> float:
        return validate.scale(self.capabilities.default_scale if scale is None else scale, q.shape[-1])


def mask_kind(mask: Tensor) -> MaskKind:
    """Return "bias" for a float mask, "keys" for a bool mask shared by all heads and queries, else "pairs"."""
    if mask.dtype != torch.bool:
        return "bias"
    same = all(size == 1 for size in mask.shape[max(mask.dim() - 3, 0) : -1])
    return "keys" if same else "pairs"


def check_mask_kind(name: str, mask: Tensor, taken: frozenset[MaskKind]) -> None:
    """Refuse a mask of a kind that an operator or layer of this name does not take."""
    if (kind := mask_kind(mask)) in taken:
        return
    hint = "; a mask of keys is (B, 1, 1, Nk)" if kind == "pairs" and mask.dim() < 4 and "keys" in taken else ""
    raise UnsupportedPattern(f'{name} does not take a mask of kind "{kind}"; it takes {listed(taken)}{hint}')


def listed(names: frozenset[Any]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"
