"""Modality-mutual attention: a causal mask in which image tokens also see the question behind them.

Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs (2025), arXiv
2503.02597.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.core.selection import Rule

#: The first position of a span and the one behind its last.
Span = tuple[int, int]


def modality_mutual_mask(
    length: int, image_spans: Sequence[Span] | Bool[Tensor, "#b n"], question_span: Span | Bool[Tensor, "#b n"] | None,
    pad: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b 1 n n"]:  # fmt: skip
    """Return the mask `(B, 1, N, N)`: each token sees the past, and image tokens see all of the question too.

        sees(i, j) = j <= i  or  (i is of an image and j is of the question)

    Text stays causal, and no image token sees the answer, so that a model can be trained on whole conversations. It has
    `N (N + 1) / 2` pairs, and one for each image token and each token of the question behind it. Nothing is learnt, but
    a model has to be trained with the mask; the wrong choice for one that was not. When a prompt has been read with it,
    decoding is causal, since new tokens see all that is cached.

    Args:
        length: N.
        image_spans: `(start, stop)` of each image, or bool `(B, N)` where sequences differ.
        question_span: `(start, stop)` of the question, or bool `(B, N)`. It ends before the marker of the answer. None
            or an empty span gives the causal mask.
        pad: bool `(B, N)`, True for padding, which no token sees.

    Raises:
        OptionError, ShapeError: a span that is not inside the sequence, or a question that is part of an image.

    The release also counts the marker of the answer among the question. It takes one image; here each image sees the
    question.
    """
    validate.count("length", length)
    device = next((x.device for x in (image_spans, question_span, pad) if isinstance(x, Tensor)), None)
    image = _tokens("image_spans", image_spans, length, device)
    question = _tokens("question_span", [] if question_span is None else question_span, length, device)
    if bool((image & question).any()):
        raise OptionError("question_span must not overlap image_spans")
    seen = masks.causal(length, length, device=device) | mutual_pairs(image, question)
    return seen if pad is None else seen & ~_tokens("pad", pad, length, device)[:, None, None]


def modality_mutual_rule(image: Bool[Tensor, "#b n"], question: Bool[Tensor, "#b n"]) -> Rule:
    """Return the mask as FlexAttention's `mask_mod(b, h, i, j)`.

    Args:
        image, question: which tokens belong to an image and to the question, `(B, N)`, or `(1, N)` for all sequences.
    """
    if image.dim() != 2 or image.shape != question.shape:
        raise ShapeError(f"image and question must be bool (B, N) alike; got {shown(image)} and {shown(question)}")
    shared = len(image) == 1

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b * 0 if shared else b
        return (j <= i) | (image[row, i] & question[row, j])

    return rule


def mutual_pairs(image: Bool[Tensor, "#b n"], question: Bool[Tensor, "#b m"]) -> Bool[Tensor, "b 1 n m"]:
    """Return the pairs that the mask adds to a causal one: image tokens in rows, tokens of the question in columns."""
    return (image[:, :, None] & question[:, None])[:, None]


def _tokens(name: str, spans: object, length: int, device: torch.device | None) -> Bool[Tensor, "#b n"]:
    """Return which tokens belong to some spans."""
    if isinstance(spans, Tensor):
        if spans.dtype != torch.bool or spans.dim() != 2 or spans.shape[1] != length:
            raise ShapeError(f"{name} must be bool (B, N={length}); got {shown(spans)}")
        return spans
    found = torch.zeros(1, length, dtype=torch.bool, device=device)
    assert isinstance(spans, Sequence)
    for start, stop in [spans] if _is_span(spans) else spans:
        if not 0 <= start <= stop <= length:
            raise OptionError(f"{name}: ({start}, {stop}) must be (start, stop) inside 0..{length}")
        found[:, start:stop] = True
    return found


def _is_span(spans: Sequence[object]) -> bool:
    return len(spans) == 2 and all(isinstance(end, int) for end in spans)
