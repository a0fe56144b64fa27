"""A small decoder over tokens: any layers, stacked; it reads in parallel or goes token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import Block, GatedMLP, Layer


class Decoder(nn.Module):
    """Embedding, blocks of mixer and MLP behind RMSNorms, and a head: tokens `(B, N)` to logits `(B, N, vocabulary)`.

    Args:
        vocabulary: how many tokens there are.
        mixers: the layers, first to last, all of one width and causal.
        places: learned embeddings of so many positions, added to the tokens'; 0 for none (recurrent layers, rotary).
        mlp: whether blocks have a gated MLP; without it a block is its mixer alone, as in Zoology's figures.
        tied: whether the head is the embedding again.
        hidden: width inside the MLPs; their own choice where None.

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
            if "causal self" not in mixer.patterns:
                raise UnsupportedPattern(f"a decoder's layers are causal; {mixer.name} defines no causal attention")
        dim = mixers[0].dim
        self.embed = nn.Embedding(vocabulary, dim)
        if tied:  # else logits would begin as large as the width
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
        """Each layer's state before the first token; layers that cannot stream say so."""
        like = self.embed.weight
        return [block.init_state(batch, dtype=like.dtype, device=like.device) for block in self.blocks]

    def step(
        self, token: Int[Tensor, "b 1"], state: list[Any], at: int = 0
    ) -> tuple[Float[Tensor, "b 1 v"], list[Any]]:
        """Logits after one more token, the `at`-th, and the next state."""
        x, after = self.embedded(token, at), []
        for block, before in zip(self.blocks, state, strict=True):
            x, now = block.step(x, before)
            after.append(now)
        return self.head(self.norm(x)), after

    def embedded(self, tokens: Tensor, first: int = 0) -> Tensor:
        """What the first block reads; `first` is the place of the first of these tokens."""
        x = self.embed(tokens)
        if self.places is None:
            return x
        last = first + tokens.shape[1]
        if last > self.places.num_embeddings:
            raise ShapeError(f"the decoder knows places={self.places.num_embeddings} positions; got N={last}")
        return x + self.places(torch.arange(first, last, device=tokens.device))
