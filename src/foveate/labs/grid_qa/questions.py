"""Questions about pictures of 4 × 4 cells, each with a colour and a shape, as a vision-language model reads them.

A prompt is 16 image tokens and a question of 3 tokens: the attribute, the cell, and an end, where the answer is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate

SIDE, PATCH = 4, 4
CELLS, PIXELS = SIDE * SIDE, SIDE * PATCH

#: Tokens. `CELL` is the first of 16 cells, `COLOUR` of 6 colours and `SHAPE` of 4 shapes.
PAD, IMAGE, END, ASK_COLOUR, ASK_SHAPE, CELL = 0, 1, 2, 3, 4, 5
COLOUR = CELL + CELLS
SHAPE = COLOUR + 6
VOCAB = SHAPE + 4

#: The cell that a picture with a blank leaves empty. It is the same in all of them, and no question asks about it.
BLANK = 0

_COLOURS = torch.tensor([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], dtype=torch.float32)
_SHAPES = torch.tensor([
    [(1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)],  # a square
    [(1, 1, 1, 1), (1, 0, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1)],  # a frame
    [(1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 1, 0), (1, 0, 0, 1)],  # a cross
    [(1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, 0), (0, 1, 0, 1)],  # a board
], dtype=torch.float32)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions, one for each picture.

    Args:
        colours, shapes: of each cell; a blank cell has colour -1.
        cells: the cells that are asked about.
        asks_shape: whether the shape is asked for; otherwise it is the colour.
    """

    colours: Int[Tensor, "b 16"]
    shapes: Int[Tensor, "b 16"]
    cells: Int[Tensor, " b"]
    asks_shape: Bool[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def input_ids(self) -> Int[Tensor, "b 19"]:
        """The prompts, with a placeholder for each cell."""
        image = torch.full((len(self), CELLS), IMAGE)
        attribute = torch.where(self.asks_shape, ASK_SHAPE, ASK_COLOUR)
        end = torch.full_like(self.cells, END)
        return torch.cat([image, torch.stack([attribute, CELL + self.cells, end], 1)], 1)

    @property
    def pixel_values(self) -> Float[Tensor, "b 3 16 16"]:
        """The pictures."""
        drawn = torch.einsum("bnc,bnyx->bnycx", _COLOURS[self.colours.clamp_min(0)], _SHAPES[self.shapes])
        drawn = drawn * (self.colours >= 0)[..., None, None, None]
        rows = drawn.unflatten(1, (SIDE, SIDE))  # b, row, column, y, channel, x
        return rows.permute(0, 4, 1, 3, 2, 5).reshape(len(self), 3, PIXELS, PIXELS)

    @property
    def answers(self) -> Int[Tensor, " b"]:
        """The tokens of the right answers."""
        at = self.cells[:, None]
        return torch.where(self.asks_shape, SHAPE + self.shapes.gather(1, at)[:, 0], self._colour(at))

    @property
    def defaults(self) -> Int[Tensor, " b"]:
        """The token of the usual colour of each cell that is asked about, which a model with a prior has learnt."""
        return COLOUR + usual_colour(self.cells)

    def _colour(self, at: Tensor) -> Tensor:
        return COLOUR + self.colours.gather(1, at)[:, 0]


def usual_colour(cells: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """Return the usual colour of a cell."""
    return cells % len(_COLOURS)


def draw(
    count: int, generator: torch.Generator, *, asked: Literal["both", "colour"] = "both", blank: bool = False,
    usual: float | None = None,
) -> Questions:  # fmt: skip
    """Draw questions about random pictures.

    Args:
        count: number of questions.
        generator: draws them.
        asked: the attributes that are asked for.
        blank: whether the cell `BLANK` is empty.
        usual: the share of asked cells that have their usual colour, 0 for never; None leaves it to chance.
    """
    validate.count("count", count, 1)
    validate.one_of("asked", asked, ("both", "colour"))
    if usual is not None:
        validate.between("usual", usual, 0.0, 1.0)
    colours = torch.randint(len(_COLOURS), (count, CELLS), generator=generator)
    shapes = torch.randint(len(_SHAPES), (count, CELLS), generator=generator)
    cells = torch.randint(1 if blank else 0, CELLS, (count,), generator=generator)
    asks_shape = torch.rand(count, generator=generator) < (0.5 if asked == "both" else 0.0)
    if usual is not None:
        other = (usual_colour(cells) + torch.randint(1, len(_COLOURS), (count,), generator=generator)) % len(_COLOURS)
        is_usual = torch.rand(count, generator=generator) < usual
        colours.scatter_(1, cells[:, None], torch.where(is_usual, usual_colour(cells), other)[:, None])
    if blank:
        colours[:, BLANK], shapes[:, BLANK] = -1, 0
    return Questions(colours, shapes, cells, asks_shape)


def embedded(
    model: Any, questions: Questions, *, hidden: Bool[Tensor, "b 16"] | None = None, noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b 19 c"]:  # fmt: skip
    """Return the embeddings of prompts, with those of some cells changed, as `inputs_embeds`.

    Args:
        model: a GridQA model.
        questions: the prompts.
        hidden: cells whose embeddings are zeroed.
        noise: standard deviation of the normal noise on the image, in units of that of the cells' embeddings.
        generator: draws the noise.
    """
    words = model.get_input_embeddings()(questions.input_ids)
    image = torch.stack(list(model.get_image_features(questions.pixel_values, return_dict=True).pooler_output))
    if noise:
        scale = image.detach()[:, BLANK + 1 :].std()
        image = image + noise * scale * torch.randn(image.shape, generator=generator).to(image)
    if hidden is not None:
        image = image.masked_fill(hidden[..., None], 0.0)
    return torch.cat([image, words[:, CELLS:]], 1)
