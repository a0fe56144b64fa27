"""A small decoder over tokens, built from any causal layers. It runs in parallel or token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import Block, GatedMLP, Layer
from foveate.nn.parts.blocks import stacked


class Decoder(nn.Module):
    """A decoder from tokens `(B, N)` to logits `(B, N, vocabulary)`: embedding, pre-norm blocks with RMSNorm, and head.

    Args:
        vocabulary: number of tokens.
        mixers: the layers, first to last, all of one width and causal.
        places: number of learned position embeddings, which are added to the tokens'; 0 for none, as with recurrent
            layers or rotary positions.
        mlp: whether blocks have a gated MLP; without it a block is its mixer alone, as in Zoology's figures.
        tied: whether the head uses the embedding's weights.
        hidden: width inside the MLPs; None is their default.

    Raises:
        OptionError: no layers, or layers of different widths.
        UnsupportedPattern: a layer that is not causal.
        ShapeError: more tokens than `places`.
    """

    def __init__(
        self,
        vocabulary: int,
        mixers: Sequence[Layer],
        *,
        places: int = 0,
        mlp: bool = True,
        tied: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        validate.count("vocabulary", vocabulary, 1)
        validate.count("places", places, 0)
        if not mixers or len({mixer.dim for mixer in mixers}) > 1:
            raise OptionError(f"mixers must be layers of one width; got widths {[mixer.dim for mixer in mixers]}")
        for mixer in mixers:
            if "causal self" not in mixer.capabilities.patterns:
                raise UnsupportedPattern(f"a decoder's layers are causal; {mixer.name} defines no causal attention")
        dim = mixers[0].dim
        self.embed = nn.Embedding(vocabulary, dim)
        if tied:  # larger weights would make the first logits as large as the width
            nn.init.normal_(self.embed.weight, std=0.02)
        self.places = nn.Embedding(places, dim) if places else None
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(mixer, GatedMLP(dim, hidden) if mlp else None) for mixer in mixers])
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @property
    def dim(self) -> int:
        return self.embed.embedding_dim

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        x = self.embedded(tokens, 0)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.head(self.norm(x))

    def init_state(self, batch: int) -> list[Any]:
        """Return each layer's state before the first token; a layer that cannot stream raises an error."""
        like = self.embed.weight
        return [block.init_state(batch, dtype=like.dtype, device=like.device) for block in stacked(self.blocks)]

    def step(
        self, token: Int[Tensor, "b 1"], state: list[Any], at: int = 0
    ) -> tuple[Float[Tensor, "b 1 v"], list[Any]]:
        """Return the logits after one more token, at position `at`, and the next state."""
        x, after = self.embedded(token, at), []
        for block, before in zip(stacked(self.blocks), state, strict=True):
            x, now = block.step(x, before)
            after.append(now)
        return self.head(self.norm(x)), after

    def embedded(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Return the input of the first block; `first` is the position of the first of these tokens."""
        return embedded(self.embed, self.places, tokens, first)


def embedded(
    embed: nn.Embedding, places: nn.Embedding | None, tokens: Int[Tensor, "b n"], first: int
) -> Float[Tensor, "b n c"]:
    """Return tokens' embeddings, with those of their positions from `first` on added, if there are `places`."""
    x = embed(tokens)
    if places is None:
        return x
    last = first + tokens.shape[1]
    if last > places.num_embeddings:
        raise ShapeError(f"the decoder has places={places.num_embeddings} positions; got N={last}")
    return x + places(torch.arange(first, last, device=tokens.device))
