"""Looking at a pretrained model's attention while its fused kernel runs.

    seen = foveate.look(model, input_ids)
    seen.measures()                # a table: layer, head, measure, value
    seen.values("received_mass")   # {layer: (B, heads, positions)}

`Lens` is the method behind it, for looking while other methods act, over many calls, or at what is generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final
from weakref import WeakSet

import torch
from torch import Tensor, nn

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel, unknown
from foveate.host.entry import apply
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.lens.capture.record import Record, by_position
from foveate.lens.capture.tiles import readings, weights_of
from foveate.lens.measures import Measure, Tokens, named

#: Which queries of a head to keep the weights of: positions in the sequence, negative ones counted from its end so far.
Queries = slice | Iterable[int]


@final
@dataclass(eq=False)
class Lens(Method):
    """Measures attention and changes nothing: outputs are bit for bit those without it.

    Where the model's own softmax ran, measures come from two more passes of the fused kernel over its queries and keys,
    in O(N) memory; the cost is that of attention twice more. Windows, soft caps, evicted layers, selected keys and
    edited weights are measured from weights, a few rows at a time, which is several times slower. What is measured is
    what was used: edits by other methods are seen, in whatever order they are applied. A layer whose attention another
    method replaced has no weights: it is named in `unseen` with the reason. Of a model with several parts it looks at
    the language part.

    Args:
        measures: names from `foveate.lens.measures.MEASURES`, or `Measure` objects.
        layers: which layers; None is all.
        keep_maps: `{(layer, head): queries}`: also keep the weights of these queries, O(queries · N) each.
        phase: look at "prefill", "decode" or "all" calls.

    Results cover every call under the lens: the table is a mean over all sequences; `values` and `map` are of the
    latest one, to which later calls on the same cache add. While decoding with beam search, rows belong to whichever
    beam held their place.
    """

    measures: Sequence[str | Measure] = ("entropy", "sink_mass", "received_mass")
    layers: Iterable[int] | None = None
    keep_maps: Mapping[tuple[int, int], Queries] = field(default_factory=dict)
    phase: Literal["prefill", "decode", "all"] = "prefill"
    unseen: dict[int, str] = field(default_factory=dict, init=False)
    _measures: tuple[Measure, ...] = field(init=False, repr=False)
    _latest: dict[int, Record] = field(default_factory=dict, init=False, repr=False)
    _past: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict, init=False, repr=False)
    _modules: WeakSet[nn.Module] = field(default_factory=WeakSet, init=False, repr=False)

    def __post_init__(self) -> None:
        validate.one_of("phase", self.phase, ("prefill", "decode", "all"))
        self._measures = tuple(named(measure) for measure in self.measures)
        names = [measure.name for measure in self._measures]
        if len(set(names)) < len(names):
            raise OptionError(f"measures={names} must have different names")
        self.layers = None if self.layers is None else tuple(self.layers)
        maps = {at: queries if isinstance(queries, slice) else tuple(queries) for at, queries in self.keep_maps.items()}
        self.keep_maps = maps

    def bind(self, host: Host) -> None:
        for layer in (*(self.layers or ()), *(layer for layer, _ in self.keep_maps)):
            if layer not in range(host.layers):
                raise OptionError(f"layer {layer} must be in 0..{host.layers - 1}, the layers of this model")
        for _, head in self.keep_maps:
            if head not in range(host.heads):
                raise OptionError(f"keep_maps: head {head} must be in 0..{host.heads - 1}, the heads of this model")
        self._modules |= set(_language_part(host))

    def at(self, site: Site) -> bool:
        chosen = self.layers is None or site.layer in self.layers or any(at[0] == site.layer for at in self.keep_maps)
        return chosen and self.phase in ("all", site.phase) and site.module in self._modules

    @torch.no_grad()
    def read(self, site: Site, out: Tensor) -> None:
        if site.replaced:
            self.unseen[site.layer] = "another method computed this layer's output in attention's place"
            return
        record, tokens = self._record(site), Tokens.of(site)
        if self.layers is None or site.layer in self.layers:
            record.add(readings(site, self._measures, tokens), self._measures, tokens, site.seen)
        for (layer, head), queries in self.keep_maps.items():
            if layer == site.layer:
                kept = [_map(site, rows, head, tokens) for rows in _runs(queries, site)]
                record.maps.setdefault(head, []).extend(kept)

    def _record(self, site: Site) -> Record:
        """The open record of this site's sequence; a new sequence closes the layer's last one."""
        memory = site.memory(self)
        record = memory.get("record")
        if record is None or not record.is_open or record.batch != site.q.shape[0]:
            record = memory["record"] = Record(site.q.shape[0])
            if (last := self._latest.get(site.layer)) is not None:
                self._close(site.layer, last)
            self._latest[site.layer] = record
        return record

    def _close(self, layer: int, record: Record) -> None:
        record.is_open = False
        past = self._past.setdefault(layer, {})
        for measure in self._measures if record.live else ():
            past.setdefault(measure.name, []).append(record.reduced(measure))

    def table(self) -> list[dict[str, Any]]:
        """A row for each layer, head and measure, its value the mean over all sequences that were looked at.

        Each sequence counts once, with its own reduction: see the measures. NaN where no query counted.
        """
        rows = []
        for layer, record in sorted(self._latest.items()):
            for measure in self._measures if record.live else ():
                parts = [*self._past.get(layer, {}).get(measure.name, []), record.reduced(measure)]
                for head, value in enumerate(torch.cat(parts).nanmean(0).tolist()):
                    rows.append({"layer": layer, "head": head, "measure": measure.name, "value": value})
        return rows

    def values(self, measure: str | Measure) -> dict[int, Tensor]:
        """By layer: `(B, heads, queries)` for a measure over queries, `(B, heads, positions)` for one over keys.

        Of the latest sequence; zeros where a query is padding.
        """
        asked = named(measure)
        if asked not in self._measures:
            raise unknown("measure of this lens", asked.name, [m.name for m in self._measures])
        return {layer: record.values(asked) for layer, record in sorted(self._latest.items()) if record.live}

    def map(self, layer: int, head: int) -> Tensor:
        """The weights `(B, queries, positions)` that `keep_maps` asked for, queries in order of position."""
        record = self._latest.get(layer)
        if record is None or not record.maps.get(head):
            raise OptionError(f"no map of layer {layer}, head {head} was kept; ask for it with keep_maps")
        return record.map(head)

    def clear(self) -> None:
        """Forget everything seen so far."""
        for record in self._latest.values():
            record.is_open = False
        self._latest.clear()
        self._past.clear()
        self.unseen.clear()


@final
@dataclass(frozen=True, eq=False)
class Look:
    """What `look` saw: the `lens`, and the model's `output`, which is what it gives without one."""

    lens: Lens
    output: Any

    def measures(self) -> list[dict[str, Any]]:
        """A row for each layer, head and measure; see `Lens.table`."""
        return self.lens.table()

    def values(self, measure: str | Measure) -> dict[int, Tensor]:
        """A measure before it is reduced, by layer; see `Lens.values`."""
        return self.lens.values(measure)

    def map(self, layer: int, head: int) -> Tensor:
        """Weights that `keep_maps` asked for; see `Lens.map`."""
        return self.lens.map(layer, head)


def look(
    model: object,
    inputs: Tensor | Mapping[str, Any] | None = None,
    *,
    measures: Sequence[str | Measure] = ("entropy", "sink_mass", "received_mass"),
    layers: Iterable[int] | None = None,
    keep_maps: Mapping[tuple[int, int], Queries] | None = None,
    **more: Any,
) -> Look:
    """Run a model once under a `Lens`: where its attention goes, without giving up the fast kernel.

    Args:
        model: any transformers model that `foveate.apply` takes, with one stack of layers.
        inputs: what the model is called with: a tokenizer's mapping, or the main input alone; `more` goes on top.
        measures, layers, keep_maps: as for `Lens`.
    """
    lens = Lens(measures, layers, keep_maps or {}, phase="all")
    if isinstance(inputs, Tensor):
        inputs = {host(model).model.main_input_name: inputs}
    with torch.no_grad(), apply(model, lens) as run:
        output = run.host.model(**{**(inputs or {}), **more})
    return Look(lens, output)


def _map(site: Site, rows: slice, head: int, tokens: Tokens) -> Tensor:
    """A head's weights of some rows, `(B, r, positions)`."""
    own = head // site.groups if tokens.positions.shape[1] > 1 else 0
    return by_position(weights_of(site, rows, head), Tokens(tokens.positions[:, own : own + 1]), site.seen)


def _runs(queries: Queries, site: Site) -> list[slice]:
    """The rows of this call that were asked for, as runs."""
    first, last = site.seen - site.q.shape[2], site.seen
    if isinstance(queries, slice):
        asked = set(range(*queries.indices(last)))
    else:
        asked = {position + last if position < 0 else position for position in queries}
    rows = sorted(position - first for position in asked if first <= position < last)
    ends = [i for i in range(len(rows)) if i + 1 == len(rows) or rows[i + 1] > rows[i] + 1]
    starts = [0, *(end + 1 for end in ends[:-1])] if rows else []
    return [slice(rows[start], rows[end] + 1) for start, end in zip(starts, ends, strict=True)]


def _language_part(host: Host) -> list[nn.Module]:
    """The attention modules of the stack that `host.config` speaks of; each has a layer number of its own."""
    modules = host.attention_modules()
    own = [module for module in modules if module.config is host.config] or modules
    numbers = [number for module in own if isinstance(number := getattr(module, "layer_idx", None), int)]
    if len(set(numbers)) < len(numbers):
        name = type(host.model).__name__
        raise UnsupportedModel(f"model {name} has several attention modules to a layer; a lens needs a single stack")
    return own
