"""Roles of heads: what each head of a decoder does, with a score, a threshold and where the threshold comes from.

    for role in foveate.lens.roles(model, ids, delimiters=ids_of(".,\\n")):
        print(role.layer, role.head, role.name, role.score, role.threshold, role.reason)

Two probes, each one pass with the model's own kernel and in linear memory: random tokens that come twice, where the
previous token, an earlier copy and the token behind it lie at fixed offsets (as in In-context Learning and Induction
Heads, 2022, arXiv 2209.11895), and a text, for sinks, local, delimiter, broad and redundant heads. Retrieval heads come
from `retrieval_scores` or `copying_scores`, which need texts with answers.

A role holds if the score is at least the threshold. By default that is half of a head's weight, so that a head has at
most one of the roles that share out its weight between disjoint keys. What uniform attention would give is in the
reason. Retrieval has its paper's bound, 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel, unknown
from foveate.host.hf.model import Host, host
from foveate.lens.lens import look
from foveate.lens.measures import Entropy, Measure, SinkMass
from foveate.lens.position_measures import AtOffset, WindowMass

#: Thresholds by role, each a share: of a head's weight, of uniform attention's entropy, or of two heads' common weight.
THRESHOLDS: Mapping[str, float] = {
    "previous token": 0.5, "induction": 0.5, "duplicate": 0.5, "sink": 0.5, "local": 0.5, "delimiter": 0.5,
    "broad": 0.9, "redundant": 0.9, "retrieval": 0.1,
}  # fmt: skip
_QUERIES = 24  # queries whose whole rows are compared between heads


@final
@dataclass(frozen=True)
class Role:
    """A role that a head has.

    Args:
        layer, head: the head.
        name: the role, one of `THRESHOLDS`.
        score: the head's score, a share in 0..1.
        threshold: the least score of the role.
        reason: what was measured, and what uniform attention would give.
    """

    layer: int
    head: int
    name: str
    score: float
    threshold: float
    reason: str


def roles(
    model: object, ids: Int[Tensor, "1 n"] | None = None, *, delimiters: Iterable[int] = (),
    retrieval: Float[Tensor, "l h"] | None = None, thresholds: Mapping[str, float] | None = None, repeat: int = 64,
    begin: Sequence[int] | None = None, vocabulary: Iterable[int] | None = None, window: int = 4, seed: int = 0,
) -> list[Role]:  # fmt: skip
    """Name the heads of a decoder that have a role.

    Args:
        model: a decoder.
        ids: a text `(1, N)` for the roles that need one; None names only those of repeated tokens, and retrieval.
        delimiters: tokens such as commas and line ends; the first token does not count as one.
        retrieval: scores `(layers, heads)` from `retrieval_scores`.
        thresholds: other thresholds, by role; see `THRESHOLDS`.
        repeat: number of random tokens, which come twice.
        begin: tokens before them; None for the model's beginning-of-sequence token, if it has one.
        vocabulary: the tokens to draw from; None for all.
        window: the largest distance of a local head's keys.
        seed: of the random tokens.
    """
    found, bounds = _decoder(host(model)), _thresholds(thresholds)
    validate.count("repeat", repeat, 2)
    if ids is not None and (ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 8):
        raise ShapeError(f"ids must be (1, N), one text of at least 8 tokens; got {tuple(ids.shape)}")
    scores = _repeated(found, repeat, begin, vocabulary, seed)
    if ids is not None:
        scores |= _of_text(found, ids, set(delimiters), window)
    if retrieval is not None:
        note = "share of the needle's tokens that the head looks at while they are written; the bound is the paper's"
        scores["retrieval"] = (retrieval, note)
    named = []
    for name, (table, note) in scores.items():
        for layer, head in (table >= bounds[name]).nonzero().tolist():
            named.append(Role(layer, head, name, float(table[layer, head]), bounds[name], note))
    return sorted(named, key=lambda role: (role.layer, role.head, -role.score))


Scores = dict[str, tuple[Float[Tensor, "l h"], str]]


def _repeated(
    found: Host, size: int, begin: Sequence[int] | None, vocabulary: Iterable[int] | None, seed: int
) -> Scores:
    """Measure the heads on random tokens that come twice, over the queries of the second time."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.tensor(sorted(range(found.config.vocab_size) if vocabulary is None else vocabulary))
    tokens = words[torch.randperm(len(words), generator=draw)[:size]]
    if len(tokens) < size:
        raise OptionError(f"repeat={size} must be at most the number of tokens to draw from, {len(tokens)}")
    own = found.config.bos_token_id
    first = torch.tensor([own] if begin is None and isinstance(own, int) else list(begin or ()), dtype=torch.long)
    ids = torch.cat([first, tokens, tokens])[None]
    offsets = {"previous token": 1, "induction": size - 1, "duplicate": size}
    measures = {name: AtOffset(offset) for name, offset in offsets.items()}
    seen = _measured(found, ids, list(measures.values()))
    second = slice(len(first) + size, len(first) + 2 * size - 1)  # of the last token nothing comes after
    even = (1.0 / torch.arange(1, ids.shape[1] + 1))[second].mean().item()
    notes = {
        "previous token": "mean weight on the token before",
        "induction": "mean weight on the token after the earlier copy",
        "duplicate": "mean weight on the earlier copy",
    }
    return {
        name: (
            _table(found, {layer: value[..., second].mean(-1)[0] for layer, value in seen.values(measure).items()}),
            f"{notes[name]}, over {size - 1} random tokens that come a second time; uniform attention gives {even:.3f}",
        )
        for name, measure in measures.items()
    }


def _of_text(found: Host, ids: Int[Tensor, "1 n"], delimiters: set[int], window: int) -> Scores:
    """Measure the heads on a text."""
    n, later = ids.shape[1], slice(ids.shape[1] // 4, None)  # early queries have few keys to choose from
    near, marks = WindowMass(window), [at for at, token in enumerate(ids[0].tolist()) if token in delimiters and at]
    measures: list[Measure] = [Entropy(), SinkMass(), near]
    if marks:
        measures.append(SinkMass(positions=tuple(marks)))
    counts = torch.arange(1, n + 1).double()[later]
    queries = torch.linspace(n // 4, n - 1, min(_QUERIES, n - n // 4)).long().tolist()
    scores: Scores = {}

    def add(name: str, measure: Measure, note: str, even: float) -> None:
        values = {layer: value[0][:, later].double().mean(-1) for layer, value in seen.values(measure).items()}
        scores[name] = (_table(found, values), f"{note}; uniform attention gives {even:.3f}")

    seen = _measured(found, ids, measures[:3])
    add("sink", measures[1], "mean weight on the first token", float((1 / counts).mean()))
    add(
        "local",
        near,
        f"mean weight on the last {window + 1} tokens",
        float(((window + 1) / counts).clamp_max(1).mean()),
    )
    entropy = {
        layer: (value[0][:, later].double() / counts.log()).mean(-1) for layer, value in seen.values("entropy").items()
    }
    scores["broad"] = (_table(found, entropy), "mean entropy over that of uniform attention, which gives 1")
    if marks:
        seen = _measured(found, ids, measures[3:])
        before = torch.tensor([sum(at <= i for at in marks) for i in range(n)])[later]
        add("delimiter", measures[3], f"mean weight on {len(marks)} delimiters", float((before / counts).mean()))
    scores["redundant"] = (
        _common(found, ids, queries),
        f"largest common weight with another head of the layer, over {len(queries)} queries; equal rows give 1",
    )
    return scores


def _common(found: Host, ids: Int[Tensor, "1 n"], queries: list[int]) -> Float[Tensor, "l h"]:
    """Return each head's largest overlap with another head of its layer: the sum of the smaller of both weights."""
    every = {(layer, head): queries for layer in range(found.layers) for head in range(found.heads)}
    seen = look(found.model, ids, measures=(), keep_maps=every, use_cache=False)
    table = torch.zeros(found.layers, found.heads)
    for layer in set(range(found.layers)) - seen.lens.unseen.keys():
        rows = torch.stack([seen.map(layer, head)[0] for head in range(found.heads)])
        for head in range(found.heads):
            both = torch.minimum(rows[head], rows).sum(-1).mean(-1)
            both[head] = 0.0
            table[layer, head] = both.max()
    return table


def _measured(found: Host, ids: Tensor, measures: Sequence[Measure]) -> Any:
    return look(found.model, ids.to(found.model.device), measures=measures, use_cache=False)


def _table(found: Host, values: Mapping[int, Float[Tensor, " h"]]) -> Float[Tensor, "l h"]:
    table = torch.zeros(found.layers, found.heads)
    for layer, value in values.items():
        table[layer, : len(value)] = value.float().cpu()
    return table


def _thresholds(given: Mapping[str, float] | None) -> dict[str, float]:
    for name, value in (given or {}).items():
        if name not in THRESHOLDS:
            raise unknown("role", name, THRESHOLDS)
        validate.between(f"thresholds[{name!r}]", value, 0.0, math.inf)
    return {**THRESHOLDS, **(given or {})}


def _decoder(found: Host) -> Host:
    if found.config.is_encoder_decoder or found.decoder is None:
        raise UnsupportedModel(f"{type(found.model).__name__} is no decoder: roles are those of causal attention")
    return found
