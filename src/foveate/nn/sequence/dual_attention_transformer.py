"""Dual attention: heads that read the content of tokens beside heads that read relations between tokens.

Disentangling and Integrating Relational and Sensory Information in Transformer Architectures (2024), arXiv 2405.16727.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.nn.base.layer import Layer, StreamingLayer
from foveate.nn.parts.heads import HeadScheme, HeadState, split
from foveate.nn.parts.positions import Position
from foveate.nn.parts.symbols import RelativeSymbols, SymbolicAttention, Symbols
from foveate.nn.sequence.relational_attention import RelationalAttention
from foveate.ops.base.kv_cached import Cached
from foveate.ops.operator import Operator


@final
class SensoryHeads(HeadScheme):
    """The ordinary attention heads of a layer: `C -> H D`.

    Args:
        dim, heads, kv_heads, head_dim: C, H, Hkv and D.
        bias: True gives all projections biases.
        around: an operator and a position scheme, as for `HeadScheme`.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool = False, **around: Any
    ) -> None:  # fmt: skip
        sizes: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "out_dim": heads * head_dim}
        super().__init__(dim, heads, bias=bias, **sizes, **around)
        self.q = nn.Linear(dim, heads * head_dim, bias)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias)
        self.v = nn.Linear(dim, kv_heads * head_dim, bias)

    def project(self, x: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return split(self.q(x), self.heads), split(self.k(source), self.kv_heads), split(self.v(source), self.kv_heads)


@dataclass(frozen=True)
class DualState:
    """The state of a stream: that of both kinds of heads, and the number of tokens so far."""

    sensory: HeadState | None
    relational: Any
    seen: int


@final
class DualAttention(StreamingLayer):
    """Ordinary heads and relational heads, whose outputs are concatenated.

    Ordinary heads read the content of tokens; relational ones (`RelationalAttention`) compare these tokens with the
    query's token. `Block(DualAttention(...))` is the block of a Dual Attention Transformer. Cost: that of multi-head
    attention, with values of width `D + H D` in relational heads. The wrong choice if only content counts, and not
    whether things are the same, larger or earlier.

    Args:
        dim: C, a multiple of all heads.
        sensory_heads, relational_heads: heads of each kind; one may be 0. Heads are numbered in this order.
        symbols: `SymbolicAttention`, `PositionalSymbols` or `RelativeSymbols`; give the same one to all layers, as the
            paper does. None for `SymbolicAttention(dim, heads=4, n_symbols=64)`.
        relations, symmetric, rel_act: options of the relational heads.
        group: heads of a kind that share keys and values (grouped queries).
        op: an operator or its key, for both kinds.
        position: a position scheme that rotates attention's queries and keys, or None.

    Raises:
        OptionError: an option out of range.

    Symbols come from the layer's input, as in the release's language model, where each layer retrieves its own. In
    cross attention they belong to the source; distances mean nothing there, and `RelativeSymbols` raises.
    """

    def __init__(
        self, dim: int, sensory_heads: int, relational_heads: int, symbols: Symbols | RelativeSymbols | None = None, *,
        relations: int | None = None, symmetric: bool = False, rel_act: str = "identity", group: int = 1,
        op: str | Operator = "softmax", position: Position | None = None,
    ) -> None:  # fmt: skip
        kinds = {"sensory_heads": sensory_heads, "relational_heads": relational_heads}
        validate.count("group", group, 1)
        for name, count in kinds.items():
            validate.count(name, count, 0)
            if count % group:
                raise OptionError(f"group={group} must divide {name}={count}")
        total = sum(kinds.values())
        super().__init__(dim, total)
        if dim % total:
            raise OptionError(f"sensory_heads + relational_heads = {total} must divide dim={dim}")
        around: dict[str, Any] = dict(op=op, position=position)
        self.sensory: SensoryHeads | None = None
        self.relational: RelationalAttention | None = None
        self.symbols: Symbols | RelativeSymbols | None = None
        if sensory_heads:
            self.sensory = SensoryHeads(dim, sensory_heads, sensory_heads // group, dim // total, **around)
        if relational_heads:
            self.relational = RelationalAttention(
                dim,
                relational_heads,
                relations,
                symmetric,
                rel_act,
                total,
                kv_heads=relational_heads // group,
                **around,
            )
            self.symbols = SymbolicAttention(dim) if symbols is None else symbols
        self._declare_operator()

    def _declare_operator(self) -> None:
        """Derive capabilities from those of the operator and from the symbols."""
        op = next(kind.op for kind in (self.sensory, self.relational) if kind is not None)
        can = op.capabilities
        growth, patterns = can.growth, can.patterns & Layer.capabilities.patterns
        streams = can.streaming == "exact" and "causal self" in patterns
        if isinstance(self.symbols, RelativeSymbols):
            patterns = patterns - {"cross"}
        if self.relational is not None and not self.relational.at_once(self.symbols):
            if not isinstance(op, Cached) or type(op).values is not Operator.values:
                raise OptionError(f"op must have weights over keys for these relations; {op.name} has none")
            growth, streams = "N²", streams and "causal cross" in can.patterns
        self._declare(growth=growth, masks=can.masks, patterns=patterns, streaming="exact" if streams else None)

    def _mix(self, x: Tensor, source: Tensor | None, mask: Tensor | None, causal: bool, **inputs: Any) -> Tensor:
        out = []
        if self.sensory is not None:
            mine = _of_heads(mask, slice(None, self.sensory.heads))
            out.append(self.sensory(x, source, mask=mine, causal=causal))
        if self.relational is not None:
            symbols = self._symbols(x if source is None else source, 0)
            mine = _of_heads(mask, slice(-self.relational.heads, None))
            out.append(self.relational(x, symbols, source, mask=mine, causal=causal))
        return torch.cat(out, -1)

    def _symbols(self, source: Tensor, start: int) -> Tensor | RelativeSymbols:
        assert self.symbols is not None  # a layer with relational heads always has symbols
        return self.symbols if isinstance(self.symbols, RelativeSymbols) else self.symbols(source, start)

    def _init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DualState:
        sensory = None if self.sensory is None else self.sensory.init_state(batch, dtype=dtype, device=device)
        relational = None if self.relational is None else self.relational.init_state(self.symbols, batch, dtype, device)
        return DualState(sensory, relational, 0)

    def _step(self, x: Tensor, state: DualState, **inputs: Tensor) -> tuple[Tensor, DualState]:
        out, sensory, relational = [], None, None
        if self.sensory is not None:
            y, sensory = self.sensory.step(x, state.sensory)
            out.append(y)
        if self.relational is not None:
            y, relational = self.relational.step(x, self._symbols(x, state.seen), state.relational, state.seen)
            out.append(y)
        return torch.cat(out, -1), DualState(sensory, relational, state.seen + 1)

    @classmethod
    def example(cls, dim: int, heads: int, length: int) -> Self:
        return cls(dim, heads - heads // 2, heads // 2, SymbolicAttention(dim, 2, 5), relations=1)


def _of_heads(mask: Tensor | None, heads: slice) -> Tensor | None:
    """Return the part of a mask that belongs to some heads."""
    return mask if mask is None or mask.dim() < 3 or mask.shape[-3] == 1 else mask[..., heads, :, :]
