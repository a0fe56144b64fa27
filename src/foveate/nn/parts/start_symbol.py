"""The embedding of tokens among which -1 is the start symbol of a decoder."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def embedded(
    embed: nn.Embedding, token: Int[Tensor, "..."], start: Float[Tensor, " e"] | float
) -> Float[Tensor, "... e"]:
    """Return the embedding of each token, and `start` for a token of -1."""
    known = embed(token.clamp(min=0))
    return torch.where((token < 0)[..., None], start, known)
