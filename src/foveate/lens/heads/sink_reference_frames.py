"""Reference frames: the tokens that a model's attention is anchored to, and the kind of frame that they make.

What are you sinking? A geometric approach on attention sink (2025), arXiv 2508.02546. Attention sinks are the anchors
of a coordinate system. One anchor at the start is a *centralised* frame, several weaker ones a *distributed* one, and
anchors at both ends a *bidirectional* one. The paper finds that the kind follows from the position encoding, and that
frames appear early in training.

    report = reference_frame(attention_maps(model, ids)[0])       # of one text's maps
    report.kind, report.hubs, report.centralisation
    model_frame(model, texts).shares                              # {"centralised": 0.9, ...} over many texts

PARTLY RECONSTRUCTED. There is no release, and only the paper's abstract, its opening and records of its review were at
hand. They name the statistics: sinks at thresholds, Betti numbers, degree centralisation, the Fiedler value, value
space, divergence, Fisher information and random-matrix theory. All thresholds and the decision rule are ours: `tau`,
`theta`, `join` and `FrameRule` replace them. `frame_geometry` has the geometry. Fisher information and random-matrix
theory are left out, since their objects are unknown.

The paper's texts have 6 to 50 tokens, for which the defaults are meant. Maps take O(N²) memory for each head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.lens.parts.attention_graph import GraphStatistics, Join, attention_graph, graph_statistics
from foveate.lens.parts.maps import attention_maps
from foveate.lens.parts.stack import Part

#: Kinds of frames. "other" has hubs that make none of the paper's three, "none" has no hub.
Kind = Literal["centralised", "distributed", "bidirectional", "other", "none"]


@final
@dataclass(frozen=True)
class FrameRule:
    """The rule that finds hubs and names their frame.

    A hub is a token that others attend to: its mass is near the largest, and clearly above that of uniform attention.

    Args:
        share: the least mass of a hub, as a share of the largest mass.
        lift: the least mass of a hub, as a multiple of what uniform attention would give it.
        seen: the least share of the other tokens that see a hub; the last tokens of a causal text are seen by few.
        several: the least number of hubs of a distributed frame.
    """

    share: float = 0.5
    lift: float = 2.0
    seen: float = 0.5
    several: int = 3

    def __post_init__(self) -> None:
        validate.between("share", self.share, 0.0, 1.0)
        validate.at_least("lift", self.lift, 0.0)
        validate.between("seen", self.seen, 0.0, 1.0)
        validate.count("several", self.several, 1)

    def hubs(self, mass: Float[Tensor, " t"], sees: Bool[Tensor, "t t"]) -> tuple[int, ...]:
        """Return the hubs of a text, given each token's mass and which queries see which keys."""
        others = sees & ~torch.eye(len(mass), dtype=torch.bool, device=mass.device)
        counts = others.sum(0)
        even = _mean_mass(sees.to(mass) / sees.sum(-1, keepdim=True), others)
        is_seen = counts >= max(1.0, self.seen * (len(mass) - 1))
        largest = mass.masked_fill(~is_seen, 0.0).max()
        near, above = mass >= self.share * largest, mass >= self.lift * even
        return tuple((is_seen & near & above).nonzero()[:, 0].tolist())

    def kind(self, hubs: tuple[int, ...], tokens: int) -> Kind:
        """Return the kind of the frame that some hubs of a text make."""
        if not hubs:
            return "none"
        if len(hubs) >= self.several:
            return "distributed"
        if hubs == (0,):
            return "centralised"
        return "bidirectional" if hubs == (0, tokens - 1) else "other"


#: The rule by default.
RULE = FrameRule()


@final
@dataclass(frozen=True, eq=False)
class LayerFrame:
    """The frame of one layer.

    Args:
        kind, hubs: of the mean mass over its heads.
        concentration: the largest mass of a head's tokens, averaged over heads like all that follow.
        sinks: the number of tokens whose mass is above `tau`.
        centralisation, betti0, betti1, fiedler: see `GraphStatistics`.
    """

    kind: Kind
    hubs: tuple[int, ...]
    concentration: float
    sinks: float
    centralisation: float
    betti0: float
    betti1: float
    fiedler: float


@final
@dataclass(frozen=True, eq=False)
class FrameReport:
    """The reference frame of one text.

    Args:
        kind: the kind of the frame, from the mean mass over layers and heads.
        hubs: the tokens that it is anchored to.
        mass: the mean weight that each token gets from the other tokens that see it.
        sinks: the tokens of each head whose mass is above `tau`.
        graphs: the statistics of each head's graph.
        per_layer: the frame of each layer.
    """

    kind: Kind
    hubs: tuple[int, ...]
    mass: Float[Tensor, "l h t"]
    sinks: Bool[Tensor, "l h t"]
    graphs: GraphStatistics
    per_layer: tuple[LayerFrame, ...] = field(repr=False)

    @property
    def concentration(self) -> float:
        """The largest mass of a head's tokens, averaged over heads."""
        return float(self.mass.amax(-1).mean())

    @property
    def centralisation(self) -> float:
        """The degree centralisation, averaged over heads."""
        return float(self.graphs.centralisation.mean())

    @property
    def betti0(self) -> float:
        """The number of components, averaged over heads."""
        return float(self.graphs.components.double().mean())

    @property
    def betti1(self) -> float:
        """The number of independent cycles, averaged over heads."""
        return float(self.graphs.cycles.double().mean())

    @property
    def fiedler(self) -> float:
        """The Fiedler value, averaged over heads."""
        return float(self.graphs.fiedler.mean())


def anchor_mass(attention: Float[Tensor, "*g t t"], sees: Bool[Tensor, "t t"]) -> Float[Tensor, "*g t"]:
    """Return the mean weight that each token gets from the other tokens that see it; 0 if none does.

    A token's weight on itself is left out: it anchors nothing else, and is all that a diagonal map has.
    """
    others = sees & ~torch.eye(attention.shape[-1], dtype=torch.bool, device=attention.device)
    return _mean_mass(attention, others)


def reference_frame(
    attn: Float[Tensor, "l h t t"], tau: float = 0.3, *, theta: float = 0.02, join: Join = "max",
    rule: FrameRule = RULE, sees: Bool[Tensor, "t t"] | None = None,
) -> FrameReport:  # fmt: skip
    """Return the reference frame that a text's attention maps show.

    Args:
        attn: the weights of all layers and heads for one text, without padding; see `attention_maps`.
        tau: the mass above which a token is a sink of a head. A sweep is `report.mass > tau`.
        theta: the weight above which a pair of tokens is an edge of a head's graph. The default is uniform attention to
            50 tokens; for a sweep see `attention_graph`.
        join: makes one weight of both directions of a pair.
        rule: finds hubs and names their frame.
        sees: the keys that each query may see. None is causal if all weights on later tokens are 0, else all keys.
    """
    validate.between("tau", tau, 0.0, 1.0)
    if not isinstance(attn, Tensor) or attn.ndim != 4 or attn.shape[2] != attn.shape[3] or attn.shape[2] < 3:
        raise ShapeError(f"attn must be weights (L, H, T, T) of one text with T >= 3; got {shown(attn)}")
    attn, t = attn.detach().double(), attn.shape[3]
    visible = _sees(attn) if sees is None else sees.to(attn.device)
    if visible.shape != (t, t) or visible.dtype != torch.bool or not bool(visible.any(1).all()):
        raise ShapeError(f"sees must be bool (T, T)={(t, t)}, with a key for each query; got {shown(sees)}")
    mass = anchor_mass(attn, visible)
    graphs = graph_statistics(attention_graph(attn, theta, join))
    hubs, sinks = rule.hubs(mass.mean((0, 1)), visible), mass > tau
    layers = tuple(_layer(mass[i], sinks[i], graphs, i, rule, visible) for i in range(len(attn)))
    return FrameReport(rule.kind(hubs, t), hubs, mass, sinks, graphs, layers)


@final
@dataclass(frozen=True, eq=False)
class ModelFrame:
    """The reference frames of a model on some texts.

    Args:
        reports: the frame of each text, in their order.
    """

    reports: tuple[FrameReport, ...]

    @property
    def shares(self) -> dict[Kind, float]:
        """The share of the texts that have a frame of each kind, the most frequent kind first."""
        counts = Counter(report.kind for report in self.reports)
        return {kind: count / len(self.reports) for kind, count in counts.most_common()}

    @property
    def kind(self) -> Kind:
        """The most frequent kind."""
        return next(iter(self.shares))


def model_frame(
    model: object, texts: Iterable[Tensor | Mapping[str, Any]], tau: float = 0.3, *, theta: float = 0.02,
    join: Join = "max", rule: FrameRule = RULE, part: Part = "auto",
) -> ModelFrame:  # fmt: skip
    """Read texts once each, beside the model's own kernel, and return their reference frames.

    Args:
        model: a decoder, an encoder (of text or images), or a `part` of both.
        texts: batches of inputs: token ids `(B, T)` without padding, or a tokenizer's mapping, whose padding is left
            out. The paper takes 500 sentences.
        tau, theta, join, rule: see `reference_frame`.
        part: "auto", "encoder" or "decoder"; see `foveate.lens.Lens`.
    """
    validate.one_of("part", part, ("auto", "encoder", "decoder"))
    reports = list[FrameReport]()
    for inputs in texts:
        for maps in _each(attention_maps(model, inputs, part=part), inputs, part):
            reports.append(reference_frame(maps, tau, theta=theta, join=join, rule=rule))
    if not reports:
        raise OptionError("texts must hold at least one text; got none")
    return ModelFrame(tuple(reports))


def _each(maps: Float[Tensor, "b l h t t"], inputs: object, part: Part) -> Iterator[Float[Tensor, "l h u u"]]:
    """Yield the maps of each text, without its padding."""
    name = "decoder_attention_mask" if part == "decoder" else "attention_mask"
    mask = inputs.get(name) if isinstance(inputs, Mapping) else None
    for row, each in enumerate(maps):
        if mask is None:
            yield each
        else:
            real = mask[row].bool().to(each.device)
            yield each[..., real, :][..., real]


def _layer(
    mass: Tensor, sinks: Tensor, graphs: GraphStatistics, layer: int, rule: FrameRule, sees: Tensor
) -> LayerFrame:
    hubs = rule.hubs(mass.mean(0), sees)
    each = (graphs.centralisation, graphs.components, graphs.cycles, graphs.fiedler)
    means = (x[layer].double().mean() for x in each)
    numbers = (mass.amax(-1).mean(), sinks.sum(-1).double().mean(), *means)
    return LayerFrame(rule.kind(hubs, mass.shape[-1]), hubs, *map(float, numbers))


def _sees(attention: Float[Tensor, "l h t t"]) -> Bool[Tensor, "t t"]:
    every = torch.ones(attention.shape[-2:], dtype=torch.bool, device=attention.device)
    return every if bool(attention.triu(1).any()) else every.tril()


def _mean_mass(attention: Float[Tensor, "*g t t"], others: Bool[Tensor, "t t"]) -> Float[Tensor, "*g t"]:
    return (attention * others).sum(-2) / others.sum(0).clamp_min(1)
