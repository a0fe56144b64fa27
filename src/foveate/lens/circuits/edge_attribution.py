"""Attribution patching of edges: the estimated effect of every edge between heads, and of every head on the logits.

See `attribution_patching` for the method and its sources.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.core import validate
from foveate.core.errors import UnsupportedModel
from foveate.host.attention import softmax
from foveate.host.entry import apply
from foveate.host.hf.hooks import Hook
from foveate.host.hf.model import Host
from foveate.host.probing import logits_of
from foveate.host.site import Site
from foveate.lens.circuits.attribution_patching import other_outputs
from foveate.lens.circuits.edges import HeadEdge
from foveate.lens.circuits.head_inputs import Input
from foveate.lens.circuits.output_gradients import output_gradients
from foveate.lens.circuits.patching import Metric
from foveate.lens.circuits.residual_stream import Inputs, first_tensor, wide
from foveate.lens.circuits.stream_reads import Reading, StreamReads
from foveate.lens.parts.head_table import one_stack

_NAMES: tuple[Input, ...] = ("q", "k", "v")


@final
@dataclass(frozen=True, eq=False)
class EdgeAttributions:
    """The estimated effects of patching single edges, at all tokens together.

    Args:
        heads: the estimate by sender's layer and head, receiver's layer and head, and its input: q, k, v. Zero where
            the receiver is not in a later layer.
        logits: the estimate of each head's edge into the logits.
        value: the metric on the clean texts.
    """

    heads: Float[Tensor, "l h l h 3"]
    logits: Float[Tensor, "l h"]
    value: float

    def of(self, edge: HeadEdge) -> float:
        """Return the estimate of one edge."""
        if edge.receiver is None or edge.input is None:
            return float(self.logits[edge.sender])
        return float(self.heads[(*edge.sender, *edge.receiver, _NAMES.index(edge.input))])

    def edges(self) -> list[HeadEdge]:
        """Return all edges, those into heads first."""
        layers, heads = self.logits.shape
        every = [(layer, head) for layer in range(layers) for head in range(heads)]
        between = [
            HeadEdge(sender, end, name) for sender in every for end in every if sender[0] < end[0] for name in _NAMES
        ]
        return between + [HeadEdge(sender) for sender in every]

    def top(self, count: int) -> list[tuple[HeadEdge, float]]:
        """Return the edges with the largest estimates in size, the largest first, each with its estimate."""
        validate.count("count", count, 1)
        found = [(edge, self.of(edge)) for edge in self.edges()]
        return sorted(found, key=lambda pair: -abs(pair[1]))[:count]


def attribute_edges(
    model: object, clean: Inputs, outputs: Mapping[int, Tensor], metric: Metric, *, exact_heads: bool = False
) -> EdgeAttributions:
    """Return the estimated change of a metric if one edge at a time carries another output of its sender.

    Args:
        model: a decoder with a language-model head, in evaluation mode.
        clean: texts, read without a cache.
        outputs: the senders' other outputs, as in `attribute_heads`.
        metric: a number of the logits.
        exact_heads: compute each receiving head anew with its changed query, key or value, norm and softmax included,
            and take only what comes after the head as linear (AtP*'s fix of queries and keys). Costs a reading of all
            later layers for each head; the default costs one gradient of each layer's readings.

    Raises:
        UnsupportedModel: the heads do not sum to the model's residual stream, or another method changes attention.
    """
    validate.flag("exact_heads", exact_heads)
    run = one_stack(model)
    record = _Record(run.layers)
    table = torch.zeros(run.layers, run.heads, run.layers, run.heads, 3, dtype=torch.float64)
    logits = torch.zeros(run.layers, run.heads, dtype=torch.float64)

    def objective(output: Any) -> Tensor:
        return metric(output.logits)

    found = output_gradients(run, clean, objective, record, others=lambda: [record.last], use_cache=False)
    other, changes = other_outputs(found.outputs, outputs), dict[int, Tensor]()
    with apply(run.model):  # readings are repeated below
        for layer, site in sorted(record.sites.items()):
            heads = _Heads(site, record.here.readings[layer], found.outputs[layer], found.gradients[layer])
            for sender, change in changes.items():
                estimate = heads.exact(change) if exact_heads else heads.linear(change)
                table[sender, : change.shape[2], layer, : heads.count] = estimate.cpu()
            own, norms = record.here.outputs[layer], record.here.norms.get(layer, ())
            changes[layer] = record.layer(layer).written(other[layer].transpose(1, 2) - own, norms)
            to_logits = torch.einsum("bnhc,bnc->h", changes[layer].double(), found.more[0].double())
            logits[layer, : heads.count] = to_logits.cpu()
    return EdgeAttributions(table, logits, float(found.value))


class _Record(StreamReads):
    """Record the calls of all layers, and the last residual stream with its graph."""

    def __init__(self, layers: int) -> None:
        super().__init__(range(layers), range(layers))
        self.sites: dict[int, Site] = {}
        self.last = torch.zeros(0)

    def hooks(self, host: Host) -> Iterator[RemovableHandle]:
        yield from super().hooks(host)
        assert self.wiring is not None  # the run has bound it
        yield self.wiring.final.register_forward_pre_hook(Hook(self._ended), with_kwargs=True)

    def _ended(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = first_tensor((*args, *kwargs.values()))
        assert stream is not None  # the traced run had one
        self.last = stream

    def read(self, site: Site, out: Tensor) -> None:
        self.sites[site.layer] = site


class _Heads:
    """The heads of a layer in a run, which can be computed again with other queries, keys and values.

    Args:
        site: the layer's call.
        reading: the call of its attention module.
        out: the heads' outputs.
        gradient: the metric's gradient with respect to them.
    """

    def __init__(self, site: Site, reading: Reading, out: Tensor, gradient: Tensor) -> None:
        self.site, self.reading, self.gradient = site, reading, gradient
        self.count, self.n = site.q.shape[1], site.q.shape[2]
        self.own = {"q": site.q.detach(), "k": self._by_head(site.k.detach()), "v": self._by_head(site.v.detach())}
        self.out = self.attend()
        tolerance = max(8 * torch.finfo(out.dtype).eps, 1e-4)
        gap = (self.out - out) if site.real_queries is None else (self.out - out) * site.real_queries[:, None, :, None]
        if site.position_bias is not None or bool(gap.abs().amax() > tolerance * out.abs().amax()):
            raise UnsupportedModel(
                f"layer {site.layer} attends by more than scores, a mask and a softmax, or another method changes its "
                f"attention; edges cannot be attributed there"
            )

    def _by_head(self, x: Tensor) -> Tensor:
        """Return keys or values for each query head, along the third axis from the end."""
        return x.repeat_interleave(self.count // x.shape[-3], -3)

    def attend(self, **changed: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n dv"]:
        """Return the heads' outputs with some of "q", "k" and "v" changed, each head its own."""
        given, own = {**self.own, **changed}, copy.copy(self.site)
        own.q, own.__dict__["k"] = given["q"], given["k"]
        weights = softmax(own, logits_of(own, torch.arange(self.n, device=own.q.device)))
        return weights @ given["v"].to(weights)

    def inputs(self, streams: Float[Tensor, "g b n c"]) -> dict[Input, Float[Tensor, "g b h n d"]]:
        """Return what the heads read of other streams, keys and values for each query head."""
        found = self.reading.inputs(streams)
        return {name: self._by_head(x) for name, x in found.items()}

    @cached_property
    def stream_gradients(self) -> Float[Tensor, "3 h b n c"]:
        """The gradients with respect to the stream as each head's query, key and value read it."""
        every = torch.arange(self.count)
        with torch.enable_grad():
            leaves = {name: x.clone().requires_grad_() for name, x in self.own.items()}
            of_inputs = torch.autograd.grad(self.attend(**leaves), list(leaves.values()), self.gradient.to(self.out))
            streams = self.reading.stream.expand(self.count, *self.reading.stream.shape).clone().requires_grad_()
            found = self.inputs(streams)
            return torch.stack([
                torch.autograd.grad(found[name][every, :, every], streams, given.transpose(0, 1), retain_graph=True)[0]
                for name, given in zip(_NAMES, of_inputs, strict=True)
            ])  # fmt: skip

    def linear(self, change: Float[Tensor, "b n s c"]) -> Float[Tensor, "s h 3"]:
        """Return the estimates for changes of the stream by single senders, from gradients."""
        return torch.einsum("bnsc,xhbnc->shx", wide(change), wide(self.stream_gradients)).double()

    @torch.no_grad()
    def exact(self, change: Float[Tensor, "b n s c"]) -> Float[Tensor, "s h 3"]:
        """Return the same with each head computed anew, and only the rest taken as linear."""
        found = self.inputs(self.reading.stream + change.permute(2, 0, 1, 3))
        return torch.stack([torch.stack([self._estimate(name, each) for each in x]) for name, x in found.items()], -1)

    def _estimate(self, name: Input, changed: Float[Tensor, "b h n d"]) -> Float[Tensor, " h"]:
        return ((self.attend(**{name: changed}) - self.out) * self.gradient).double().sum((0, 2, 3))
