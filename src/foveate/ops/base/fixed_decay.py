"""Linear attention with a fixed decay per head: the decays and the tiled scan that the two Lightning papers share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.readable import is_clean
from foveate.ops.base.linear import Linear
from foveate.ops.functional import alibi
from foveate.ops.functional.causal import causal_product
from foveate.ops.operator import CAUSAL_PATTERNS

Variant = Literal["paper", "release"]


class FixedDecay(Linear, ABC):
    """`out_i = sum_{j <= i} decay^(i - j) (q_i . k_j) v_j`: no softmax, no feature map, no normalizer. Causal only.

    Args:
        decay: the factor per step of each head, `(H,)` in (0, 1], or "transnormer" for `transnormer_decay`.
        layer, depth: the layer's number and the number of layers, for "transnormer": later layers look further back.
        variant: the slopes of "transnormer"; see `transnormer_decay`.
        block: tokens in a block. It changes the speed, not the result.

    The decay is a constant: it gets no gradient. `scale` is 1 unless a call gives another.
    """

    capabilities = replace(Linear.capabilities, patterns=CAUSAL_PATTERNS, default_scale=1.0)
    normalized: ClassVar[bool] = False

    def __init__(
        self, decay: Tensor | Sequence[float] | Literal["transnormer"] = "transnormer", *, layer: int = 0,
        depth: int = 1, variant: Variant = "paper", block: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        transnormer_decay(1, layer, depth, variant)  # raises on invalid options
        validate.count("block", block, 1)
        self.layer, self.depth, self.variant, self.block = layer, depth, variant, block
        self.decay = None if isinstance(decay, str) and decay == "transnormer" else _checked(decay)

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return q if scale == 1.0 else q * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return k

    def log_decay(self, k: Tensor, **inputs: Tensor) -> Tensor:
        heads = k.shape[1]
        if self.decay is None:
            decay = transnormer_decay(heads, self.layer, self.depth, self.variant)
        elif len(self.decay) == heads:
            decay = torch.tensor(self.decay, dtype=torch.float64)
        else:
            raise ShapeError(f"decay has {len(self.decay)} heads; q has Hq={heads}")
        return torch.log(decay).to(k.device, k.dtype)


def transnormer_decay(heads: int, layer: int = 0, depth: int = 1, variant: Variant = "paper") -> Tensor:
    """Return the decays `(heads,)`, in float64, that TransNormerLLM gives to layer `layer` of `depth`.

    "paper": `exp(-(8 h / H)(1 - l / L))`; head 0 never forgets. "release": `exp(-s_h (1 - l / (L - 1) + 1e-5))` with
    ALiBi's slopes `s_h = 2^(-8 (h + 1) / H)`. If the number of heads is no power of two, these are the slopes of the
    next smaller power, filled up with every other slope of the next larger one.
    """
    validate.count("heads", heads, 1)
    validate.count("depth", depth, 1)
    validate.between("layer", layer, 0, depth - 1)
    validate.one_of("variant", variant, ("paper", "release"))
    if variant == "paper":
        slopes = torch.arange(heads, dtype=torch.float64) * (8 / heads) * (1 - layer / depth)
    else:
        slopes = alibi.alibi_slopes(heads) * (1 - layer / max(depth - 1, 1) + 1e-5)
    return torch.exp(-slopes)


def _checked(decay: Any) -> tuple[float, ...]:
    """Return the decays as plain numbers, since a module's `.half()` would round 0.999 to 1."""
    try:
        given = torch.as_tensor(decay, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f'decay={shown(decay)} must be "transnormer" or one number in (0, 1] per head') from None
    if given.dim() != 1 or given.numel() == 0 or not bool(((given > 0) & (given <= 1)).all()):
        raise OptionError(f"decay must be (H,) numbers in (0, 1]; got {shown(decay)}")
    return tuple(given.tolist())


def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, block: int) -> Tensor:
    """Return the causal output from `state` on, for one decay for all tokens: `log_decay (1, H, N)`.

    It keeps only its inputs for the backward pass. It cannot be differentiated twice.
    """
    assert log_decay is not None
    return _Tiled.apply(q, k, v, state, log_decay[0, :, 0], block)


class _Tiled(torch.autograd.Function):
    """One forward sweep; the backward pass sweeps forward for queries and in reverse for keys and values."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.block = inputs[5]

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, state: Tensor, rate: Tensor, block: int) -> Tensor:
        out, clean = torch.empty_like(v[:, :, : q.shape[2]]), is_clean(v)
        for at, tile in _tiles(q.shape[2], block, rate):
            inside = tile.weigh(q[:, :, at] @ k[:, :, at].mT)
            own = inside @ v[:, :, at] if clean else causal_product(inside, v[:, :, at])
            out[:, :, at] = own + tile.since * (q[:, :, at] @ state)
            state = tile.whole * state + (tile.until * k[:, :, at]).mT @ v[:, :, at]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, state, rate = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tiles = list(_tiles(q.shape[2], ctx.block, rate))
        for at, tile in tiles:
            inside = tile.weigh(grad[:, :, at] @ v[:, :, at].mT)
            dq[:, :, at] = inside @ k[:, :, at] + tile.since * (grad[:, :, at] @ state.mT)
            state = tile.whole * state + (tile.until * k[:, :, at]).mT @ v[:, :, at]
        d_state = torch.zeros_like(state)
        for at, tile in reversed(tiles):
            inside = tile.weigh(grad[:, :, at] @ v[:, :, at].mT)
            weights = tile.weigh(q[:, :, at] @ k[:, :, at].mT)
            dk[:, :, at] = inside.mT @ q[:, :, at] + tile.until * (v[:, :, at] @ d_state.mT)
            dv[:, :, at] = weights.mT @ grad[:, :, at] + tile.until * (k[:, :, at] @ d_state)
            d_state = tile.whole * d_state + (tile.since * q[:, :, at]).mT @ grad[:, :, at]
        return dq, dk, dv, d_state, None, None


class _Tile:
    """The powers of the decay that a block of `n` tokens needs, each from its exponent: `(H, ., .)`."""

    def __init__(self, n: int, rate: Tensor) -> None:
        place = torch.arange(n, device=rate.device, dtype=rate.dtype)
        rate = rate[:, None, None]
        gap = place[:, None] - place
        self.inside = torch.exp((rate * gap).masked_fill(gap < 0, float("-inf")))  # from a key to a later query
        self.since = torch.exp(rate * (place[:, None] + 1))  # from the state before the block to a query
        self.until = torch.exp(rate * (n - 1 - place[:, None]))  # from a key to the end of the block
        self.whole = torch.exp(rate * n)

    def weigh(self, products: Tensor) -> Tensor:
        """Turn products of queries and keys into weights, in place; later keys have weight 0, even if they hold NaN."""
        return products.mul_(self.inside).tril_()


def _tiles(n: int, block: int, rate: Tensor) -> list[tuple[slice, _Tile]]:
    """Yield the blocks of `n` tokens; all but a ragged last one share their powers."""
    whole, rest = divmod(n, block)
    tile = _Tile(block, rate) if whole else None
    tiles = [(slice(index * block, (index + 1) * block), tile) for index in range(whole)]
    return tiles + ([(slice(n - rest, n), _Tile(rest, rate))] if rest else [])
