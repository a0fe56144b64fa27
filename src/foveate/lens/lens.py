"""Measure a pretrained model's attention while its fused kernel runs.

    seen = foveate.look(model, input_ids)
    seen.measures()                # a table: layer, head, measure, value
    seen.values("received_mass")   # {layer: (B, heads, positions)}

`Lens` is the method behind `look`. Use it beside other methods, over many calls, or during generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, unknown
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.weight_tiles import weights_of
from foveate.lens.capture.record import Record, by_position
from foveate.lens.capture.tiles import measure_call
from foveate.lens.html_table import layer_head_tables
from foveate.lens.measures import KeyTokens, Measure
from foveate.lens.parts.stack import Layers, Part, covering
from foveate.lens.registry import named

#: Positions of the queries whose weights to keep; negative ones count from the current end of the sequence.
Queries = slice | Iterable[int]


@final
@dataclass(eq=False)
class Lens(Method):
    """A method that measures attention and changes nothing: the outputs stay bit-identical.

    If the model's own softmax ran, the measures come from two more passes of the fused kernel over its queries and
    keys, in O(N) memory; this adds twice the cost of attention. Windows, soft caps, evicted layers, selected keys and
    edited weights are measured from the weights, a few rows at a time, which is several times slower. Edits by other
    methods are included, in any order of the methods. A layer whose attention another method replaced has no weights;
    `unseen` lists it with the reason.

    Args:
        measures: names from `foveate.lens.MEASURES`, or `Measure` objects.
        layers: the layers to measure; None is all.
        keep_maps: `{(layer, head): queries}`: also keep the weights of these queries, O(queries · N) each.
        phase: measure "prefill", "decode" or "all" calls.
        part: the part of the model to measure. "auto" is its only stack of layers, or the language part beside a vision
            tower. An encoder-decoder has three: "encoder", "decoder" and "cross", the attention of the decoder to what
            was encoded. "encoder" beside a decoder needs `apply(..., on="all")`; `look` does that.

    Results cover every call under the lens: the table is a mean over all sequences; `values` and `map` show the latest
    one, which later calls on the same cache extend. With beam search, a row belongs to the beam that was at its index
    when it was computed.
    """

    measures: Sequence[str | Measure] = ("entropy", "sink_mass", "received_mass")
    layers: Iterable[int] | None = None
    keep_maps: Mapping[tuple[int, int], Queries] = field(default_factory=dict)
    phase: Literal["prefill", "decode", "all"] = "prefill"
    part: Part = "auto"
    unseen: dict[int, str] = field(default_factory=dict, init=False)
    _measures: tuple[Measure, ...] = field(init=False, repr=False)
    _latest: dict[int, Record] = field(default_factory=dict, init=False, repr=False)
    _past: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict, init=False, repr=False)
    _stack: Layers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        validate.one_of("phase", self.phase, ("prefill", "decode", "all"))
        self._stack, self._measures = Layers(self.part), tuple(named(measure) for measure in self.measures)
        names = [measure.name for measure in self._measures]
        if len(set(names)) < len(names):
            raise OptionError(f"measures={names} must have different names")
        if self.part == "cross" and (placed := [m.name for m in self._measures if m.compares_places]):
            raise OptionError(
                f'measures={placed} compare the places of a query and a key, which are in two sequences in part="cross"'
            )
        self.layers = None if self.layers is None else tuple(self.layers)
        maps = {at: queries if isinstance(queries, slice) else tuple(queries) for at, queries in self.keep_maps.items()}
        self.keep_maps = maps

    def bind(self, host: Host) -> None:
        stack = self._stack.bind(host, self)
        for layer in (*(self.layers or ()), *(layer for layer, _ in self.keep_maps)):
            if layer not in range(stack.layers):
                raise OptionError(f"layers: {layer} must be in 0..{stack.layers - 1} for this model")
        for _, head in self.keep_maps:
            if head not in range(stack.heads):
                raise OptionError(f"keep_maps: head {head} must be in 0..{stack.heads - 1} for this model")

    def at(self, site: Site) -> bool:
        layer = self._stack.number(site)
        if layer is None or self.phase not in ("all", site.phase):
            return False
        return self.layers is None or layer in self.layers or any(at[0] == layer for at in self.keep_maps)

    @torch.no_grad()
    def read(self, site: Site, out: Tensor) -> None:
        layer = self._stack.at(site)
        if site.replaced:
            self.unseen[layer] = "another method replaced this layer's attention"
            return
        record, tokens = self._record(site, layer), KeyTokens.of(site)
        if self.layers is None or layer in self.layers:
            record.add(measure_call(site, self._measures, tokens), self._measures, tokens, site.seen)
        for (at, head), queries in self.keep_maps.items():
            if at == layer:
                kept = [_map(site, rows, head, tokens) for rows in _slices(queries, site)]
                record.maps.setdefault(head, []).extend(kept)

    def _record(self, site: Site, layer: int) -> Record:
        """Return the open record of this site's sequence; a new sequence closes the layer's previous record."""
        notes = site.notes(self)
        record = notes.get("record")
        if record is None or not record.is_open or record.batch != site.q.shape[0]:
            record = notes["record"] = Record(site.q.shape[0])
            if (last := self._latest.get(layer)) is not None:
                self._close(layer, last)
            self._latest[layer] = record
        return record

    def _close(self, layer: int, record: Record) -> None:
        record.is_open = False
        past = self._past.setdefault(layer, {})
        for measure in self._measures if record.counted else ():
            past.setdefault(measure.name, []).append(record.reduced(measure))

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each layer, head and measure, with the mean over all measured sequences.

        Each sequence counts once, reduced as its measure describes. NaN if no query counted.
        """
        rows = []
        for layer, record in sorted(self._latest.items()):
            for measure in self._measures if record.counted else ():
                parts = [*self._past.get(layer, {}).get(measure.name, []), record.reduced(measure)]
                for head, value in enumerate(torch.cat(parts).nanmean(0).tolist()):
                    rows.append({"layer": layer, "head": head, "measure": measure.name, "value": value})
        return rows

    def values(self, measure: str | Measure) -> dict[int, Tensor]:
        """Return a measure of the latest sequence by layer, not reduced.

        A measure over queries is `(B, heads, queries)`, one over keys `(B, heads, positions)`; padding gives zeros.
        """
        wanted = named(measure)
        if wanted not in self._measures:
            raise unknown("measure of this lens", wanted.name, [m.name for m in self._measures])
        return {layer: record.values(wanted) for layer, record in sorted(self._latest.items()) if record.counted}

    def map(self, layer: int, head: int) -> Tensor:
        """Return the weights `(B, queries, positions)` kept by `keep_maps`, queries in order of position."""
        record = self._latest.get(layer)
        if record is None or not record.maps.get(head):
            raise OptionError(f"layer={layer}, head={head} must be in keep_maps; no map of it was kept")
        return record.map(head)

    def clear(self) -> None:
        """Delete all results."""
        for record in self._latest.values():
            record.is_open = False
        self._latest.clear()
        self._past.clear()
        self.unseen.clear()


@final
@dataclass(frozen=True, eq=False)
class Look:
    """The result of `look`: the `lens`, and the model's unchanged `output`."""

    lens: Lens
    output: Any

    def measures(self) -> list[dict[str, Any]]:
        """Return a row for each layer, head and measure; see `Lens.table`."""
        return self.lens.table()

    def values(self, measure: str | Measure) -> dict[int, Tensor]:
        """Return a measure by layer, not reduced; see `Lens.values`."""
        return self.lens.values(measure)

    def map(self, layer: int, head: int) -> Tensor:
        """Return the weights kept by `keep_maps`; see `Lens.map`."""
        return self.lens.map(layer, head)

    def _repr_html_(self) -> str:
        """Return a coloured table of layers and heads for each measure, which notebooks show."""
        return layer_head_tables(self.measures())


def look(
    model: object,
    inputs: Tensor | Mapping[str, Any] | None = None,
    *,
    measures: Sequence[str | Measure] = ("entropy", "sink_mass", "received_mass"),
    layers: Iterable[int] | None = None,
    keep_maps: Mapping[tuple[int, int], Queries] | None = None,
    part: Part = "auto",
    **more: Any,
) -> Look:
    """Run a model once under a `Lens`, with its fast kernel.

    Args:
        model: any transformers model that `foveate.apply` takes.
        inputs: the model's inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
        measures, layers, keep_maps, part: see `Lens`.
    """
    lens = Lens(measures, layers, keep_maps or {}, phase="all", part=part)
    if isinstance(inputs, Tensor):
        inputs = {host(model).model.main_input_name: inputs}
    with torch.no_grad(), apply(model, lens, on=covering(part)) as run:
        output = run.host.model(**{**(inputs or {}), **more})
    if part == "cross" and not lens._latest and not lens.unseen:
        raise UnsupportedModel(
            f"part={part!r}: {type(run.host.model).__name__} attended to no other sequence in this call"
        )
    return Look(lens, output)


def _map(site: Site, rows: slice, head: int, tokens: KeyTokens) -> Tensor:
    """Return a head's weights of some rows, `(B, r, positions)`."""
    own = head // site.groups if tokens.positions.shape[1] > 1 else 0
    return by_position(weights_of(site, rows, head), KeyTokens(tokens.positions[:, own : own + 1]), site.seen)


def _slices(queries: Queries, site: Site) -> list[slice]:
    """Return the requested rows of this call as contiguous slices."""
    first, last = site.asked - site.q.shape[2], site.asked
    if isinstance(queries, slice):
        wanted = set(range(*queries.indices(last)))
    else:
        wanted = {position + last if position < 0 else position for position in queries}
    rows = sorted(position - first for position in wanted if first <= position < last)
    ends = [i for i in range(len(rows)) if i + 1 == len(rows) or rows[i + 1] > rows[i] + 1]
    starts = [0, *(end + 1 for end in ends[:-1])] if rows else []
    return [slice(rows[start], rows[end] + 1) for start, end in zip(starts, ends, strict=True)]
