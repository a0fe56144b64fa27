"""Analyses of an encoder's heads: where they look, and which relations between words they follow.

What Does BERT Look At? An Analysis of BERT's Attention (2019), arXiv 1906.04341. Here are its surface patterns, its
heads as parsers and its heads as finders of antecedents. Beside them are `js_distance` and `embed_heads` for groups of
heads, and `AttentionProbe` for syntax that many heads hold together.

The release has the surface patterns, the parsers, the distances and the probes. Coreference and the gradients are
reconstructed from the paper's text. The release's exception for possessives (the clitic's prediction counts for the
word before it) belongs to one treebank and is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.lens.parts.parsed_sentence import ParsedSentence

#: A document's attention between words `(L, H, W, W)`, the head words of its mentions in order, and their entities.
Mentions = tuple[Tensor, Sequence[int], Sequence[int]]


def surface_report(
    attention: Iterable[Float[Tensor, "l h t t"]],
    tokens: Iterable[Sequence[str]],
    *,
    first: str = "[CLS]",
    separator: str = "[SEP]",
    punctuation: Sequence[str] = (".", ","),
) -> dict[str, Float[Tensor, "l h"]]:
    """Return how much of its attention each head puts on a kind of token, and how broadly it attends.

    A text counts once. The attention to "self", "previous", "next", "first", "separator" and "punctuation" is the mean
    over all tokens; "separator_to_separator" and "other_to_separator" are means over some. "entropy" is a row's mean
    in nats, "entropy_first" that of the first token alone, and "entropy_uniform" the value of uniform attention.

    Args:
        attention: a map for each text.
        tokens: the tokens of each text.
        first, separator, punctuation: the model's special tokens, and the tokens that count as punctuation.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for maps, text in zip(attention, tokens, strict=True):
        _check(maps, len(text))
        kinds = _kinds(text, first, separator, punctuation, maps.device)
        for offset, name in ((0, "self"), (-1, "previous"), (1, "next")):
            found[name].append(maps.diagonal(offset, -2, -1).sum(-1) / len(text))
        for name in ("first", "separator", "punctuation"):
            found[name].append(maps[..., kinds[name]].sum(-1).mean(-1))
        on_separator = maps[..., kinds["separator"]].sum(-1)
        for name, rows in (("separator", kinds["separator"]), ("other", ~kinds["separator"])):
            if rows.any():
                found[f"{name}_to_separator"].append(on_separator[..., rows].mean(-1))
        entropy = torch.special.entr(maps).sum(-1)
        found["entropy"].append(entropy.mean(-1))
        found["entropy_first"].append(entropy[..., 0])
        found["entropy_uniform"].append(torch.full_like(entropy[..., 0], len(text)).log())
    return _means(found)


def gradient_report(
    gradients: Iterable[Float[Tensor, "l h t t"]],
    tokens: Iterable[Sequence[str]],
    *,
    first: str = "[CLS]",
    separator: str = "[SEP]",
    punctuation: Sequence[str] = (".", ","),
) -> dict[str, Float[Tensor, "l h"]]:
    """Return the mean size of a weight's gradient for keys of each kind: how much attention to them matters.

    Kinds are "first", "separator", "punctuation" and "other". Heads that put much weight on a token with small
    gradients do nothing there.

    Args:
        gradients: the gradients of each text's weights; see `weight_gradients`.
        tokens, first, separator, punctuation: see `surface_report`.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for slopes, text in zip(gradients, tokens, strict=True):
        _check(slopes, len(text))
        for name, keys in _kinds(text, first, separator, punctuation, slopes.device).items():
            if keys.any():
                found[name].append(slopes.abs()[..., keys].mean((-2, -1)))
    return _means(found)


def head_relation_accuracy(sentences: Iterable[ParsedSentence]) -> dict[str, Float[Tensor, "2 l h"]]:
    """Return how often each head's largest weight finds a word's syntactic head, by relation and for "all" words.

    Index 0 is attention from the dependent to its head, index 1 from the head to its dependent. A word's own weight
    and those of the special tokens do not count. No head can find a root, which counts as a miss.
    """
    hits: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    for sentence in sentences:
        both = torch.stack([sentence.attention, sentence.attention.mT])
        words = both.diagonal_scatter(torch.full_like(both[..., 0], -1.0), 0, -2, -1)[..., 1:-1, 1:-1]
        right = words.argmax(-1) + 1 == torch.tensor(list(sentence.heads), device=words.device)
        for at, relation in enumerate(sentence.relations):
            for name in ("all", relation):
                hits[name] = hits.get(name, 0) + right[..., at].double()
                counts[name] += 1
    return {name: total / counts[name] for name, total in hits.items()}


def offset_accuracy(
    sentences: Iterable[ParsedSentence], offsets: Iterable[int] = range(-5, 6)
) -> dict[str, dict[int, float]]:
    """Return how often the word at a fixed offset is a word's syntactic head, by relation: the baseline of heads.

    An offset that leaves the sentence gives its last word, or the root. Offset 1 for "all" is the right-branching
    baseline.
    """
    offsets = tuple(offsets)
    hits: dict[str, dict[int, int]] = {}
    counts: dict[str, int] = defaultdict(int)
    for sentence in sentences:
        n = len(sentence.heads)
        for at, (head, relation) in enumerate(zip(sentence.heads, sentence.relations, strict=True), 1):
            for name in ("all", relation):
                row = hits.setdefault(name, dict.fromkeys(offsets, 0))
                counts[name] += 1
                for offset in offsets:
                    row[offset] += min(max(at + offset, 0), n) == head
    return {name: {offset: hit / counts[name] for offset, hit in row.items()} for name, row in hits.items()}


def relation_table(
    sentences: Sequence[ParsedSentence], offsets: Iterable[int] = range(-5, 6), least: int = 1
) -> list[dict[str, Any]]:
    """Return a row for each relation, the most frequent first: its best head beside the best fixed offset.

    Args:
        sentences: parsed sentences.
        offsets: see `offset_accuracy`.
        least: the number of words that a relation must have.
    """
    accuracy, baseline = head_relation_accuracy(sentences), offset_accuracy(sentences, offsets)
    counts: dict[str, int] = defaultdict(int)
    for sentence in sentences:
        for relation in sentence.relations:
            counts[relation] += 1
            counts["all"] += 1
    rows = []
    for name in sorted(counts, key=lambda name: -counts[name]):
        if counts[name] < least:
            continue
        found = accuracy[name]
        direction, layer, head = (int(i) for i in torch.unravel_index(found.argmax(), found.shape))
        offset = max(baseline[name], key=lambda each: baseline[name][each])
        rows.append({
            "relation": name, "count": counts[name], "layer": layer, "head": head,
            "direction": ("dependent to head", "head to dependent")[direction],
            "accuracy": float(found.max()), "offset": offset, "baseline": baseline[name][offset],
        })  # fmt: skip
    return rows


def coreference_accuracy(documents: Iterable[Mentions]) -> tuple[Float[Tensor, "l h"], float]:
    """Return how often each head finds an antecedent, and how often the nearest earlier mention is one.

    Of the head words of all earlier mentions, the one with the largest weight has to belong to the same entity.
    Mentions without an antecedent are left out.

    Args:
        documents: for each its attention between words, its mentions' head words in order, and their entities.
    """
    hits: Tensor | None = None
    nearest = count = 0
    for attention, mentions, entities in documents:
        if len(mentions) != len(entities) or list(mentions) != sorted(mentions):
            raise OptionError("documents: mentions must be in order, each with an entity")
        for at, (word, entity) in enumerate(zip(mentions, entities, strict=True)):
            same = torch.tensor([other == entity for other in entities[:at]], device=attention.device)
            if at and same.any():
                best = attention[..., word, list(mentions[:at])].argmax(-1)
                right = same[best].double()
                hits = right if hits is None else hits + right
                nearest, count = nearest + bool(same[-1]), count + 1
    if hits is None:
        raise OptionError("documents must hold a mention with an antecedent; got none")
    return hits / count, nearest / count


def _kinds(
    text: Sequence[str], first: str, separator: str, punctuation: Sequence[str], device: torch.device
) -> dict[str, Bool[Tensor, " t"]]:
    named = {"first": (first,), "separator": (separator,), "punctuation": tuple(punctuation)}
    kinds = {name: torch.tensor([token in group for token in text], device=device) for name, group in named.items()}
    return kinds | {"other": ~torch.stack(list(kinds.values())).any(0)}


def _means(found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    if not found:
        raise OptionError("attention must hold at least one map; got none")
    return {name: torch.stack(parts).mean(0) for name, parts in found.items()}


def _check(maps: Tensor, t: int) -> None:
    if maps.ndim != 4 or tuple(maps.shape[-2:]) != (t, t):
        raise ShapeError(f"attention must hold maps (L, H, {t}, {t}) for {t} tokens; got {tuple(maps.shape)}")
