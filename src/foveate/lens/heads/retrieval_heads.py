"""Retrieval scores: how often a head looks at the very token that the model then copies.

Retrieval Head Mechanistically Explains Long-Context Factuality (2024), arXiv 2404.15574.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Host, Method, apply
from foveate.host.hf.layout import layout
from foveate.host.probing import Progress, logits_of
from foveate.host.site import Site

_ROWS = 64


def retrieval_scores(
    host: Host, data: Iterable[tuple[Tensor, Tensor]], *, items: int = 20, progress: Progress | None = None
) -> Float[Tensor, "l hq"]:
    """Return each query head's retrieval score, `(layers, heads)` in 0..1.

    An answer that stands earlier in its text is copied. Of the answer's tokens that the model predicts, the score is
    the share at which the head's largest weight is on the same token of the copy. The text is read with its answer; the
    paper lets the model generate it. Tokens that the model gets wrong do not count.

    Args:
        host: a decoder.
        data: `(ids (B, N), answers (B, N) bool)`; answers that stand nowhere before in the text are left out.
        items: number of items that are read.
        progress: called as `progress(step, steps, note)`.

    Raises:
        OptionError: the model predicts none of the answers' tokens.
    """
    validate.count("items", items, 1)
    if host.config.is_encoder_decoder:
        raise UnsupportedModel(f"{type(host.model).__name__} reads its answers behind an encoder")
    found, count = layout(host), 0
    hits = torch.zeros(len(found), found.heads)
    for step, (ids, answers) in enumerate(islice(data, items)):
        for row, real in zip(ids, answers, strict=True):
            queries, keys = copies(row, real)
            if queries.numel():
                probe = _Looks(queries, keys)
                with torch.no_grad(), apply(host.model, probe, on="decoder"):
                    logits = host.model(input_ids=row[None].to(host.model.device), use_cache=False).logits
                right = logits[0, queries.to(logits.device)].argmax(-1).cpu() == row[queries + 1].cpu()
                count += int(right.sum())
                for place, layer in enumerate(found.layers):
                    if layer.layer in probe.found:
                        hits[place, : layer.heads] += probe.found[layer.layer][:, right].sum(-1)
        if progress is not None:
            progress(step + 1, items, f"{count} tokens copied")
    if not count:
        raise OptionError(
            f"{type(host.model).__name__} predicts none of the answers that stand earlier in its texts, so that no "
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
