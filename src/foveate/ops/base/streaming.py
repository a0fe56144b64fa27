"""Streaming: operators that process one token at a time and keep a state of the past."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.call import AttentionCall, StateSizes
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.core.scoring import SOFTMAX
from foveate.ops.base.kv_state import KVState
from foveate.ops.operator import Operator


class Streaming(Operator, ABC):
    """An operator with `init_state`, `step` and `prefill`.

    Some options rule streaming out. `capabilities.streaming` is then None, and all three methods raise
    `UnsupportedPattern`.

    Attributes:
        state_type: the type of the state.
    """

    state_type: ClassVar[type] = KVState

    def init_state(
        self, batch: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> Any:  # fmt: skip
        """Make an empty state for `step`. `heads` is Hq."""
        self._check_streaming()
        sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim}
        for name, value in sizes.items():
            validate.count(name, value, 1)
        if heads % kv_heads:
            raise OptionError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        return self._init_state(StateSizes(**sizes, dtype=dtype, device=torch.device(device)))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, *, scale: float | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Any]:
        """Process one token `q (B, Hq, 1, D)`, `k, v (B, Hkv, 1, ·)`; return `(out (B, Hq, 1, Dv), state)`."""
        self._check_streaming()
        validate.tensors(q, k, v)
        self._check_inputs(inputs)
        if q.shape[2] != 1 or k.shape[2] != 1:
            raise ShapeError(f"step takes one token; got Nq={q.shape[2]}, Nk={k.shape[2]}")
        call = AttentionCall(q, k, v, self._scale(scale, q), causal=True, scoring=SOFTMAX, inputs=inputs)
        self._check_state(state, call)
        return self._step(call, state)

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None, scale: float | None = None, **inputs: Tensor
    ) -> tuple[Float[Tensor, "b hq nq dv"], Any]:
        """Make a causal call and return its output and the state after it, from which `step` continues.

        Args:
            q, k, v: as for a call; queries may be those of the last tokens only.
            state: the state of earlier tokens; None at the start of a sequence.
            scale, inputs: as for a call.

        Returns:
            The output of `forward(q, k, v, causal=True)` with the state's tokens before these, and the state for
            `step`.
        """
        self._check_streaming()
        call = self._call(q, k, v, None, True, scale, "auto", inputs)
        if state is not None:
            self._check_state(state, call)
        return self._prefill(call, state)

    # -- for families --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _init_state(self, sizes: StateSizes) -> Any: ...

    @abstractmethod
    def _step(self, call: AttentionCall, state: Any) -> tuple[Tensor, Any]: ...

    def _prefill(self, call: AttentionCall, state: Any) -> tuple[Tensor, Any]:
        """Process token by token; families with a faster form override it."""
        past, out = call.n_keys - call.n_queries, []
        state = self._init_state(StateSizes.of(call)) if state is None else state
        padded = F.pad(call.q, (0, 0, past, 0))
        for t in range(call.n_keys):
            at = slice(t, t + 1)
            here = {name: x[:, :, at] for name, x in call.inputs.items()}
            one = replace(call, q=padded[:, :, at], k=call.k[:, :, at], v=call.v[:, :, at], inputs=here)
            y, state = self._step(one, state)
            out.append(y)
        return torch.cat([*out[past:], call.no_output[:, :, :0]], 2), state

    def _fixed_sizes(self, state: Any) -> tuple[object, ...]:
        """Return the sizes in a state that no token changes. A cache has none: it checks each token it appends."""
        return ()

    def _check_state(self, state: Any, call: AttentionCall) -> None:
        if not isinstance(state, self.state_type):
            raise OptionError(f"state must come from init_state, step or prefill; got {type(state).__name__}")
        held, needed = self._fixed_sizes(state), self._needed_sizes(call)
        if held != needed:
            raise ShapeError(f"state must fit {self.name} and the call, which need the sizes {needed}; got {held}")

    def _needed_sizes(self, call: AttentionCall) -> tuple[object, ...]:
        """Return the sizes of a state for such calls. Those of the last call are kept, as a stream's are all alike."""
        if type(self)._fixed_sizes is Streaming._fixed_sizes:
            return ()
        sizes = replace(StateSizes.of(call), device=torch.device("meta"))
        last: tuple[StateSizes, tuple[object, ...]] | None = self.__dict__.get("_last_sizes")
        if last is None or last[0] != sizes:
            with torch.no_grad():
                last = self.__dict__["_last_sizes"] = sizes, self._fixed_sizes(self._init_state(sizes))
        return last[1]

    def _check_streaming(self) -> None:
        if self.capabilities.streaming is None:
            why = "its output depends on the whole sequence"
            raise UnsupportedPattern(f"{self.name} cannot go one token at a time: {why}")
