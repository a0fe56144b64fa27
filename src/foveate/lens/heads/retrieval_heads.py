"""Retrieval heads: the heads that look at the very token that the model then copies from its prompt.

Retrieval Head Mechanistically Explains Long-Context Factuality (2024), arXiv 2404.15574. A head scores when, while the
model writes the answer, its largest weight is on a token of the needle and that token is what the model writes next.

The paper counts the set of copied tokens, the authors' release every hit: see `distinct`. The release finds the needle
by the share of token numbers that two sets have in common, which a permuted needle passes; here tokens have to match in
their order (`needle_span`). The 50 new tokens, the bound 0.1 of a retrieval head, and the success of a run at a recall
of more than half of the needle's words are the paper's; words are tokens here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host.entry import apply
from foveate.host.hf.layout import layout
from foveate.host.hf.model import Host, host
from foveate.host.hf.words import end_tokens
from foveate.host.method import Method
from foveate.host.probing import Progress, logits_of
from foveate.host.site import Site
from foveate.host.slots.slots import EMPTY
from foveate.host.weight_tiles import weight_tile

_ROWS = 64


@final
@dataclass(frozen=True, eq=False)
class NeedleCase:
    """A prompt with a needle, which the model is to repeat.

    Args:
        ids: `(N,)` tokens of the prompt.
        start, stop: the place of the needle in the prompt; see `needle_span`.
    """

    ids: Int[Tensor, " n"]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.ids.ndim != 1:
            raise ShapeError(f"ids must be (N,), the tokens of one prompt; got {tuple(self.ids.shape)}")
        if not 0 <= self.start < self.stop <= len(self.ids):
            raise OptionError(f"start={self.start}, stop={self.stop} must be a span of {len(self.ids)} tokens")


def retrieval_scores(
    model: object, cases: Iterable[NeedleCase], *, top: int = 1, new: int = 50, success: float = 0.5,
    distinct: bool = False, progress: Progress | None = None,
) -> Float[Tensor, "l h"]:  # fmt: skip
    """Return each query head's retrieval score, `(layers, heads)` in 0..1 for needles that are written once.

    The model reads a prompt and writes greedily. A head gets `1 / len(needle)` for each token that is written while one
    of the head's `top` largest weights is on the same token in the needle. The scores of the runs that succeed are
    averaged.

    Args:
        model: a decoder.
        cases: prompts with needles; the paper takes 600, of 1k to 50k tokens.
        top: the number of keys that count as looked at.
        new: the largest number of tokens to write; writing ends at the model's end-of-sequence token.
        success: the share of the needle's tokens that the text must contain for a run to count.
        distinct: True counts each token of the vocabulary once in a run, as the paper defines the score; False counts
            every hit, as the release does.
        progress: called as `progress(step, steps, note)`.

    Raises:
        OptionError: no run succeeds.
    """
    validate.count("top", top, 1)
    validate.count("new", new, 1)
    validate.between("success", success, 0.0, 1.0)
    found = _decoder(host(model))
    held, scores = list(cases), list[Tensor]()
    for step, case in enumerate(held):
        watch = _Hits(case, top)
        written = _written(found, case.ids, new, watch)
        if _recall(written, case) > success:
            scores.append(watch.scores(written, layout(found).heads, len(layout(found)), distinct))
        if progress is not None:
            progress(step + 1, len(held), f"{len(scores)} runs that repeat the needle")
    if not scores:
        raise OptionError(
            f"{type(found.model).__name__} repeats none of the {len(held)} needles, so that no head retrieves"
        )
    return torch.stack(scores).mean(0)


def needle_span(prompt: Int[Tensor, " n"], needle: Int[Tensor, " m"], match: float = 0.9) -> tuple[int, int]:
    """Return the first place in a prompt at which at least a share of a needle's tokens stands, each in its order.

    Tokenisers join the needle's first and last letters with the text around it, so that a few tokens may differ.
    """
    windows = prompt.unfold(0, min(len(needle), len(prompt)), 1)
    equal = (windows == needle[: windows.shape[1]]).double().mean(-1)
    places = (equal >= match).nonzero()[:, 0]
    if not len(needle) or len(needle) > len(prompt) or not len(places):
        raise OptionError(f"needle: no place of the prompt holds {match:.0%} of its {len(needle)} tokens in order")
    best = int(places[0])
    return best, best + len(needle)


class _Hits(Method):
    """A method that records, at each decoding step, the prompt tokens that each head looks at most."""

    def __init__(self, case: NeedleCase, top: int) -> None:
        self.case, self.top = case, top
        self.looked: dict[int, list[Int[Tensor, "hq t"]]] = {}

    def at(self, site: Site) -> bool:
        return not site.crosses and (site.is_causal or site.q.shape[2] == 1)

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "decode":
            weights = weight_tile(site, slice(0, 1)).weights[0, :, 0]
            places = site.positions[0].repeat_interleave(len(weights) // site.positions.shape[1], 0)
            best = weights.topk(min(self.top, weights.shape[-1]), dim=-1)
            found = places.gather(-1, best.indices).masked_fill(best.values <= 0.0, EMPTY)
            self.looked.setdefault(site.layer, []).append(found.cpu())

    def scores(self, written: list[int], heads: int, layers: int, distinct: bool) -> Float[Tensor, "l h"]:
        """Return the scores of one run, given the tokens that followed each step."""
        case, found = self.case, torch.zeros(layers, heads)
        ids = case.ids.cpu()
        for row, layer in enumerate(sorted(self.looked)):
            counted = [Counter[int]() for _ in range(heads)]
            for looked, token in zip(self.looked[layer], written, strict=False):
                inside = (looked >= case.start) & (looked < case.stop)
                hits = (inside & (ids[looked.clamp(0, len(ids) - 1)] == token)).any(-1)
                for head in hits.nonzero()[:, 0].tolist():
                    counted[head][token] += 1
            each = [len(some) if distinct else some.total() for some in counted]
            found[row] = torch.tensor(each) / (case.stop - case.start)
        return found


@torch.no_grad()
def _written(found: Host, ids: Int[Tensor, " n"], new: int, watch: Method) -> list[int]:
    """Read a prompt up to its last token, write greedily from there, and return the tokens."""
    model, ends, written = found.model, end_tokens(found.model), list[int]()
    ids, cache = ids.to(model.device)[None], DynamicCache(config=found.config)
    if ids.shape[1] > 1:
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    token = ids[:, -1:]
    with apply(model, watch, on="decoder"):
        for _ in range(new):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            written.append(int(token))
            if written[-1] in ends:
                break
    return written


def _recall(written: list[int], case: NeedleCase) -> float:
    """Return the share of the needle's tokens that a text has, each counted as often as the needle has it."""
    needle = Counter(case.ids[case.start : case.stop].tolist())
    return (needle & Counter(written)).total() / needle.total()


def _decoder(found: Host) -> Host:
    if found.config.is_encoder_decoder:
        raise UnsupportedModel(f"{type(found.model).__name__} reads its answers behind an encoder")
    if not found.model.can_generate():
        raise UnsupportedModel(f"{type(found.model).__name__} writes no text; give a decoder with its language head")
    return found


# -- the same from texts with their answers, in one pass each ----------------------------------------------------------


def copying_scores(
    model: object, data: Iterable[tuple[Tensor, Tensor]], *, items: int = 20, progress: Progress | None = None
) -> Float[Tensor, "l hq"]:
    """Return each query head's share of copied tokens that it looks at, `(layers, heads)` in 0..1, in one pass a text.

    An answer that stands earlier in its text is copied. Of the answer's tokens that the model predicts, the score is
    the share at which the head's largest weight is on the same token of the copy. The text is read with its answer,
    where `retrieval_scores` lets the model write it. Tokens that the model gets wrong do not count.

    Args:
        model: a decoder.
        data: `(ids (B, N), answers (B, N) bool)`; answers that stand nowhere before in the text are left out.
        items: number of items that are read.
        progress: called as `progress(step, steps, note)`.

    Raises:
        OptionError: the model predicts none of the answers' tokens.
    """
    validate.count("items", items, 1)
    here = _decoder(host(model))
    found, count = layout(here), 0
    hits = torch.zeros(len(found), found.heads)
    for step, (ids, answers) in enumerate(islice(data, items)):
        for row, real in zip(ids, answers, strict=True):
            queries, keys = copies(row, real)
            if queries.numel():
                probe = _Looks(queries, keys)
                with torch.no_grad(), apply(here.model, probe, on="decoder"):
                    logits = here.model(input_ids=row[None].to(here.model.device), use_cache=False).logits
                right = logits[0, queries.to(logits.device)].argmax(-1).cpu() == row[queries + 1].cpu()
                count += int(right.sum())
                for place, layer in enumerate(found.layers):
                    if layer.layer in probe.found:
                        hits[place, : layer.heads] += probe.found[layer.layer][:, right].sum(-1)
        if progress is not None:
            progress(step + 1, items, f"{count} tokens copied")
    if not count:
        raise OptionError(
            f"{type(here.model).__name__} predicts none of the answers that stand earlier in its texts, so that no "
            f"head retrieves"
        )
    return hits / count


def copies(ids: Int[Tensor, " n"], answers: Bool[Tensor, " n"]) -> tuple[Int[Tensor, " c"], Int[Tensor, " c"]]:
    """Return the queries that predict a copied token, and the position of that token in the earlier copy.

    Each run of answer tokens is looked for as a whole; its last occurrence before the run counts.
    """
    words, places = ids.tolist(), answers.nonzero()[:, 0].tolist()
    queries, keys = list[int](), list[int]()
    for begin in [place for place in places if place - 1 not in places and place > 0]:
        end = next(place for place in range(begin, len(words) + 1) if place == len(words) or place not in places)
        run = words[begin:end]
        earlier = [at for at in range(begin - len(run) + 1) if words[at : at + len(run)] == run]
        if earlier:
            queries += range(begin - 1, end - 1)
            keys += range(earlier[-1], earlier[-1] + len(run))
    return torch.tensor(queries, dtype=torch.long), torch.tensor(keys, dtype=torch.long)


class _Looks(Method):
    """A method that records, for some queries, whether each head's largest weight is on a given key."""

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = queries, keys
        self.found: dict[int, Bool[Tensor, "hq c"]] = {}

    def at(self, site: Site) -> bool:
        return site.is_causal

    def read(self, site: Site, out: Tensor) -> None:
        parts = []
        for queries, keys in zip(self.queries.split(_ROWS), self.keys.split(_ROWS), strict=True):
            best = logits_of(site, queries.to(site.q.device))[0].argmax(-1)
            parts.append((best.cpu() == keys) & (best.cpu() <= queries))
        self.found[site.layer] = torch.cat(parts, 1)
