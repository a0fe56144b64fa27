"""Prompts of two coloured shapes, a small text encoder that mixes their colours, and a painter that reads it.

Encoder and painter are trained together on a few pairs of colours, and in some prompts the word of a colour is hidden,
so that the other colour tells it. An encoder that has learnt to fill in words puts the other adjective where it does
not belong, once the pair of colours is a new one. In prompts of one object nothing can leak.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

attention = pytest.importorskip("diffusers.models.attention_processor", reason="pip install foveate[diffusion]")

COLOURS, SHAPES, LENGTH, WIDTH = 8, 6, 9, 32
PAD, BEGIN, END, A, AND, FIRST = range(6)

#: Pairs of colours that training shows, and those that it holds out; in all of them the colours differ.
SHOWN = torch.tensor([(c, (c + 1) % COLOURS) for c in range(COLOURS)])
HELD_OUT = torch.tensor([(c, (c + by) % COLOURS) for c in range(COLOURS) for by in (2, 3, 4, 5, 6, 7)])


class Objects(NamedTuple):
    """The two objects of each prompt: colours `(B, 2)` and shapes `(B, 2)`."""

    colours: Tensor
    shapes: Tensor

    def prompts(self) -> Tensor:
        """Return "<begin> a C S and a C S <end>" as ids `(B, 9)`."""
        colour, shape = self._words()
        words = [BEGIN, A, colour[:, 0], shape[:, 0], AND, A, colour[:, 1], shape[:, 1], END]
        return self._row(words)

    def phrases(self, which: int) -> Tensor:
        """Return "<begin> a C S <end>" of one object as ids `(B, 9)`, padded."""
        colour, shape = self._words()
        return self._row([BEGIN, A, colour[:, which], shape[:, which], END, PAD, PAD, PAD, PAD])

    def _words(self) -> tuple[Tensor, Tensor]:
        return self.colours + FIRST, self.shapes + FIRST + COLOURS

    def _row(self, words: list[int | Tensor]) -> Tensor:
        return torch.stack([torch.as_tensor(word).expand(len(self.colours)) for word in words], 1)


def draw(count: int, pairs: Tensor, generator: torch.Generator) -> Objects:
    """Draw objects of two shapes, with the colours of some pair."""
    colours = pairs[torch.randint(len(pairs), (count,), generator=generator)]
    return Objects(colours, torch.rand(count, SHAPES, generator=generator).argsort(1)[:, :2])


class Encoder(nn.Module):
    """A transformer of two layers over words and places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(FIRST + COLOURS + SHAPES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers, self.norm = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layers(self.words(ids) + self.places.weight, src_key_padding_mask=ids == PAD))


class Painter(nn.Module):
    """Cross-attention that says which colour each place of a picture gets, `(B, N, COLOURS)`, by the shape there."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = nn.Embedding(SHAPES, WIDTH)
        self.attn2 = attention.Attention(WIDTH, WIDTH, heads=4, dim_head=WIDTH // 4)
        self.colour = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, COLOURS))

    def forward(self, shapes: Tensor, text: Tensor) -> Tensor:
        return self.colour(self.attn2(self.shapes(shapes), encoder_hidden_states=text))


@torch.enable_grad()
def trained(seed: int, steps: int = 150, batch: int = 64, hidden: float = 0.3) -> tuple[Encoder, Painter]:
    """Train both on pairs that are `SHOWN`.

    A quarter of the prompts name one object. A second loss asks for the colour that each shape's word goes with, which
    gives the encoder its grammar at once.

    Args:
        seed: of weights and data.
        steps, batch: of training.
        hidden: the share of prompts of two objects in which one of the colours is hidden.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, painter, grammar = Encoder(), Painter(), nn.Linear(WIDTH, COLOURS)
    generator, alone = torch.Generator().manual_seed(seed), batch // 4
    weights = [*encoder.parameters(), *painter.parameters(), *grammar.parameters()]
    optimizer = torch.optim.AdamW(weights, 3e-3)
    for _ in range(steps):
        objects = draw(batch, SHOWN, generator)
        ids = torch.cat([objects.phrases(0)[:alone], objects.prompts()[alone:]])
        hides, second = (torch.rand(2, batch, generator=generator) < torch.tensor([[hidden], [0.5]])).unbind()
        hides[:alone] = False
        ids[hides, torch.where(second, 6, 2)[hides]] = A
        text = encoder(ids)
        said, colours = painter(objects.shapes, text), objects.colours
        pictures = torch.cat([said[:alone, 0], said[alone:].flatten(0, 1)])
        loss = F.cross_entropy(pictures, torch.cat([colours[:alone, 0], colours[alone:].flatten()]))
        loss = loss + F.cross_entropy(grammar(text[:, 3]), colours[:, 0]) / 2
        loss = loss + F.cross_entropy(grammar(text[alone:, 7]), colours[alone:, 1]) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval(), painter.eval()
