"""Measure a pretrained model's attention while its fused kernel runs.

    seen = foveate.look(model, input_ids)
    seen.measures()                # a table: layer, head, measure, value
    seen.values("received_mass")   # {layer: (B, heads, positions)}

`Lens` is the method behind `look`. Use it beside other methods, over many calls, or during generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, shown, unknown
from foveate.host.entry import apply
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.output_projection import projection_holders
from foveate.host.site import Site
from foveate.host.weight_tiles import weights_of
from foveate.lens.capture.ahead import ids_so_far, settle
from foveate.lens.capture.record import Record, by_position
from foveate.lens.capture.tiles import measure_call
from foveate.lens.html_table import layer_head_tables
from foveate.lens.measures import KeyTokens, Measure
from foveate.lens.parts.inputs import by_name, check_ids
from foveate.lens.parts.stack import Layers, Part, covering
from foveate.lens.registry import named

if TYPE_CHECKING:
    from foveate.lens.views.attention_view import AttentionView

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
    _holders: WeakKeyDictionary[nn.Module, nn.Module] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

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
        for at, queries in self.keep_maps.items():
            if not isinstance(queries, slice | Iterable):
                raise OptionError(
                    f"keep_maps: the queries of {at} must be a slice or positions, such as [{shown(queries)}]; got "
                    f"{shown(queries)}"
                )
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
        self._holders.update(projection_holders(host))

    def at(self, site: Site) -> bool:
        layer = self._stack.number(site)
        wanted = self._token_measures or self.phase in ("all", site.phase)  # tokens are noted in all calls
        if layer is None or not wanted:
            return False
        return self.layers is None or layer in self.layers or any(at[0] == layer for at in self.keep_maps)

    @torch.no_grad()
    def read(self, site: Site, out: Tensor) -> None:
        layer = self._stack.at(site)
        if site.replaced:
            self.unseen[layer] = "another method replaced this layer's attention"
            return
        names = self._token_measures
        ids = ids_so_far(site, site.notes(self), names) if names else None
        if self.phase not in ("all", site.phase):
            return
        record, tokens = self._record(site, layer), KeyTokens.of(site, ids)
        if self.layers is None or layer in self.layers:
            settle(site, site.notes(self), record, self._measures, tokens)
            found = measure_call(site, self._measures, tokens, out, self._holders.get(site.module, site.module))
            record.add(found, self._measures, tokens, site.seen)
        for (at, head), queries in self.keep_maps.items():
            if at == layer:
                kept = [_map(site, rows, head, tokens) for rows in _slices(queries, site)]
                record.maps.setdefault(head, []).extend(kept)

    @property
    def _token_measures(self) -> list[str]:
        """The measures that need the ids of the tokens."""
        return [measure.name for measure in self._measures if measure.needs_ids]

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
        wanted = self._own(measure)
        return {layer: record.values(wanted) for layer, record in sorted(self._latest.items()) if record.counted}

    def _own(self, measure: str | Measure) -> Measure:
        wanted = named(measure)
        if wanted not in self._measures:
            raise unknown("measure of this lens", wanted.name, [m.name for m in self._measures])
        return wanted

    def reduced(self, measure: str | Measure) -> dict[int, Float[Tensor, "b h"]]:
        """Return one number for each text and head of the latest call or sequence, by layer; NaN without a query."""
        wanted = self._own(measure)
        return {layer: record.reduced(wanted) for layer, record in sorted(self._latest.items()) if record.counted}

    def map(self, layer: int, head: int) -> Tensor:
        """Return the weights `(B, queries, positions)` kept by `keep_maps`, queries in order of position."""
        record = self._latest.get(layer)
        if record is None or not record.maps.get(head):
            raise OptionError(f"layer={layer}, head={head} must be in keep_maps; no map of it was kept")
        return record.map(head)

    def check(self) -> None:
        """Refuse a measure that names tokens which the latest sequence does not have."""
        for record in self._latest.values():
            for measure in self._measures:
                measure.check(record.seen)

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

    def view(self, tokens: Sequence[str] | None = None, item: int = 0) -> AttentionView:
        """Return the maps of `keep_maps` as a view: lines, maps and a page; `attention_view` shows all heads.

        Args:
            tokens: the texts of all tokens; None for numbers.
            item: the item of the batch.
        """
        from foveate.lens.views.attention_view import AttentionView  # its page needs jinja2

        kept = self._kept()
        if not kept:
            raise OptionError("keep_maps must name a head to view, such as {(3, 1): slice(None)}; no map was kept")
        maps = {at: self.map(*at) for at in kept}
        batch, _, n = next(iter(maps.values())).shape
        if item not in range(batch):
            raise OptionError(f"item={item} must be in 0..{batch - 1}, the items of the batch")
        rows = {at: _positions(queries, n) for at, queries in kept.items()}
        places = sorted(set().union(*rows.values()))
        row_of = {place: row for row, place in enumerate(places)}
        whole = {}
        for at, weights in maps.items():
            whole[at] = weights.new_zeros(len(places), n)
            whole[at][[row_of[place] for place in rows[at]]] = weights[item]
        texts = [str(place) for place in range(n)] if tokens is None else tokens
        return AttentionView(whole, texts, places=places)

    def _repr_html_(self) -> str:
        """Return a coloured table of layers and heads for each measure, and the kept maps, for notebooks."""
        tables = layer_head_tables(self.measures())
        return tables + self.view()._repr_html_() if self._kept() else tables

    def _kept(self) -> dict[tuple[int, int], Queries]:
        return {at: queries for at, queries in self.lens.keep_maps.items() if at[0] not in self.lens.unseen}


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
        model: any model that `foveate.apply` takes.
        inputs: the model's inputs: a tokenizer's mapping, or the main input alone; `more` adds keyword arguments.
        measures, layers, keep_maps, part: see `Lens`.
    """
    lens = Lens(measures, layers, keep_maps or {}, phase="all", part=part)
    with torch.no_grad(), apply(model, lens, on=covering(part)) as run:
        given = {**by_name(run.host.model, {} if inputs is None else inputs), **more}
        check_ids(given.get("input_ids"))
        output = run.host.model(**given)
    if part == "cross" and not lens._latest and not lens.unseen:
        raise UnsupportedModel(
            f"part={part!r}: {type(run.host.model).__name__} attended to no other sequence in this call"
        )
    lens.check()
    return Look(lens, output)


def _map(site: Site, rows: slice, head: int, tokens: KeyTokens) -> Tensor:
    """Return a head's weights of some rows, `(B, r, positions)`."""
    own = head // site.groups if tokens.positions.shape[1] > 1 else 0
    return by_position(weights_of(site, rows, head), KeyTokens(tokens.positions[:, own : own + 1]), site.seen)


def _slices(queries: Queries, site: Site) -> list[slice]:
    """Return the requested rows of this call as contiguous slices."""
    first, last = site.asked - site.q.shape[2], site.asked
    rows = [position - first for position in _positions(queries, last) if first <= position]
    ends = [i for i in range(len(rows)) if i + 1 == len(rows) or rows[i + 1] > rows[i] + 1]
    starts = [0, *(end + 1 for end in ends[:-1])] if rows else []
    return [slice(rows[start], rows[end] + 1) for start, end in zip(starts, ends, strict=True)]


def _positions(queries: Queries, n: int) -> list[int]:
    """Return the requested positions of a sequence of `n` tokens, in order."""
    if isinstance(queries, slice):
        return sorted(range(*queries.indices(n)))
    return sorted({at for position in queries if 0 <= (at := position + n if position < 0 else position) < n})
