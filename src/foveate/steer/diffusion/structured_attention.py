"""Cross-attention with the values of separately encoded phrases, as mathematics: no model and no parser.

Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis (2022), arXiv 2212.05032.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core import engines, validate
from foveate.core.call import AttentionCall
from foveate.core.errors import OptionError, ShapeError, shown

#: A phrase's first token and the one behind its last, counted without the tokens before the text.
Span = tuple[int, int]


def structured_cross_attention(
    q: Float[Tensor, "b n c"], k_contexts: Sequence[Float[Tensor, "#b t d"]],
    v_contexts: Sequence[Float[Tensor, "#b t d"]], to_k: Callable[[Tensor], Tensor],
    to_v: Callable[[Tensor], Tensor], heads: int,
) -> Float[Tensor, "b n c"]:  # fmt: skip
    """Return cross-attention to several encodings of one prompt, before the output projection.

    With as many contexts for keys as for values, they are paired and the outputs averaged. With one of either kind, all
    combinations are averaged: one attention map over the mean value, or the mean of several maps over one value.

    Args:
        q: queries, the heads side by side; `C = heads * D`.
        k_contexts, v_contexts: encodings that keys and values are made from.
        to_k, to_v: the layer's projections, `(B, T, d) -> (B, T, C)`.
        heads: number of heads.

    Raises:
        OptionError: the numbers of contexts differ, and neither is 1.
    """
    validate.count("heads", heads, 1)
    if q.dim() != 3 or q.shape[-1] % heads:
        raise ShapeError(f"q must be (B, N, C) with C a multiple of heads={heads}; got {tuple(q.shape)}")

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def projected(to: Callable[[Tensor], Tensor], contexts: Sequence[Tensor]) -> list[Tensor]:
        return [split(to(context)).expand(len(q), -1, -1, -1) for context in contexts]

    keys, values = projected(to_k, k_contexts), projected(to_v, v_contexts)
    out = structured_attention(split(q), None, keys, values, (q.shape[-1] // heads) ** -0.5)
    return out.transpose(1, 2).flatten(2)


def structured_attention(
    q: Float[Tensor, "b h n d"], mask: Tensor | None, ks: Sequence[Float[Tensor, "b h t d"]],
    vs: Sequence[Float[Tensor, "b h t dv"]], scale: float, dropout: float = 0.0,
) -> Float[Tensor, "b h n dv"]:  # fmt: skip
    """Return the mean of the attentions to several keys and values; see `structured_cross_attention`.

    One map over several values is that map over their mean, which is one attention.
    """
    if not ks or not vs or (len(ks) != len(vs) and 1 not in (len(ks), len(vs))):
        raise OptionError(
            f"got {len(ks)} contexts for keys and {len(vs)} for values: as many of both are needed, or one of either"
        )

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return engines.run(AttentionCall(q, k, v, scale, mask, dropout=dropout), "fused")

    if len(ks) == 1:
        return attend(ks[0], vs[0] if len(vs) == 1 else torch.stack(list(vs)).mean(0))
    pairs = zip(ks, vs if len(vs) > 1 else [vs[0]] * len(ks), strict=True)
    return torch.stack([attend(k, v) for k, v in pairs]).mean(0)


def align_spans(
    full: Float[Tensor, "t d"], phrases: Sequence[Float[Tensor, "t d"]], spans: Sequence[Span], bos: int = 1
) -> list[Float[Tensor, "t d"]]:
    """Return a copy of the prompt's encoding for each phrase, with the phrase's own encoding at its place.

    Rows `bos + start ... bos + stop - 1` of the copy are rows `bos ... bos + stop - start - 1` of the phrase's.

    Args:
        full: the encoded prompt.
        phrases: each phrase, encoded alone.
        spans: each phrase's place in the prompt.
        bos: tokens before the text, which spans do not count: 1 for CLIP, 0 for T5.
    """
    _check(full, phrases, spans, bos)
    return [_aligned(full.clone(), phrase, span, bos) for phrase, span in zip(phrases, spans, strict=True)]


def align_all(
    full: Float[Tensor, "t d"], phrases: Sequence[Float[Tensor, "t d"]], spans: Sequence[Span], bos: int = 1
) -> Float[Tensor, "t d"]:
    """Return one copy of the prompt's encoding with all phrases at their places; where two overlap, the later stands.

    Args:
        full, phrases, spans, bos: see `align_spans`.
    """
    _check(full, phrases, spans, bos)
    aligned = full.clone()
    for phrase, span in zip(phrases, spans, strict=True):
        _aligned(aligned, phrase, span, bos)
    return aligned


def _aligned(rows: Tensor, phrase: Tensor, span: Span, bos: int) -> Tensor:
    start, stop = span
    rows[bos + start : bos + stop] = phrase[bos : bos + stop - start]
    return rows


def _check(full: Tensor, phrases: Sequence[Tensor], spans: Sequence[Span], bos: int) -> None:
    validate.count("bos", bos)
    validate.tensor("full", full)
    if full.dim() != 2:
        raise ShapeError(f"full must be one encoded prompt (T, d); got {tuple(full.shape)}")
    if len(phrases) != len(spans):
        raise OptionError(f"spans must have one for each of {len(phrases)} phrases; got {len(spans)}")
    for phrase, span in zip(phrases, spans, strict=True):
        if not isinstance(span, tuple) or len(span) != 2 or not 0 <= span[0] < span[1] <= len(full) - bos:
            raise OptionError(f"spans: {shown(span)} must be (start, stop) with 0 <= start < stop <= {len(full) - bos}")
        if phrase.dim() != 2 or phrase.shape[1] != full.shape[1] or len(phrase) < bos + span[1] - span[0]:
            raise ShapeError(
                f"phrases must be (T, d={full.shape[1]}) with T at least {bos + span[1] - span[0]}, as its span asks; "
                f"got {tuple(phrase.shape)}"
            )
