"""The record of what a sequence's calls read, from which its spans are found when a method asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache

from foveate.core.errors import UnsupportedModel
from foveate.host.hf.cache import tokens_seen
from foveate.host.hf.calls import parameters
from foveate.host.hf.mask import MaskPlan
from foveate.host.hf.vision_spans import NAMES, has_placeholders, spans_of

#: Inputs of a call that tell its spans.
_KEPT = ("input_ids", "mm_token_type_ids", "attention_mask", "pixel_values", "pixel_values_videos")


@dataclass
class _Piece:
    """Some tokens that were read together: a prompt with its inputs, or tokens that were generated (no inputs)."""

    tokens: int
    inputs: dict[str, Any] | None
    masks: dict[str, Bool[Tensor, "b n"]] | None = None


@dataclass
class TokensRead:
    """The tokens of a sequence (or batch) so far, by call.

    Args:
        model: the model that read them.
        pieces: in order; tokens that are generated one after another are one piece.
    """

    model: Any
    pieces: list[_Piece] = field(default_factory=list)

    def __reduce__(self) -> tuple[type[Self], tuple[None]]:
        """Save a cache without the model and its inputs; the spans of a loaded cache are unknown."""
        return type(self), (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy for a copied cache. The model is not copied."""
        return type(self)(self.model, [_Piece(each.tokens, each.inputs, each.masks) for each in self.pieces])

    @property
    def count(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    def note(self, past: int, tokens: int, inputs: Mapping[str, Any] | None) -> None:
        """Record a call after `past` tokens; what was recorded behind them was removed from the cache again.

        Args:
            past: tokens of the sequence before the call.
            tokens: tokens that it reads.
            inputs: its arguments; None if it reads generated tokens.
        """
        while self.pieces and self.count > past:
            last = self.pieces[-1]
            last.tokens -= min(last.tokens, self.count - past)
            if not last.tokens:
                self.pieces.pop()
        if inputs is None and self.pieces and self.pieces[-1].inputs is None:
            self.pieces[-1].tokens += tokens
            return
        kept = None if inputs is None or self.model is None else _kept(inputs, tokens, has_placeholders(self.model))
        self.pieces.append(_Piece(tokens, kept))

    def names(self) -> tuple[str, ...]:
        known = self.model is not None and self.pieces and all(_tells(piece) for piece in self.pieces)
        return NAMES if known else ()

    def whole(self, stop: int) -> dict[str, Bool[Tensor, "b n"]]:
        """Return the spans of all tokens; `stop` is the number that the decoder counts.

        Raises:
            UnsupportedModel: the decoder read another number of tokens than the model was given.
        """
        if self.count != stop:
            raise UnsupportedModel(
                f"{type(self.model).__name__} was given {self.count} tokens and its decoder read {stop}: it puts "
                f"several embeddings in the place of one token, so that spans cannot be told from its inputs; set "
                f"run.spans"
            )
        first = self._masks(self.pieces[0])["text"]
        parts = [self._masks(piece, first) for piece in self.pieces]
        rows = max(part["text"].shape[0] for part in parts)
        spans = {name: torch.cat([_repeated(part[name], rows) for part in parts], 1) for name in NAMES}
        words, seen = spans["system"] | spans["text"], spans["image"] | spans["video"]  # a prompt may come in pieces
        before = words & (seen.cumsum(1) == 0) & seen.any(1, keepdim=True)
        return {**spans, "system": before, "text": words & ~before}

    def _masks(self, piece: _Piece, like: Tensor | None = None) -> dict[str, Bool[Tensor, "b n"]]:
        if piece.inputs is None:
            assert like is not None  # a sequence begins with a prompt
            no = torch.zeros(like.shape[0], piece.tokens, dtype=torch.bool, device=like.device)
            return {**dict.fromkeys(NAMES, no), "generated": ~no}
        if piece.masks is None:
            piece.masks = spans_of(self.model, piece.inputs)
        return {name: mask[:, : piece.tokens] for name, mask in piece.masks.items()}


def _tells(piece: _Piece) -> bool:
    """Return whether the spans of a piece can be told from its inputs."""
    return piece.inputs is None or "input_ids" in piece.inputs or "mm_token_type_ids" in piece.inputs


def _kept(inputs: Mapping[str, Any], tokens: int, has_placeholders: bool) -> dict[str, Any]:
    """Return the inputs that tell the spans of a call's tokens: no pictures, and nothing that earlier calls read.

    Without placeholders all tokens are text, whichever they are: then only their number is kept.
    """
    kept: dict[str, Any] = {}
    for name in _KEPT:
        value = _two_dimensional(inputs.get(name)) if "mask" in name else inputs.get(name)
        if not isinstance(value, Tensor):
            continue
        if "pixel" in name:
            kept[name] = True
        elif value.dim() == 2 and value.shape[1] >= tokens:
            value = value[:, -tokens:]
            is_text = name == "input_ids" and not has_placeholders
            kept[name] = (
                value.new_zeros(()).expand(value.shape) if is_text else value.bool() if "mask" in name else value
            )
    return kept


def _two_dimensional(mask: Any) -> Any:
    """Return the caller's mask of tokens, also out of masks that were made of it before the call."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    return mask.arguments.get("attention_mask") if isinstance(mask, MaskPlan) else mask


def _repeated(mask: Tensor, rows: int) -> Tensor:
    return mask if mask.shape[0] == rows else mask.repeat_interleave(rows // mask.shape[0], 0)


def cached_tokens(cache: Cache) -> int:
    """Return the number of tokens that a cache has seen, by its first layer that counts them."""
    return next((tokens_seen(layer) for layer in cache.layers if hasattr(layer, "get_seq_length")), 0)


def tokens_of(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a call of a model reads; None if it reads no text."""
    for name in ("input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[1]
    return None


def named_inputs(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a module's call by name."""
    return {**dict(zip(parameters(type(module).forward), args, strict=False)), **kwargs} if args else kwargs
