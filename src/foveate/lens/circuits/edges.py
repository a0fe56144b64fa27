"""Edges between heads: what one head's queries, keys or values, or the logits, read of an earlier head's output.

    edge = HeadEdge((0, 3), (2, 5), "k")                     # the keys of head 2.5 read the output of head 0.3
    with foveate.apply(model, ablate_edges([edge])):         # zero; means or outputs of another text on request
        model.generate(ids)
    with foveate.apply(model, patch_along([(0, 3), (2, 5, "k"), (3, 1, "v"), None], outputs[0][:, 3])):
        model(ids)                                           # another output of 0.3, along this path alone

An edge is direct: the receiver reads the residual stream of the run with another output of the sender in it, its norm
computed anew, while every other part of the model reads the stream as it is. So the effects of MLPs and of heads in
between are no part of it. Path patching with frozen MLPs (`path_patch`) gives the same for one edge. Localizing Model
Behavior with Path Patching (2023), arXiv 2304.05969, has the general case, a set of paths: here a set of edges, of
which some send what arrived by others.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.hf.hooks import Hook
from foveate.host.hf.model import Host
from foveate.host.method import Method
from foveate.host.site import Site
from foveate.host.weight_tiles import weights_of
from foveate.lens.circuits.head_inputs import EditInputs, Input, key_places
from foveate.lens.circuits.interventions import Head, check_outputs, checked_heads, replaced, substitute
from foveate.lens.circuits.residual_stream import first_tensor
from foveate.lens.circuits.stream_reads import StreamReads


class HeadEdge(NamedTuple):
    """A direct path from a head to a head of a later layer, or to the logits.

    Args:
        sender: the head whose output is read.
        receiver: the head that reads it; None for the logits.
        input: the input of the receiver that it enters: "q", "k" or "v"; None for the logits.
    """

    sender: Head
    receiver: Head | None = None
    input: Input | None = None

    def __str__(self) -> str:
        end = "logits" if self.receiver is None else f"{self.receiver[0]}.{self.receiver[1]} {self.input}"
        return f"{self.sender[0]}.{self.sender[1]} -> {end}"


@final
@dataclass(eq=False)
class EdgePatch(Method):
    """Replace what some heads, or the logits, read of earlier heads; everything else reads the heads as they are.

    A value is the sender's output as the receiver gets it. None is the output that the sender has under its own patched
    edges; such a sender is an inner node of a path, and its changed output goes along these edges alone. The changed
    output of any other receiver goes wherever that head's output goes.

    Args:
        outputs: for each edge the sender's new output: `(Dv,)` for all tokens, or `(B or 1, N, Dv)` for the tokens of a
            sequence by position; None as above.
        positions: the tokens of the sender whose outputs are replaced; negative ones count from the end of the call.
            None for all.

    Raises:
        UnsupportedModel: at `apply`, if the model's heads do not sum to its residual stream; in assisted decoding.
    """

    outputs: Mapping[HeadEdge, Float[Tensor, "..."] | None]
    positions: Iterable[int] | None = None
    _into: dict[int, dict[tuple[Head, Input], list[HeadEdge]]] = field(init=False, repr=False)
    _last: list[HeadEdge] = field(init=False, repr=False)
    _inner: frozenset[Head] = field(init=False, repr=False)
    _edit: EditInputs = field(init=False, repr=False)
    _reads: StreamReads = field(init=False, repr=False)
    _pass: _Arrivals = field(init=False, repr=False)

    def __post_init__(self) -> None:
        edges = checked_edges(self.outputs)
        check_outputs({edge: value for edge, value in self.outputs.items() if value is not None})
        self.positions = None if self.positions is None else tuple(self.positions)
        self._into, self._last = {}, [edge for edge in edges if edge.receiver is None]
        for edge in edges:
            if edge.receiver is not None and edge.input is not None:
                layer = self._into.setdefault(edge.receiver[0], {})
                layer.setdefault((edge.receiver, edge.input), []).append(edge)
        self._inner = frozenset(edge.sender for edge in edges if self.outputs[edge] is None)
        ends: dict[Head, list[Input]] = {}
        for layer in self._into.values():
            for head, name in layer:
                ends.setdefault(head, []).append(name)
        for at, number in sorted(self._inner - ends.keys()):
            raise OptionError(f"outputs: head {at}.{number} has None, which needs an edge into that head")
        self._edit = EditInputs({head: names for head, names in ends.items() if head not in self._inner}, self._change)
        self._reads = StreamReads(sorted(self._into), sorted({edge.sender[0] for edge in edges}))
        self._pass = _Arrivals()

    def bind(self, host: Host) -> None:
        host.check_heads(head for edge in self.outputs for head in (edge.sender, edge.receiver) if head is not None)
        self._reads.bind(host)

    def hooks(self, host: Host) -> Iterator[RemovableHandle]:
        yield from self._reads.hooks(host)
        if self._last:
            assert self._reads.wiring is not None
            yield self._reads.wiring.final.register_forward_pre_hook(Hook(self._before_logits), with_kwargs=True)

    def at(self, site: Site) -> bool:
        self._pass.site = site  # the positions of a call, which hooks do not see
        return site.layer in self._into

    def edit_logits(self, site: Site, logits: Tensor) -> Tensor:
        self._arrive(site)
        return self._edit.edit_logits(site, logits) if self._edit.at(site) else logits

    def edit_output(self, site: Site, out: Tensor) -> Tensor:
        if site.weights is None:
            raise UnsupportedModel("another method replaced attention, so that its inputs cannot be changed")
        if self._edit.at(site):
            out = self._edit.edit_output(site, out)
        for head in self._inner:
            if head[0] == site.layer:
                self._pass.inner[head] = self._inner_output(site, head[1])
        return out

    # -- the stream with other outputs in it -------------------------------------------------------------------------

    def _difference(self, edges: list[HeadEdge], n: int) -> Float[Tensor, "b n c"]:
        """Return by how much a receiver's stream differs from that of the run."""
        site, total = self._pass.site, None
        assert site is not None
        if n != site.q.shape[2]:
            raise UnsupportedModel("edges cannot be patched where a call is read in parts, as in assisted decoding")
        for edge in edges:
            (layer, head), value = edge.sender, self.outputs[edge]
            own = self._reads.here.outputs[layer][:, :, head]
            if value is None:
                new = self._pass.inner[edge.sender].to(own)
            else:
                new = replaced(own, value, site.query_positions, site.seen, self.positions)
            norms = self._reads.here.norms.get(layer, ())
            change = self._reads.layer(layer).written((new - own)[:, :, None], norms, [head])[:, :, 0]
            total = change if total is None else total + change
        assert total is not None
        return total

    def _arrive(self, site: Site) -> None:
        """Find the changed inputs of the heads of a layer; equal sets of senders share a reading."""
        reading, into = self._reads.here.readings[site.layer], self._into[site.layer]
        sets: dict[frozenset[Any], list[tuple[Head, Input]]] = {}
        for end, edges in into.items():
            sets.setdefault(frozenset((edge.sender, id(self.outputs[edge])) for edge in edges), []).append(end)
        n = reading.stream.shape[1]
        changes = torch.stack([self._difference(into[ends[0]], n) for ends in sets.values()])
        found = reading.inputs(reading.stream + changes)
        self._pass.notes, self._pass.arrived = site.notes(self), {}
        for number, ends in enumerate(sets.values()):
            for (layer, head), name in ends:
                new = found[name][number, :, head if name == "q" else head // site.groups]
                self._pass.arrived[(layer, head), name] = new if name == "q" else self._so_far(site, head, name, new)

    def _so_far(self, site: Site, head: int, name: str, new: Float[Tensor, "b n d"]) -> Float[Tensor, "b s d"]:
        """Return a head's own keys or values of all tokens since the first that was read under this method."""
        notes, first = site.notes(self), int(site.query_positions[0])
        begin, known = notes.get(f"{name}{head} begins", first), notes.get(f"{name}{head}", new[:, :0])
        if not begin <= first <= begin + known.shape[1]:
            begin, known = first, new[:, :0]
        whole = torch.cat([known[:, : first - begin], new], 1)
        notes[f"{name}{head} begins"], notes[f"{name}{head}"] = begin, whole
        return whole

    def _change(self, head: Head, name: Input, x: Tensor, places: Tensor) -> Tensor:
        new = self._pass.arrived[head, name]
        if name == "q":
            return new
        at = places - self._pass.notes[f"{name}{head[1]} begins"]
        known = (at >= 0) & (at < new.shape[1])
        changed = x.clone()
        changed[:, known] = new[:, at[known]].to(x)
        return changed

    def _inner_output(self, site: Site, head: int) -> Float[Tensor, "b n dv"]:
        """Return an inner node's output under its patched edges, which the stream does not get."""
        group, own = head // site.groups, copy.copy(site)
        own.weights = None
        gap = (weights_of(own, slice(None), head) - weights_of(site, slice(None), head)).abs().amax()
        if bool(gap > max(16 * torch.finfo(site.q.dtype).eps, 1e-3)):
            raise UnsupportedModel(
                f"another method changes the attention of head {site.layer}.{head}, which a path uses"
            )
        places, names = key_places(site, head), {name for at, name in self._into[site.layer] if at[1] == head}
        read = {"q": site.q[:, head], "k": site.k[:, group], "v": site.v[:, group]}
        q, k, v = (
            self._change((site.layer, head), name, read[name], places) if name in names else read[name]
            for name in ("q", "k", "v")
        )
        own.q, own.__dict__["k"] = site.q.clone(), site.k.clone()
        own.q[:, head], own.k[:, group] = q, k
        weights = weights_of(own, slice(None), head)
        return weights @ v.to(weights)

    def _before_logits(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = first_tensor((*args, *kwargs.values()))
        if stream is None or self._pass.site is None:
            return None  # no call of this pass was under methods, as when a policy rereads
        changed = stream + self._difference(self._last, stream.shape[1]).to(stream)
        self._pass.site = None
        args = tuple(changed if x is stream else x for x in args)
        return args, {name: changed if x is stream else x for name, x in kwargs.items()}


def ablate_edges(
    edges: Iterable[HeadEdge], means: Mapping[int, Float[Tensor, "h dv"]] | None = None,
    outputs: Mapping[int, Float[Tensor, "b h n dv"]] | None = None, **options: Any,
) -> EdgePatch:  # fmt: skip
    """Return the patch that removes edges: receivers read zero of the senders, their mean, or their output elsewhere.

    Args:
        edges: the edges.
        means, outputs: as in `ablate`.
        options: arguments of `EdgePatch`.
    """
    return EdgePatch({edge: substitute(edge.sender, means, outputs) for edge in checked_edges(edges)}, **options)


def patch_along(
    path: Sequence[tuple[Any, ...] | None], output: Float[Tensor, "..."], **options: Any
) -> EdgePatch:  # fmt: skip
    """Return the patch of one path: a head's other output goes from receiver to receiver along it, and nowhere else.

    Args:
        path: the sender `(layer, head)`; receivers `(layer, head, "q", "k" or "v")` in order; None at the end for the
            logits. Without None, the changed output of the last receiver goes everywhere.
        output: the sender's other output, see `EdgePatch`.
        options: arguments of `EdgePatch`.
    """
    edges = path_edges(path)
    return EdgePatch({edge: output if edge is edges[0] else None for edge in edges}, **options)


def path_edges(path: Sequence[tuple[Any, ...] | None]) -> list[HeadEdge]:
    """Return the edges of a path in order; see `patch_along`."""
    if len(path) < 2 or any(stop is None or len(stop) != 3 for stop in path[1:-1]):
        raise OptionError(
            f"path={path!r} must be a sender, receivers (layer, head, input), and perhaps None at its end"
        )
    sender, edges = path[0], list[HeadEdge]()
    for stop in path[1:]:
        (start,) = checked_heads([sender[:2] if isinstance(sender, tuple) else sender])  # type: ignore[list-item]
        edges.append(HeadEdge(start) if stop is None else HeadEdge(start, tuple(stop[:2]), stop[2]))
        sender = stop
    return checked_edges(edges)


def checked_edges(edges: Iterable[HeadEdge]) -> list[HeadEdge]:
    """Return edges as a list; refuse what is no edge from a head to a later layer's input, or to the logits."""
    listed = list(edges)
    for edge in listed:
        if not isinstance(edge, HeadEdge):
            raise OptionError(f"edges must be HeadEdge(sender, receiver, input); got {edge!r}")
        checked_heads([edge.sender] if edge.receiver is None else [edge.sender, edge.receiver])
        if edge.receiver is None:
            if edge.input is not None:
                raise OptionError(f"input={edge.input!r} must be None for an edge into the logits")
            continue
        validate.one_of("input", edge.input, ("q", "k", "v"))
        if edge.sender[0] >= edge.receiver[0]:
            raise OptionError(f"edge {edge} must lead to a later layer: a layer's heads read the stream before it")
    return listed


class _Arrivals(threading.local):
    """A thread's call in progress, what arrived at its heads, and the outputs of inner nodes."""

    def __init__(self) -> None:
        self.site: Site | None = None
        self.notes: dict[str, Any] = {}
        self.arrived: dict[tuple[Head, Input], Tensor] = {}
        self.inner: dict[Head, Tensor] = {}
