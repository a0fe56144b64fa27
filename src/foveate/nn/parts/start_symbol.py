"""Tokens among which -1 is the start symbol of a decoder: checks, and their embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.errors import ShapeError, shown


def embedded(
    embed: nn.Embedding, token: Int[Tensor, "..."], start: Float[Tensor, " e"] | float
) -> Float[Tensor, "... e"]:
    """Return the embedding of each token, and `start` for a token of -1."""
    known = embed(token.clamp(min=0))
    return torch.where((token < 0)[..., None], start, known)


def checked_tokens(name: str, tokens: Tensor | None, shape: tuple[int | None, ...], low: int, high: int) -> Tensor:
    """Return tokens of this shape, `(B,)` or `(B, None)` for any length; refuse others, and tokens out of range."""
    axes = f"(B={shape[0]}, T) with T > 0" if len(shape) == 2 else f"(B={shape[0]},)"
    whole = isinstance(tokens, Tensor) and tokens.dtype in (torch.long, torch.int)
    if tokens is None or not whole or tokens.dim() != len(shape) or len(tokens) != shape[0] or not tokens.shape[-1]:
        raise ShapeError(f"{name} must be whole numbers {axes}; got {shown(tokens)}")
    if bool(((tokens < low) | (tokens > high)).any()):
        raise ShapeError(f"{name} must be in {low}..{high}; got {int(tokens.min())}..{int(tokens.max())}")
    return tokens
