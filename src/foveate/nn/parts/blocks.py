"""Blocks to stack: a token mixer and a channel mixer, each with a norm before it and a residual around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.nn.base.layer import Layer, streaming
from foveate.nn.parts.grid import Size
from foveate.nn.parts.linear_maps import Linear


class GatedMLP(nn.Module):
    """`(silu(x W_1) * x W_2) W_3`, token by token, without biases (SwiGLU).

    Args:
        dim: C.
        hidden: hidden width; None for `8 C / 3`, which costs as much as a plain MLP of `4 C`.
        act: the gate's activation; `lambda x: x` gives TransNormer's SGLU.
    """

    def __init__(self, dim: int, hidden: int | None = None, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        hidden = max(1, 8 * dim // 3) if hidden is None else hidden
        validate.count("dim", dim, 1)
        validate.count("hidden", hidden, 1)
        self.act = act
        self.gate, self.up = Linear(dim, hidden, bias=False), Linear(dim, hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def gelu_mlp(dim: int, ratio: float = 4.0, *, bias: bool = True) -> nn.Sequential:
    """Make the plain MLP of transformers: linear, GELU, linear, with a hidden width of `ratio` times C."""
    validate.count("dim", dim, 1)
    validate.at_least("mlp_ratio", ratio, 1 / dim)
    hidden = int(ratio * dim)
    return nn.Sequential(nn.Linear(dim, hidden, bias), nn.GELU(), nn.Linear(hidden, dim, bias))


def stacked(blocks: nn.ModuleList) -> list[Block]:
    """Return the blocks of a list with their type, which `nn.ModuleList` loses."""
    return [cast(Block, block) for block in blocks]


class GridStage(nn.ModuleList):
    """A stage of a network: blocks on one grid, applied in order."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        for block in self:
            x = block(x, size=size)
        return x


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`; the mixer is any `Layer`.

    Args:
        mixer: the layer; its `dim` is the block's.
        mlp: the channel mixer; "gated" for a `GatedMLP`, None for none.
        norm: a function from a width to a norm.
    """

    def __init__(
        self, mixer: Layer, mlp: nn.Module | str | None = "gated", norm: Callable[[int], nn.Module] = nn.RMSNorm
    ) -> None:
        super().__init__()
        if isinstance(mlp, str):
            validate.one_of("mlp", mlp, ("gated",))
            mlp = GatedMLP(mixer.dim)
        self.mixer, self.mlp = mixer, mlp
        self.norm = norm(mixer.dim)
        self.mlp_norm = None if mlp is None else norm(mixer.dim)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        """Apply the block; `call` holds the mixer's further arguments (mask, causal, size, inputs)."""
        x = x + self.mixer(self.norm(x), **call)
        return self.channels(x)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        return streaming(self.mixer).init_state(batch, dtype=dtype, device=device)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = streaming(self.mixer).step(self.norm(x), state)
        return self.channels(x + mixed), state

    def channels(self, x: Tensor) -> Tensor:
        """Apply the second half of the block."""
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))
