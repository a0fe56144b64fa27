"""Titans: attention as the short-term memory and a learner as the long-term one, combined in three ways.

Titans: Learning to Memorize at Test Time (2025), arXiv 2501.00663.

All three have persistent memory: learned tokens `p` in front of the sequence, the same for every input. The paper's
equations do not specify the following, which is reconstructed here: a gate is `norm(y) sigmoid(norm(m))` with learned
gains; SiLU, convolutions and unit lengths of section 4.4 belong to the memory, and attention has none of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.nn.parts.heads import HeadState
from foveate.nn.parts.positions import Position
from foveate.nn.sequence.neural_memory import MemoryGate, NeuralMemoryState, TitansLayer
from foveate.ops.base.kv_state import KVState
from foveate.ops.sparse.sliding_window import SlidingWindow

#: A function from tokens to tokens and the state after them.
Path = Callable[[Tensor], tuple[Tensor, Any]]


@dataclass(frozen=True)
class WindowState:
    """The memory's state, and a cache of the persistent tokens and those of the window."""

    memory: NeuralMemoryState
    attention: HeadState | None  # None after a call that keeps no state


class Windowed(TitansLayer):
    """The base of layers whose attention is a sliding window over `[p | x]`, in which `p` stays visible."""

    def __init__(
        self, dim: int, heads: int, *, window: int = 128, persistent: int = 16, position: Position | None = None,
        **memory: Any,
    ) -> None:  # fmt: skip
        validate.count("persistent", persistent, 0)
        super().__init__(dim, heads, SlidingWindow(window, persistent), persistent, position, memory)

    @abstractmethod
    def _combined(self, x: Tensor, attend: Path, remember: Path) -> tuple[Tensor, WindowState]:
        """Combine the two paths; each maps tokens to tokens and its state."""

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        first = len(self.persistent)
        seen = None if mask is None else F.pad(masks.keys_of(mask, x.shape[0], x.shape[1]), (first, 0), value=True)

        def attend(t: Tensor) -> tuple[Tensor, None]:
            return self.attention(t, mask=None if seen is None else seen[:, None, None], causal=True), None

        return self._combined(self._with_prefix(x), attend, self._remember(x, seen))[0][:, first:]

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, WindowState]:
        out, state = self._combined(self._with_prefix(x), self.attention.prefill, self._remember(x, None))
        return out[:, len(self.persistent) :], state

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> WindowState:
        return self._prefill(torch.zeros(batch, 0, self.dim, dtype=dtype, device=device))[1]

    def _step(self, x: Tensor, state: WindowState, **inputs: Tensor) -> tuple[Tensor, WindowState]:
        return self._combined(
            x, lambda t: self.attention.step(t, state.attention), lambda t: self.memory.go_on(t, state.memory)
        )

    def _with_prefix(self, x: Tensor) -> Tensor:
        return torch.cat([self.persistent.expand(x.shape[0], -1, -1), x], 1)

    def _remember(self, x: Tensor, seen: Tensor | None) -> Path:
        state = self.memory.init_state(x.shape[0], dtype=x.dtype, device=x.device)
        return lambda t: self.memory.go_on(t, state, seen)


@final
class MemoryAsGate(Windowed):
    """Titans (MAG): a sliding window and a long-term memory in parallel; the memory gates the window.

    `norm(attention([p | x])) sigmoid(norm(memory([p | x])))`. The memory of far tokens can scale the window's output,
    channel by channel, but add nothing to it; the wrong choice for recall of far tokens, unless layers follow.

    Args:
        window: tokens that attention sees, the query's own included.
        dim, heads, persistent, position, memory: see `TitansLayer`.
    """

    def __init__(self, dim: int, heads: int = 1, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.gate = MemoryGate(dim)

    def _combined(self, x: Tensor, attend: Path, remember: Path) -> tuple[Tensor, WindowState]:
        (y, attention), (recalled, memory) = attend(x), remember(x)
        return self.gate(y, recalled), WindowState(memory, attention)


@final
class MemoryAsLayer(Windowed):
    """Titans (MAL): a sliding window over the outputs of a long-term memory.

    `attention(norm(z))` with `z = [p | x] + memory([p | x])`. It is the simplest and, in the paper, the weakest of the
    three: attention sees the past only through the memory. The residual inside is the one that the paper has "in all
    blocks"; `residual=False` gives the equation without it.

    Args:
        residual: True adds tokens to the memory's outputs.
        window: tokens that attention sees, the query's own included.
        dim, heads, persistent, position, memory: see `TitansLayer`.
    """

    def __init__(self, dim: int, heads: int = 1, *, residual: bool = True, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.residual, self.norm = residual, nn.RMSNorm(dim)

    def _combined(self, x: Tensor, attend: Path, remember: Path) -> tuple[Tensor, WindowState]:
        recalled, memory = remember(x)
        y, attention = attend(self.norm(x + recalled if self.residual else recalled))
        return y, WindowState(memory, attention)


@dataclass(frozen=True)
class ContextState:
    """The state inside a segment.

    Args:
        old: the memory before the segment, which the context recalls from. new: the memory now.
        past: the last tokens of the convolution of the queries to the old memory.
        kv: keys and values of the persistent tokens, and of the segment so far: recalled answers, and tokens.
        place: tokens of the segment so far.
    """

    old: NeuralMemoryState
    new: NeuralMemoryState
    past: Tensor | None
    kv: KVState
    place: int


@final
class MemoryAsContext(TitansLayer):
    """Titans (MAC): attention over `[p | the memory's answers | the segment]`, segment by segment.

    Each token queries the memory before the segment, and the answers join the context beside the tokens. The memory
    learns attention's outputs y of the segment, and gates them: `norm(y) sigmoid(norm(memory(y)))`. In the paper it is
    the best of the three on long inputs, at twice the context; segments run one after the other.

    Departures, without which a token would see later ones of its segment: answers to later tokens stay hidden from it,
    and its gate reads the memory after this token, not after the segment (with `reads="chunk"`, before this token's
    chunk). A memory's `chunk` that divides `segment` is fast; others go token by token.

    Args:
        segment: tokens of a segment.
        dim, heads, persistent, position, memory: see `TitansLayer`.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, segment: int = 64, persistent: int = 16, position: Position | None = None,
        **memory: Any,
    ) -> None:  # fmt: skip
        validate.count("segment", segment, 1)
        super().__init__(dim, heads, "softmax", persistent, position, memory)
        self.segment, self.gate = segment, MemoryGate(dim)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        if mask is None:
            return self._walk(x, None)[0]
        seen = masks.keys_of(mask, x.shape[0], x.shape[1])
        return self._walk(x.masked_fill(~seen[..., None], 0.0), seen)[0]

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, ContextState]:
        return self._walk(x, None)

    def _walk(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, ContextState]:
        state, out = self._init_state(x.shape[0], x.dtype, x.device), [x[:, :0]]
        for start in range(0, x.shape[1], self.segment):
            part = slice(start, start + self.segment)
            y, state = self._go_on(x[:, part], state, None if seen is None else seen[:, part])
            out.append(y)
        return torch.cat(out, 1), state

    def _step(self, x: Tensor, state: ContextState, **inputs: Tensor) -> tuple[Tensor, ContextState]:
        return self._go_on(x, state, None)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> ContextState:
        memory = self.memory.init_state(batch, dtype=dtype, device=device)
        return ContextState(memory, memory, self.memory.no_past(batch, dtype, device), self._prefix(batch), 0)

    def _prefix(self, batch: int) -> KVState:
        at = torch.arange(len(self.persistent), device=self.persistent.device)
        _, k, v = self.attention.projected(self.persistent.expand(batch, -1, -1), at)
        return KVState(k, v)

    def _go_on(self, x: Tensor, state: ContextState, seen: Tensor | None) -> tuple[Tensor, ContextState]:
        """Process further tokens of one segment."""
        if state.place == self.segment:
            state = replace(state, old=state.new, kv=self._prefix(x.shape[0]), place=0)
        n, before = x.shape[1], state.kv.k.shape[2]
        recalled, past = self.memory.recall(x, state.old, state.past)
        at = len(self.persistent) + state.place + torch.arange(n, device=x.device)
        _, *answers = self.attention.projected(recalled, at)
        q, *own = self.attention.projected(x, at + self.segment)
        kv = state.kv.append(*answers).append(*own)
        visible = masks.causal(n, n, device=x.device)
        if seen is not None:
            visible = visible & seen[:, None, None]
        visible = F.pad(torch.cat([visible, visible], -1), (before, 0), value=True)
        y = self.attention.merged(self.attention.op(q, kv.k, kv.v, mask=visible), x)
        learned, new = self.memory.go_on(y, state.new, seen)
        return self.gate(y, learned), ContextState(state.old, new, past, kv, state.place + n)

    @classmethod
    def _reach(cls, tokens: int) -> dict[str, int]:
        return {"segment": tokens}
