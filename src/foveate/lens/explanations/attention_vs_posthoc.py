"""Attention weights beside explanations after the fact: gradients, and LIME, of the same prediction.

Attention Meets Post-hoc Interpretability: A Mathematical Perspective (2024), arXiv 2402.03485. On a classifier of one
attention layer, the gradient and the limit of LIME are known in closed form. Attention weights have no sign and do not
depend on the values; both others do.

    model = ClsAttentionClassifier(vocabulary)
    ids = model.padded(words)
    explanations = explain_all(model, ids)                        # {"attn_mean": (T,), "grad_input": (T,), ...}
    agreement(explanations, ids)                                  # rank correlation and signs in common
    deletion_drop(lambda texts: model(texts)[:, 1], ids, explanations["lime_limit"], 3, model.unknown)

Encoders of transformers are explained too: attention of the class token in the last layer, gradients by autograd,
sampled LIME. The limit of LIME is the authors' approximation for long texts, with its factor 3/2: it has the order
and the signs of LIME's weights, and not their size. For uniform attention LIME's weights are 2/3 of it, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host import host
from foveate.lens.explanations.text_lime import Score, maskable, spread, text_lime
from foveate.lens.parts.maps import attention_maps
from foveate.lens.parts.rank_correlation import rank_correlation
from foveate.models.language.cls_attention_classifier import ClsAttentionClassifier

#: Explanations: attention's mean or maximum over heads; the gradient's mean, L1 or L2 norm over channels, or its
#: product with the embedding; LIME's limit in closed form; LIME by samples.
How = Literal["attn_mean", "attn_max", "grad_mean", "grad_l1", "grad_l2", "grad_input", "lime_limit", "lime"]
HOWS: tuple[How, ...] = get_args(How)


def explain(
    model: object, ids: Int[Tensor, " t"], how: How, target: int = 1, *, unknown: int | None = None,
    kept: Iterable[int] = (), **options: Any,
) -> Float[Tensor, " t"]:  # fmt: skip
    """Return the importance of each token for a class's score, by one explanation.

    Args:
        model: a `ClsAttentionClassifier`, or a sequence classifier of transformers whose first token is the class
            token; in evaluation mode.
        ids: one text, class token first.
        how: the explanation; see `How`. "lime_limit" needs a `ClsAttentionClassifier`.
        target: the class.
        unknown: for LIME on other models, the token that takes a masked word's place.
        kept: for LIME on other models, tokens that are never masked.
        options: of `text_lime`.
    """
    validate.one_of("how", how, HOWS)
    one_layer = isinstance(model, ClsAttentionClassifier)
    if how == "lime":
        unknown, kept = (model.unknown, {model.cls}) if isinstance(model, ClsAttentionClassifier) else (unknown, kept)
        if unknown is None:
            raise OptionError("unknown must be the token that masks a word, such as tokenizer.mask_token_id; got None")
        return text_lime(_score(model, target), ids, unknown, kept=kept, **options)
    if options:
        raise OptionError(f'how="{how}" takes no {", ".join(options)}; that is an option of "lime"')
    if how == "lime_limit":
        if not isinstance(model, ClsAttentionClassifier):
            raise OptionError('how="lime_limit" must have a ClsAttentionClassifier; try how="lime"')
        return lime_limit(model, ids, target)
    if how in ("attn_mean", "attn_max"):
        weights = _one_layer_weights(model, ids) if one_layer else _encoder_weights(model, ids)
        return weights.mean(0) if how == "attn_mean" else weights.amax(0)
    slope, embedded = _one_layer_slope(model, ids, target) if one_layer else _encoder_slope(model, ids, target)
    if how == "grad_input":
        return (slope * embedded).sum(-1)
    return slope.mean(-1) if how == "grad_mean" else torch.linalg.vector_norm(slope, 1 if how == "grad_l1" else 2, -1)


def explain_all(
    model: object, ids: Int[Tensor, " t"], target: int = 1, hows: Iterable[How] | None = None, **options: Any
) -> dict[str, Float[Tensor, " t"]]:
    """Return several explanations of one text by name; all that the model has by default.

    Args:
        model, ids, target: see `explain`.
        hows: the explanations.
        options: of `explain` for LIME.
    """
    if hows is None:
        hows = [how for how in HOWS if how != "lime_limit" or isinstance(model, ClsAttentionClassifier)]
    return {how: explain(model, ids, how, target, **(options if how == "lime" else {})) for how in hows}


@torch.no_grad()
def attention_gradient(model: ClsAttentionClassifier, ids: Int[Tensor, " t"], target: int = 1) -> Float[Tensor, "t c"]:
    """Return the gradient of a class's score with respect to each embedding, in closed form.

    For a token other than the class token, with q the class token's query and w the class's row of head h,

        1/H sum_h alpha_t ( W_v^T w + scale (w·v_t - sum_s alpha_s w·v_s) W_k^T q ).

    The class token's own has the query's term besides: scale W_q^T sum_t alpha_t (w·v_t - sum_s alpha_s w·v_s) k_t.
    """
    heads = model.attend(model.embed(_one(ids)))
    rows = _row(model, target)
    q, k, v = ((linear.weight.unflatten(0, (model.heads, -1))) for linear in (model.q, model.k, model.v))
    alpha, contribution = heads.weights[0], torch.einsum("htd,hd->ht", heads.v[0], rows)
    excess = alpha * (contribution - (alpha * contribution).sum(-1, keepdim=True)) * model.scale
    slope = torch.einsum("ht,hdc,hd->tc", alpha, v, rows)
    slope += torch.einsum("ht,hdc,hd->tc", excess, k, heads.q[0])
    slope[0] += torch.einsum("ht,htd,hdc->c", excess, heads.k[0], q)
    return slope / model.heads


@torch.no_grad()
def lime_limit(model: ClsAttentionClassifier, ids: Int[Tensor, " t"], target: int = 1) -> Float[Tensor, " t"]:
    """Return LIME's weights in the limit of many samples and long texts, as the paper approximates them.

    The weight of a word is the sum over its places t of

        3/2 · 1/H sum_h w·( alpha_t v_t - alpha^u_t v^u_t ),

    with the weights and values `alpha^u`, `v^u` of the text in which all words are masked, under the same query.
    """
    free = maskable(ids, {model.cls, model.unknown})
    masked = torch.where(free, model.unknown, ids)
    heads, none = (model.attend(model.embed(_one(each))) for each in (ids, masked))
    rows = _row(model, target)  # the class token is never masked, so that both have the same query
    mixed = heads.weights[..., None] * heads.v - none.weights[..., None] * none.v
    values = 1.5 * torch.einsum("bhtd,hd->t", mixed, rows) / model.heads
    words, place = torch.unique(ids[free], return_inverse=True)
    total = values.new_zeros(len(words)).index_add_(0, place, values[free])
    return spread(total[place], free)


@final
@dataclass(frozen=True, eq=False)
class Agreement:
    """The agreement of explanations of one text.

    Args:
        names: of the explanations.
        ranks: Spearman's correlation between them.
        signs: the share of tokens to which both give the same sign.
    """

    names: tuple[str, ...]
    ranks: Float[Tensor, "k k"]
    signs: Float[Tensor, "k k"]


def agreement(
    explanations: Mapping[str, Float[Tensor, " t"]], ids: Int[Tensor, " t"], kept: Iterable[int] = (0, 1)
) -> Agreement:
    """Return how far explanations of one text agree on its words.

    Args:
        explanations: by name; see `explain_all`.
        ids: the text.
        kept: tokens that do not count; by default the class token and the unknown token of `ClsAttentionClassifier`.
    """
    if not explanations:
        raise OptionError("explanations must hold at least one; got none")
    free = maskable(ids, set(kept))
    for name, each in explanations.items():
        if each.shape != ids.shape:
            raise ShapeError(
                f"explanations[{name!r}] must be {tuple(ids.shape)}, one for each token; got {shown(each)}"
            )
    table = torch.stack([each.detach()[free].double() for each in explanations.values()])
    signs = table.sign()
    return Agreement(tuple(explanations), rank_correlation(table), (signs[:, None] == signs[None]).double().mean(-1))


@torch.no_grad()
def deletion_drop(
    score: Score, ids: Int[Tensor, " t"], explanation: Float[Tensor, " t"], count: int, unknown: int,
    kept: Iterable[int] = (0,),
) -> float:  # fmt: skip
    """Return how far a score falls when the tokens with the largest importance are masked.

    Args:
        score: the classifier's score of the class that is explained, for a batch of texts.
        ids: the text.
        explanation: the importance of each token.
        count: the number of tokens to mask.
        unknown: the token that takes their place.
        kept: tokens that are not masked.
    """
    free = maskable(ids, {unknown, *kept})
    if explanation.shape != ids.shape:
        raise ShapeError(f"explanation must be {tuple(ids.shape)}, one for each token; got {shown(explanation)}")
    validate.count("count", count, 1)
    ranked = explanation.masked_fill(~free, -torch.inf).argsort(descending=True, stable=True)
    masked = ids.clone()
    masked[ranked[: min(count, int(free.sum()))]] = unknown
    before, after = score(torch.stack([ids, masked])).tolist()
    return float(before - after)


def _one(ids: Tensor) -> Int[Tensor, "1 t"]:
    if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.dim() != 1 or not len(ids):
        raise ShapeError(f"ids must be the token ids (T,) of one text; got {shown(ids)}")
    return ids[None]


def _row(model: ClsAttentionClassifier, target: int) -> Float[Tensor, "h d"]:
    """Return the class's part of the output map for each head."""
    _check_target(target, len(model.out.weight))
    return model.out.weight[target].unflatten(0, (model.heads, -1))


def _check_target(target: int, classes: int) -> None:
    if isinstance(target, bool) or target not in range(classes):
        raise OptionError(f"target={shown(target)} must be a class in 0..{classes - 1}")


def _score(model: Any, target: int) -> Score:
    """Return the function that scores a batch of texts for a class."""

    def score(texts: Tensor) -> Tensor:
        made = model(texts)
        logits = made if isinstance(made, Tensor) else made.logits
        _check_target(target, logits.shape[-1])
        return logits[:, target]

    return score


def _one_layer_weights(model: Any, ids: Tensor) -> Float[Tensor, "h t"]:
    with torch.no_grad():
        return model.attend(model.embed(_one(ids))).weights[0]


def _one_layer_slope(model: Any, ids: Tensor, target: int) -> tuple[Tensor, Tensor]:
    return attention_gradient(model, ids, target), model.embed(_one(ids))[0].detach()


def _encoder_weights(model: object, ids: Tensor) -> Float[Tensor, "h t"]:
    return attention_maps(model, _one(ids))[0, -1, :, 0]


def _encoder_slope(model: object, ids: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Return the gradient with respect to the tokens' embeddings, and these; positions and types are added later."""
    found = host(model).model
    embedded = found.get_input_embeddings()(_one(ids)).detach().requires_grad_()
    with torch.enable_grad():
        logits = found(inputs_embeds=embedded).logits
        _check_target(target, logits.shape[-1])
        (slope,) = torch.autograd.grad(logits[0, target], embedded)
    return slope[0], embedded[0].detach()
