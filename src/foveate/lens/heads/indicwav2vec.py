"""Analyses of a self-supervised speech encoder: how local its heads are, its codes, its layers, and its sampling.

Towards Building ASR Systems for the Next Billion Users (2021), arXiv 2111.03945. It trains wav2vec 2.0 on 40 languages
of India, drawn by temperature, and shows that heads look at short windows, that languages share codes for similar
sounds, and that layers tell languages apart.

The sampling is that of the release. The release has no code for the analyses: the measure of locality, with its window
and its threshold, the histograms and the probe are reconstructed. Training and decoding are not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.lens.parts.linear_probe import LinearProbe, folds


@final
@dataclass(frozen=True, eq=False)
class HeadLocality:
    """The nearness of a frame's attention to it, a mean over frames and texts.

    Args:
        window_mass: the mass within the window, `(L, H)`.
        mean_distance: the mean distance in frames, `(L, H)`.
        lift: the mass as a multiple of uniform attention's at the same frame, so that frames near a border, whose
            window is cut, do not look less local, `(L, H)`.
        uniform: the window mass of uniform attention.
        uniform_distance: the mean distance of uniform attention.
    """

    window_mass: Float[Tensor, "l h"]
    mean_distance: Float[Tensor, "l h"]
    lift: Float[Tensor, "l h"]
    uniform: float
    uniform_distance: float

    def local_share(self, threshold: float = 0.5) -> float:
        """Return the share of heads with more than `threshold` of their mass in the window."""
        validate.between("threshold", threshold, 0.0, 1.0)
        return float((self.window_mass > threshold).double().mean())


def head_locality(
    attention: Float[Tensor, "b l h t t"] | Float[Tensor, "l h t t"],
    k: int = 5,
    mask: Bool[Tensor, "b t"] | Bool[Tensor, " t"] | None = None,
) -> HeadLocality:
    """Measure how much of its attention each head keeps within `k` frames on both sides.

    Args:
        attention: weights of one sequence or several; see `attention_maps`.
        k: the half width of the window.
        mask: False for padding, whose frames count neither as queries nor as keys; None if there is none.
    """
    validate.count("k", k)
    maps = attention[None] if attention.ndim == 4 else attention
    if maps.ndim != 5 or maps.shape[-1] != maps.shape[-2] or not maps.shape[-1]:
        raise ShapeError(f"attention must be (L, H, T, T) or (B, L, H, T, T); got {tuple(attention.shape)}")
    t = maps.shape[-1]
    real = torch.ones(len(maps), t, dtype=torch.bool, device=maps.device) if mask is None else mask
    real = real[None] if real.ndim == 1 else real
    validate.bool_mask("mask", real, "B, T", (len(maps), t), maps.device)
    real = real.expand(len(maps), t)
    if not bool(real.any(-1).all()):
        raise OptionError("mask must leave a frame in every sequence; got one that is all padding")
    place = torch.arange(t, device=maps.device)
    distance = (place[:, None] - place).abs().double()
    both = (real[:, None] & real[:, :, None])[:, None, None]
    weights = maps.double().masked_fill(~both, 0.0)
    even = both.double() / real.sum(-1)[:, None, None, None, None]
    near = (weights * (distance <= k)).sum(-1)
    even_near = (even * (distance <= k)).sum(-1)

    def mean(rows: Tensor) -> Tensor:
        """Average over the real frames of each sequence, then over sequences."""
        return (rows.sum(-1) / real.sum(-1)[:, None, None]).mean(0)

    lift = near / even_near.clamp_min(torch.finfo(torch.float64).tiny)
    return HeadLocality(
        mean(near), mean((weights * distance).sum(-1)), mean(lift), float(mean(even_near)),
        float(mean((even * distance).sum(-1))),
    )  # fmt: skip


@torch.no_grad()
def frame_codes(model: nn.Module, inputs: Mapping[str, Any]) -> Int[Tensor, "b t g"]:
    """Return the entry of each codebook that a pretraining model's quantiser chooses for each frame.

    Args:
        model: a model with a product quantiser, such as `Wav2Vec2ForPreTraining`, in evaluation mode.
        inputs: the model's inputs, such as `{"input_values": waves}`.
    """
    found = [m for m in model.modules() if hasattr(m, "weight_proj") and hasattr(m, "num_groups")]
    if len(found) != 1:
        raise UnsupportedModel(f"{type(model).__name__} must have one quantiser with weight_proj; it has {len(found)}")
    projection, groups = found[0].weight_proj, found[0].num_groups
    assert isinstance(projection, nn.Module)
    logits: list[Tensor] = []
    hook = projection.register_forward_hook(lambda _, given, out: logits.append(out))
    try:
        model(**inputs)
    finally:
        hook.remove()
    if not logits:
        raise UnsupportedModel(f"{type(model).__name__} did not quantise these inputs")
    return logits[0].unflatten(-1, (groups, -1)).argmax(-1)


def code_histograms(
    codes: Int[Tensor, "b t g"], labels: Int[Tensor, "b t"], entries: int = 320
) -> Float[Tensor, "p g v"]:
    """Return the distribution of each codebook's entries for each label; zeros for a label without frames.

    Args:
        codes: the entries of each frame; see `frame_codes`.
        labels: the label of each frame, such as a phoneme of a language; below 0 for frames that do not count.
        entries: the number of entries of a codebook.
    """
    validate.count("entries", entries, 1)
    if codes.ndim != 3 or codes.shape[:2] != labels.shape:
        raise ShapeError(f"codes must be (B, T, G) and labels (B, T); got {tuple(codes.shape)}, {tuple(labels.shape)}")
    used = labels >= 0
    if not used.any() or int(codes.min()) < 0 or int(codes.max()) >= entries:
        raise OptionError(f"codes must be in 0..{entries - 1}, and a label at least 0; got {int(codes.max())}")
    own, entry = labels[used], codes[used]
    counts = torch.zeros(int(own.max()) + 1, codes.shape[2], entries, dtype=torch.float64, device=codes.device)
    book = torch.arange(codes.shape[2], device=codes.device).expand_as(entry)
    counts.index_put_((own[:, None].expand_as(entry), book, entry), counts.new_ones(()), accumulate=True)
    return counts / counts.sum(-1, keepdim=True).clamp_min(1.0)


def code_similarity(
    histograms: Float[Tensor, "p g v"], kind: Literal["cosine", "js"] = "cosine"
) -> Float[Tensor, "p p"]:
    """Return how alike the codes of labels are, 1 for equal histograms and 0 for disjoint ones, a mean over codebooks.

    Args:
        histograms: see `code_histograms`.
        kind: "cosine", or "js" for 1 less the Jensen-Shannon divergence in bits.
    """
    validate.one_of("kind", kind, ("cosine", "js"))
    books = histograms.double().transpose(0, 1)
    if kind == "cosine":
        unit = nn.functional.normalize(books, dim=-1)
        return (unit @ unit.mT).mean(0)
    entr = torch.special.entr
    between = (books[:, :, None] + books[:, None]) / 2
    own = entr(books).sum(-1)
    divergence = entr(between).sum(-1) - (own[:, :, None] + own[:, None]) / 2
    return (1 - divergence / math.log(2)).mean(0)


def layer_probe(
    hidden: Float[Tensor, "l n d"], labels: Int[Tensor, " n"], parts: int = 5, penalty: float = 1.0, seed: int = 0
) -> Float[Tensor, " l"]:
    """Return how well a logistic probe tells the labels from each layer: the accuracy on samples that it has not seen.

    Args:
        hidden: a state of each sample at each layer, such as the mean over its frames.
        labels: the class of each sample, such as a language or its family.
        parts: the parts of the cross-validation; each class is spread over all of them.
        penalty: of the squared weights, see `LinearProbe`.
        seed: of the split.
    """
    if hidden.ndim != 3 or tuple(labels.shape) != (hidden.shape[1],):
        raise ShapeError(f"hidden must be (L, N, D) and labels (N,); got {tuple(hidden.shape)}, {tuple(labels.shape)}")
    part = folds(labels, parts, seed)
    hits = torch.zeros(len(hidden), dtype=torch.float64)
    for number in range(parts):
        held = part == number
        for layer, states in enumerate(hidden):
            probe = LinearProbe.fit(states[~held], labels[~held], penalty)
            hits[layer] += float((probe.predict(states[held]) == labels[held]).sum())
    return hits / len(labels)


def sample_probs(hours: Sequence[float], alpha: float = 0.7) -> Float[Tensor, " n"]:
    """Return the probability of each language: its share of the hours to the power `alpha`, normalised.

    1 keeps the shares; 0 makes all languages equal.
    """
    validate.between("alpha", alpha, 0.0, 1.0)
    sizes = torch.as_tensor(hours, dtype=torch.float64)
    if sizes.ndim != 1 or not len(sizes) or not bool((sizes > 0).all()):
        raise OptionError(f"hours={list(hours)} must be a non-empty list of numbers above 0")
    smooth = (sizes / sizes.sum()).pow(alpha)
    return smooth / smooth.sum()


def resampling_ratios(hours: Sequence[float], alpha: float = 0.7) -> Float[Tensor, " n"]:
    """Return how many times each language's data are drawn in an epoch: `p * total / hours`.

    Those of 1 or more are drawn with replacement.
    """
    sizes = torch.as_tensor(hours, dtype=torch.float64)
    return sample_probs(hours, alpha) * sizes.sum() / sizes
