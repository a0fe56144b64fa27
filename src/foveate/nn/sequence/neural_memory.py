"""Titans' long-term memory as a layer, and the base class of its combinations with attention.

Titans: Learning to Memorize at Test Time (2025), arXiv 2501.00663.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.nn.parts.heads import Rates, merge, split, width
from foveate.nn.parts.linear_maps import Linear
from foveate.nn.parts.multi_head import MultiHeadAttention
from foveate.nn.parts.positions import Position
from foveate.nn.parts.short_conv import ShortConv
from foveate.ops.base.test_time import MemoryState, Reads
from foveate.ops.memory.titans import Titans
from foveate.ops.operator import Operator


@dataclass(frozen=True)
class NeuralMemoryState:
    """The learner's state, and the last tokens of the convolutions of queries, keys and values (None without them)."""

    learner: MemoryState
    seen: tuple[Tensor | None, ...]


@final
class NeuralMemory(StreamingLayer):
    """An MLP that learns token by token to answer keys with values: Titans (LMM), the memory without attention.

    Queries, keys and values are projected, convolved over a few tokens and passed through SiLU; queries and keys are
    scaled to length 1. Forgetting, momentum and step come from the token, one number per head. Answers are normalized
    per head, gated by the token and projected. Cost O(N); a stream has a state of constant size. Alone it is the wrong
    choice for exact recall of a few tokens out of very many: see `foveate.nn.sequence.titans`.

    Args:
        dim: C. heads: H, memories side by side, each of width `C / H`.
        depth, expansion, chunk, reads, activation, max_grad_norm: options of the memory; see `foveate.ops.Titans`.
            Tokens that are not normalized before the layer need a `max_grad_norm`, such as 1.
        conv: taps of each convolution; 0 for none.

    Raises:
        OptionError: an option out of range.
        DivergedError: the memory's weights have grown until an answer is NaN or inf.
    """

    capabilities = replace(
        Layer.capabilities,
        patterns=frozenset({"causal self"}),
        masks=frozenset({"keys"}),
        streaming="exact",
        growth="N",
    )

    def __init__(
        self, dim: int, heads: int = 1, *, depth: int = 2, expansion: int = 2, chunk: int = 16, reads: Reads = "token",
        activation: Literal["silu", "gelu"] = "silu", max_grad_norm: float | None = None, conv: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("conv", conv, 0)
        self.head_dim = width(dim, heads, None)
        self.op = Titans(
            heads, self.head_dim, depth=depth, expansion=expansion, chunk=chunk, reads=reads, activation=activation,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
        self.q = Linear(dim, dim, bias=False)
        self.k = Linear(dim, dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.convs: Any = nn.ModuleList([ShortConv(dim, conv) for _ in range(3)] if conv else [])
        self.rates = Rates(dim, heads, self.op)
        self.norm, self.gate = nn.RMSNorm(self.head_dim), Linear(dim, dim)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        seen = None if mask is None else masks.keys_of(mask, x.shape[0], x.shape[1])
        return self.go_on(x, self._init_state(x.shape[0], x.dtype, x.device), seen)[0]

    def go_on(
        self, x: Tensor, state: NeuralMemoryState, seen: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Process further tokens `(B, N, C)`; those with False in `seen (B, N)` are neither read nor written."""
        if seen is not None:
            validate.bool_mask("seen", seen, "B, N", tuple(x.shape[:2]), x.device)
            x = x.masked_fill(~seen[..., None], 0.0)
        made = [self._convolved(part, x, state.seen[part]) for part in range(3)]
        q, k, v = (part for part, _ in made)
        mask = None if seen is None else seen.expand(x.shape[:2])[:, None, None]
        out, learner = self.op.go_on(q, k, v, state.learner, mask=mask, **self.rates(x))
        return self.merged(out, x), NeuralMemoryState(learner, tuple(past for _, past in made))

    def recall(self, x: Tensor, state: NeuralMemoryState, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Answer tokens from the memory without writing; return the answers and the convolution's last tokens.

        Args:
            x: tokens `(B, N, C)`. past: the last tokens of the queries' convolution; `no_past` at the start.
        """
        q, past = self._convolved(0, x, past)
        return self.merged(self.op.recall(q, state.learner), x), past

    def merged(self, out: Tensor, x: Tensor) -> Tensor:
        """Merge answers `(B, H, N, D)` to tokens."""
        return self.out(merge(self.norm(out)) * torch.sigmoid(self.gate(x)))

    def no_past(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the input of a convolution before the first token."""
        return self.convs[0].init_state(batch, dtype, device) if self.convs else None

    def _convolved(self, part: int, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys or values `(B, H, N, D)`: part 0, 1 or 2."""
        y = (self.q, self.k, self.v)[part](x)
        if past is not None and x.shape[1]:
            y = torch.cat([past, y], 1)
            y, past = self.convs[part].conv(y.mT).mT, y[:, x.shape[1] :]
        return split(F.silu(y), self.heads), past

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> NeuralMemoryState:
        sizes = batch, self.heads, self.heads, self.head_dim, self.head_dim
        learner = self.op.init_state(*sizes, dtype=dtype, device=device)
        return NeuralMemoryState(learner, (self.no_past(batch, dtype, device),) * 3)

    def _step(self, x: Tensor, state: NeuralMemoryState, **inputs: Tensor) -> tuple[Tensor, NeuralMemoryState]:
        return self.go_on(x, state)

    def _prefill(self, x: Tensor, **inputs: Tensor) -> tuple[Tensor, NeuralMemoryState]:
        return self.go_on(x, self._init_state(x.shape[0], x.dtype, x.device))

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads, chunk=max(1, length // 4), conv=3).with_longer_steps()

    def with_longer_steps(self) -> Self:
        """Set long steps, half of the longest: training starts with short ones, whose writes have little effect."""
        theta: Any = self.rates["theta"]
        nn.init.zeros_(theta.bias)
        return self


class TitansLayer(StreamingLayer):
    """The base of the layers of `foveate.nn.sequence.titans`: attention, a memory, persistent tokens.

    Causal only. Cost O(N), and a stream has a state of constant size.

    Args:
        dim: C. heads: H, for attention and for the memory.
        persistent: number of persistent tokens.
        position: a position scheme of attention without a bias, such as `Rotary()`, or None.
        memory: options of `NeuralMemory`: depth, expansion, chunk, reads, activation, max_grad_norm, conv.

    Raises:
        OptionError: an option out of range.
        DivergedError: the memory's weights have grown until an answer is NaN or inf.
    """

    capabilities = replace(
        Layer.capabilities,
        patterns=frozenset({"causal self"}),
        masks=frozenset({"keys"}),
        streaming="exact",
        growth="N",
    )

    def __init__(
        self, dim: int, heads: int, op: str | Operator, persistent: int, position: Position | None,
        memory: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(dim, heads)
        validate.count("persistent", persistent, 0)
        if position is not None and position.biased:
            raise OptionError(
                f"position={type(position).__name__} adds a bias; use Rotary(), so that the layer streams"
            )
        self.persistent = nn.Parameter(torch.randn(persistent, dim) * 0.02)
        self.attention = MultiHeadAttention(dim, heads, op=op, position=position)
        self.memory = NeuralMemory(dim, heads, **memory)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        options: Any = {"persistent": 2, "chunk": 2, "conv": 2, **cls._reach(max(2, length // 3))}
        layer = cls(dim, heads, **options)
        layer.memory.with_longer_steps()
        nn.init.normal_(layer.persistent)
        return layer

    @classmethod
    def _reach(cls, tokens: int) -> dict[str, int]:
        """Return the option that sets the reach of attention."""
        return {"window": tokens}


class MemoryGate(nn.Module):
    """The gate `norm(y) sigmoid(norm(m))`, with a learned gain in each norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.memory_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, y: Tensor, memory: Tensor) -> Tensor:
        return self.norm(y) * torch.sigmoid(self.memory_norm(memory))
