"""Texts of a model’s tokens for its views: words, patches or numbers, without padding, and where a segment begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import OptionError
from foveate.host.hf.model import Host
from foveate.lens.parts.pieces import pieces


@dataclass(frozen=True, eq=False)
class Side:
    """The tokens of one side of a map: the texts of those that are no padding, and a mask of them."""

    texts: list[str]
    real: Bool[Tensor, " n"]


@final
@dataclass(frozen=True, eq=False)
class Labels:
    """The texts of an input's tokens.

    Args:
        main, decoder: the texts of the main input's and of the decoder's tokens; None for numbers.
        main_mask, decoder_mask: True for tokens that are no padding; None if all are.
        boundary: the place of the second segment's first token, padding left out; None if there is one segment.
        grid: rows and columns of patches; None for text.
        image: the image behind the patches, from 0 to 1.
    """

    main: Sequence[str] | None
    decoder: Sequence[str] | None = None
    main_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    boundary: int | None = None
    grid: tuple[int, int] | None = None
    image: Float[Tensor, "3 y x"] | None = None

    def side(self, part: str, which: Literal["queries", "keys"], size: int) -> Side:
        """Return the tokens of one side of a part's maps."""
        decoder = part == "decoder" or (part == "cross" and which == "queries")
        texts, mask = (self.decoder, self.decoder_mask) if decoder else (self.main, self.main_mask)
        real = torch.ones(size, dtype=torch.bool)
        if mask is not None and len(mask) == size:
            real = mask.bool().cpu()
        if texts is None:
            named = [str(place) for place in range(size)]
            named = self._patches(size) if self.grid is not None and part == "" else named
        elif len(texts) == size:
            named = list(texts)
        elif len(texts) == int(real.sum()):
            return Side(list(texts), real)
        else:
            name = "decoder_tokens" if decoder else "tokens"
            raise OptionError(f"{name} must hold {size} texts, one for each token; got {len(texts)}")
        return Side([text for text, is_real in zip(named, real.tolist(), strict=True) if is_real], real)

    def _patches(self, size: int) -> list[str]:
        assert self.grid is not None
        rows, columns = self.grid
        front = size - rows * columns
        first = ["[CLS]", *(f"[{place}]" for place in range(1, front))][:front]
        return first + [f"{row},{column}" for row in range(rows) for column in range(columns)]


def labels(
    here: Host, given: Mapping[str, Any], tokenizer: Any, tokens: Sequence[str] | None,
    decoder_tokens: Sequence[str] | None,
) -> Labels:  # fmt: skip
    """Return the texts of one item's tokens.

    Args:
        here: the model.
        given: its inputs.
        tokenizer: gives the texts that the caller does not; None for numbers.
        tokens, decoder_tokens: the caller's texts.
    """
    if tokenizer is not None:
        tokens = _decoded(tokenizer, given.get("input_ids")) if tokens is None else tokens
        decoder_tokens = (
            _decoded(tokenizer, given.get("decoder_input_ids")) if decoder_tokens is None else decoder_tokens
        )
    mask, decoder_mask = _first(given.get("attention_mask")), _first(given.get("decoder_attention_mask"))
    return Labels(tokens, decoder_tokens, mask, decoder_mask, _boundary(given, mask), *_patches(here, given))


def _first(mask: Any) -> Tensor | None:
    return mask[0] if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _decoded(tokenizer: Any, ids: Tensor | None) -> list[str] | None:
    return None if ids is None else pieces(tokenizer, ids[0].tolist())


def _boundary(given: Mapping[str, Any], mask: Tensor | None) -> int | None:
    """Return the place of the first token of type 1, if all tokens after it have that type too."""
    kinds = given.get("token_type_ids")
    if not isinstance(kinds, Tensor):
        return None
    row = kinds[0].cpu() if mask is None else kinds[0].cpu()[mask.bool().cpu()]
    second = (row == 1).nonzero().flatten()
    if not len(second) or int(second[0]) == 0 or not bool((row[int(second[0]) :] == 1).all()):
        return None
    return int(second[0])


def _patches(here: Host, given: Mapping[str, Any]) -> tuple[tuple[int, int] | None, Tensor | None]:
    """Return the grid of a ViT's patches and its image, each from 0 to 1; None for models that read text."""
    pixels = given.get("pixel_values")
    size = getattr(here.config, "patch_size", None)
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or size is None or "input_ids" in given:
        return None, None
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    image = pixels[0].detach().float().cpu()
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low).clamp_min(1e-12)
    image = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return (pixels.shape[2] // height, pixels.shape[3] // width), image
