"""Small models that readers are tried on, their eager maps, and every reader with the values that it must find.

A reader is a method that changes nothing. A measure has its definition on a whole map in `DEFINITIONS`, any other
reader its values in `READERS`, both written from the definitions alone.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

import foveate.lens
from foveate.core.catalog import systems
from foveate.host import Method
from foveate.host.hf.model import host
from foveate.lens import MEASURES, Entropy, HeadOutputs, Measure, ReceivedMass, SinkMass
from foveate.lens.circuits import (
    attribution_patching,
    correct_letter_heads,
    edge_attribution,
    edges,
    head_inputs,
    image_stream,
    interventions,
    next_logits,
    qk_attribution,
    residual_stream,
    set_attention,
    stream_reads,
)
from foveate.lens.heads import attention_sink_emergence, frame_geometry, preplan_anchor, retrieval_heads
from foveate.lens.heads.preplan_anchor import fai, waad
from foveate.lens.output_measures import OutputNorm
from foveate.lens.parts import head_writes, maps, weight_gradients
from foveate.lens.parts.stack import Part, covering
from foveate.lens.position_measures import AtOffset, MeanDistance, WindowMass
from foveate.lens.span_measures import SpanMass, span_masses
from foveate.lens.token_measures import CopyMass, DuplicateMass, InductionMass, TokenMeasure
from foveate.lens.views import capture
from foveate.lens.window_measures import FutureInfluence, WindowedDistance
from tests.lens.models import BOTH, PARTS, eager_maps, image, pair, text, tiny

# -- subjects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, a part of it, and the padding of its texts."""

    kind: str
    padding: str = "none"
    part: Part = "auto"

    @property
    def name(self) -> str:
        words = (self.kind, "" if self.part == "auto" else self.part, self.padding.replace("none", ""))
        return " ".join(word for word in words if word)

    @property
    def model(self) -> PreTrainedModel:
        return subject(self.kind)

    @property
    def inputs(self) -> dict[str, Tensor]:
        if self.kind == "vit":
            return image()
        return pair(self.padding) if self.kind in BOTH else text(self.padding)

    @property
    def maps(self) -> list[Tensor]:
        return whole_maps(self)

    @property
    def outputs(self) -> list[Tensor]:
        """The heads' outputs `(B, heads, N, Dv)` by layer, as the output projections of the eager model get them."""
        return projected(self)

    @property
    def queries(self) -> Tensor:
        """True for the queries that are no padding."""
        return self._real(PARTS[self.part][1], 2)

    @property
    def keys(self) -> Tensor:
        """True for the keys that are no padding."""
        return self._real("attention_mask" if self.part == "cross" else PARTS[self.part][1], 3)

    def _real(self, name: str, axis: int) -> Tensor:
        given = self.inputs.get(name)
        w = self.maps[0]
        return torch.ones(len(w), w.shape[axis], dtype=torch.bool) if given is None else given.bool()


@cache
def subject(kind: str) -> PreTrainedModel:
    """Return one model of a kind. Tests share it, so that a reader which leaves a trace breaks the others."""
    with torch.random.fork_rng():
        return tiny(kind)


@cache
def whole_maps(case: Case) -> list[Tensor]:
    return eager_maps(case.model, case.inputs, case.part)


#: The ends of the names of output projections, by kind and part; others end as a llama's do.
PROJECTIONS = {
    ("bert", "auto"): ("attention.output.dense",), ("vit", "auto"): ("attention.o_proj", "attention.output.dense"),
    ("bart", "encoder"): ("self_attn.out_proj",), ("bart", "decoder"): ("self_attn.out_proj",),
    ("bart", "cross"): ("encoder_attn.out_proj",), ("t5", "encoder"): ("SelfAttention.o",),
    ("t5", "decoder"): ("SelfAttention.o",), ("t5", "cross"): ("EncDecAttention.o",),
}  # fmt: skip


def projections(case: Case) -> list[nn.Module]:
    """Return the output projections of a part, layer by layer."""
    ends = PROJECTIONS.get((case.kind, case.part), ("self_attn.o_proj",))
    inside = "" if case.part == "auto" else "encoder." if case.part == "encoder" else "decoder."
    return [module for name, module in case.model.named_modules() if name.endswith(ends) and f".{inside}" in f".{name}"]


@cache
def projected(case: Case) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().clone()))
        for module in projections(case)
    ]
    eager_maps(case.model, case.inputs, case.part)
    for handle in handles:
        handle.remove()
    heads = case.maps[0].shape[1]
    return [x.reshape(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in found]


#: Every kind of attention: grouped heads, padding on both sides, windows, soft caps, learnt sinks, encoders, images,
#: and encoder-decoders, one of them with a bias by position.
CASES = {
    case.name: case
    for case in (
        Case("llama"), Case("llama", "left"), Case("llama", "right"), Case("qwen3", "left"), Case("mistral", "left"),
        Case("gemma2", "left"), Case("gpt_oss", "left"), Case("bert"), Case("bert", "right"), Case("vit"),
        *(Case(kind, "right", part) for kind in BOTH for part in ("encoder", "decoder", "cross")),
    )
}  # fmt: skip
CAUSAL = [name for name, case in CASES.items() if case.kind not in ("bert", "vit", *BOTH)]

# -- measures ----------------------------------------------------------------------------------------------------------

#: Measures with options, beside those of the registry; those of one tuple have different names.
OPTIONS: tuple[tuple[Measure, ...], ...] = (
    (
        SinkMass(first=3), AtOffset(3), AtOffset(-1), WindowMass(2), WindowMass(0), WindowedDistance(3),
        FutureInfluence(1, 4), FutureInfluence(2, None), *span_masses({"a": (1, 3), "b": (3, 9)}),
    ),
    (SinkMass(positions=(2, 5)), *span_masses({"a": (1, 3), "b": [(6, 9), (7, 10)]})[:2]),
)  # fmt: skip
GROUPS: tuple[tuple[Measure, ...], ...] = (tuple(MEASURES.values()), *OPTIONS)


def groups(kind: str, part: Part = "auto") -> Iterator[list[Measure]]:
    """Yield the measures that a part of a model has, in groups that a lens takes together."""
    knows_ids = kind != "vit" and part == "auto"
    for group in GROUPS:
        some = [measure for measure in group if part != "cross" or not measure.compares_places]
        some = [measure for measure in some if knows_ids or not measure.needs_ids]
        if some:
            yield some


@dataclass(frozen=True)
class Whole:
    """A layer of the eager model, from which every measure can be computed.

    Args:
        w: the map `(B, heads, N, S)`; rows of padding are zero.
        keys: the keys that are no padding.
        ids: the tokens; None if they are unknown.
        written: the norm of what each head adds to the residual stream, `(B, heads, N)`; zero for padding.
    """

    w: Tensor
    keys: Tensor
    ids: Tensor | None = None
    written: Tensor | None = None


def whole(case: Case, layer: int) -> Whole:
    """Return a layer of a case."""
    w, module = case.maps[layer], projections(case)[layer]
    parts = module.weight.detach().mT.unflatten(0, (w.shape[1], -1))
    written = (case.outputs[layer] @ parts).norm(dim=-1).masked_fill(~case.queries[:, None], 0.0)
    ids = case.inputs.get("input_ids") if case.part == "auto" else None
    return Whole(w, case.keys, ids, written)


def _away(w: Tensor) -> Tensor:
    """How far each key lies before each query."""
    places = torch.arange(w.shape[-1])
    return places[:, None] - places


def _on_sinks(measure: SinkMass, seen: Whole) -> Tensor:
    if measure.positions is None:
        sinks = seen.keys & (seen.keys.cumsum(-1) <= measure.first)
    else:
        sinks = torch.zeros_like(seen.keys)
        sinks[:, list(measure.positions)] = True
    return (seen.w * sinks[:, None, None]).sum(-1)


def _received(measure: ReceivedMass, seen: Whole) -> Tensor:
    total = seen.w.sum(-2)
    return total / (seen.w > 0).sum(-2).clamp_min(1) if measure.per_row else total


def _influence(measure: FutureInfluence, seen: Whole) -> Tensor:
    away = _away(seen.w)
    later = (away >= measure.low) & (away <= (1 << 30 if measure.high is None else measure.high))
    askers = ((seen.w.sum(-1) > 0)[..., None] & later).sum(-2)
    return (seen.w * later).sum(-2) / askers.clamp_min(1)


def _on_span(measure: SpanMass, seen: Whole) -> Tensor:
    inside = torch.zeros_like(seen.keys)
    places = dict(measure.spans)[measure.target]
    for row, (start, stop) in enumerate(places if len(places) > 1 else places * len(inside)):
        inside[row, start:stop] = True
    return (seen.w * inside[:, None, None]).sum(-1)


def _on_tokens(measure: TokenMeasure, seen: Whole) -> Tensor:
    """Count pairs of a text one by one: of equal tokens, of a token and what followed it, of the next one."""
    assert seen.ids is not None
    ids, real, n = seen.ids, seen.keys, seen.ids.shape[1]
    same = torch.zeros(len(ids), n, n, dtype=torch.bool)
    for row, i, j in itertools.product(range(len(ids)), range(n), range(n)):
        asked, told = i + (type(measure) is CopyMass), j - (type(measure) is InductionMass)
        if asked < n and told >= 0 and asked != told and real[row, asked] and real[row, told]:
            same[row, i, j] = ids[row, asked] == ids[row, told]
    return (seen.w * same[:, None]).sum(-1)


#: Each kind of measure, from a layer of the eager model.
DEFINITIONS: dict[type[Measure], Callable[[Any, Whole], Tensor]] = {
    Entropy: lambda m, seen: torch.special.entr(seen.w).sum(-1),
    SinkMass: _on_sinks,
    ReceivedMass: _received,
    MeanDistance: lambda m, seen: (seen.w * _away(seen.w).abs()).sum(-1),
    AtOffset: lambda m, seen: (seen.w * (_away(seen.w) == m.offset)).sum(-1),
    WindowMass: lambda m, seen: (seen.w * (_away(seen.w).abs() <= m.width)).sum(-1),
    WindowedDistance: lambda m, seen: (seen.w * _away(seen.w).abs().clamp_max(m.window)).sum(-1),
    FutureInfluence: _influence,
    SpanMass: _on_span,
    DuplicateMass: _on_tokens,
    InductionMass: _on_tokens,
    CopyMass: _on_tokens,
    OutputNorm: lambda m, seen: seen.written,
}


def expected(measure: Measure, seen: Whole) -> Tensor:
    """Return a measure of a layer, by its definition."""
    return DEFINITIONS[type(measure)](measure, seen)


# -- other readers -----------------------------------------------------------------------------------------------------

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Reader:
    """A method that only reads, and what it must find.

    Args:
        method: its class.
        make: makes it for a case.
        found: the values that it found.
        expected: the same values from the eager model.
        cases: names of cases that it takes.
        is_linear: whether its memory grows with the length alone; else it keeps whole maps.
        pieces: sizes of the calls in which its text is read; None is one call.
    """

    method: type[Method]
    make: Callable[[Case], Method]
    found: Callable[[Any, Case], Values]
    expected: Callable[[Case], Values]
    cases: tuple[str, ...]
    is_linear: bool = True
    pieces: tuple[int, ...] | None = None


def by_layer(tensors: dict[int, Any] | list[Tensor]) -> Values:
    pairs = enumerate(tensors) if isinstance(tensors, list) else tensors.items()
    return {f"layer {layer}": value for layer, value in pairs}


def _real(values: Values, case: Case) -> Values:
    """Set rows of padding to zero: kernels differ on them."""
    return {name: x.masked_fill(~case.queries[:, None, :, None], 0.0) for name, x in values.items()}


def _trace_tokens(case: Case) -> Tensor:
    return torch.tensor([case.maps[0].shape[2] - 1, 9])


HEADS = ((0, 1), (1, 2))


def _inputs_found(method: Any, case: Case) -> Values:
    """The keys and queries of some heads as weights, and their outputs."""
    values = {}
    for layer, head in HEADS:
        q, k = (method.found[name, (layer, head)] for name in "qk")
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(case.maps[layer][:, head] == 0, float("-inf"))
        values[f"weights {layer}"] = logits.softmax(-1).nan_to_num()
        values[f"v {layer}"] = case.maps[layer][:, head] @ method.found["v", (layer, head)]
        values[f"z {layer}"] = method.found["z", (layer, head)].masked_fill(~case.queries[..., None], 0.0)
    return values


def _inputs_expected(case: Case) -> Values:
    values = {}
    for layer, head in HEADS:
        out = case.outputs[layer][:, head].masked_fill(~case.queries[..., None], 0.0)
        values |= {f"weights {layer}": case.maps[layer][:, head], f"v {layer}": out, f"z {layer}": out}
    return values


def _writes_expected(case: Case) -> Values:
    shares = case.queries / case.queries.sum(1, keepdim=True)
    values = {}
    for layer, (out, module) in enumerate(zip(case.outputs, projections(case), strict=True)):
        mean = torch.einsum("bhnd,bn->bhd", out.masked_fill(~case.queries[:, None, :, None], 0.0), shares)
        weight = module.weight.detach().unflatten(1, (mean.shape[1], -1))
        values[f"layer {layer}"] = torch.einsum("bhd,chd->bhc", mean, weight)
    return values


NEEDLE = retrieval_heads.NeedleCase(torch.arange(2, 26), 3, 9)
_LOOKED_BACK = 3  # decoding calls of the retrieval probe


def _hits_expected(case: Case) -> Values:
    rows = [w[0, :, -_LOOKED_BACK:].topk(2).indices for w in case.maps]
    return by_layer([row.transpose(0, 1).sort(-1).values for row in rows])


def _looks(case: Case) -> tuple[Tensor, Tensor]:
    """Some real queries of the first text, and a key of each."""
    n = int(case.queries[0].sum())
    return torch.arange(n), torch.arange(n) // 2


RESPONSE = torch.arange(24).expand(2, 24) >= 12
_SPAN = dict(low=2, high=8)


def _rhythm_found(method: Any, case: Case) -> Values:
    rhythm = method.rhythm(0.25, "floor", 0.0)
    sets = [torch.tensor([head for _, head in some]) for some in (rhythm.local_heads, rhythm.global_heads)]
    names = ("waad", "fai", "distance", "local", "global")
    return dict(zip(names, (rhythm.waad, rhythm.fai, rhythm.distance, *sets), strict=True))


def _rhythm_expected(case: Case) -> Values:
    w = case.maps[1]
    away = _away(w).clamp_min(0)
    distance = ((w * away).sum(-1) * RESPONSE[:, None]).sum((0, 2)) / RESPONSE.sum()
    order = distance.argsort()
    near, far = order[:1], order[-1:]
    return {
        "waad": waad(w[:, near], 4).mean(1) * RESPONSE, "distance": distance, "local": near, "global": far,
        "fai": fai(w[:, far].mean(1), response=RESPONSE, **_SPAN) * RESPONSE,
    }  # fmt: skip


@torch.no_grad()
def _norms_expected(case: Case) -> Values:
    layers = case.model(**case.inputs, use_cache=True).past_key_values.layers
    return {
        f"{name} {at}": getattr(layer, name).norm(dim=-1).mean((0, 1))
        for at, layer in enumerate(layers) for name in ("keys", "values")
    }  # fmt: skip


def _anchored_expected(case: Case) -> Values:
    values = {}
    with torch.no_grad():
        layers = case.model(**case.inputs, use_cache=True).past_key_values.layers
    for at, (w, layer) in enumerate(zip(case.maps, layers, strict=True)):
        values[f"divergence {at}"] = -(1 - w[0, :, 1:, 0].double()).log().mean(-1)
        values[f"variance {at}"] = layer.keys[0].norm(dim=-1).var(-1)
    return values


READERS = {
    reader.method.__name__: reader
    for reader in (
        Reader(
            HeadOutputs, lambda case: HeadOutputs(part=case.part), lambda m, case: _real(by_layer(m.found), case),
            lambda case: _real(by_layer(case.outputs), case), tuple(CASES),
        ),
        Reader(
            maps._Maps, lambda case: maps._Maps(case.part), lambda m, case: by_layer(m.found),
            lambda case: by_layer(case.maps), tuple(CASES), is_linear=False,
        ),
        Reader(
            weight_gradients._Outputs, lambda case: weight_gradients._Outputs(case.part),
            lambda m, case: _real(by_layer(m.outputs), case) | {f"seen {at}": x for at, x in m.seen.items()},
            lambda case: _real(by_layer(case.outputs), case) | {f"seen {at}": w > 0 for at, w in enumerate(case.maps)},
            tuple(CASES), is_linear=False,
        ),
        Reader(
            attention_sink_emergence._Norms, lambda case: attention_sink_emergence._Norms(),
            lambda m, case: {f"{name} {at}": found[i] for at, found in m.found.items()
                             for i, name in enumerate(("keys", "values"))},
            _norms_expected, ("llama",),
        ),
        Reader(
            frame_geometry._Anchored, lambda case: frame_geometry._Anchored(0),
            lambda m, case: {f"{name} {at}": found[i] for at, found in m.found.items()
                             for i, name in enumerate(("variance", "divergence"))},
            _anchored_expected, ("llama",), is_linear=False,
        ),
        Reader(
            retrieval_heads._Hits, lambda case: retrieval_heads._Hits(NEEDLE, 2),
            lambda m, case: by_layer({at: torch.stack(rows).sort(-1).values for at, rows in m.looked.items()}),
            _hits_expected, ("llama", "mistral left", "gemma2 left", "gpt_oss left"), pieces=(21, 1, 1, 1),
        ),
        Reader(
            retrieval_heads._Looks, lambda case: retrieval_heads._Looks(*_looks(case)),
            lambda m, case: by_layer(m.found),
            lambda case: by_layer([w[0, :, : len(_looks(case)[0])].argmax(-1) == _looks(case)[1] for w in case.maps]),
            ("llama", "llama right"),
        ),
        Reader(
            preplan_anchor._RhythmProbe,
            lambda case: preplan_anchor._RhythmProbe({1}, RESPONSE, 4, 2, 8, True), _rhythm_found, _rhythm_expected,
            tuple(name for name in CAUSAL if "right" not in name),
        ),
        Reader(
            residual_stream._Heads, lambda case: residual_stream._Heads(_trace_tokens(case)),
            lambda m, case: by_layer(list(m.found.values())),
            lambda case: by_layer([x[torch.arange(2), :, _trace_tokens(case)] for x in case.outputs]),
            tuple(name for name in CAUSAL if "right" not in name),
        ),
        Reader(
            correct_letter_heads._LastRow, lambda case: correct_letter_heads._LastRow(),
            lambda m, case: by_layer(m.found), lambda case: by_layer([w[:, :, -1] for w in case.maps]), tuple(CAUSAL),
        ),
        Reader(
            head_inputs.HeadInputs, lambda case: head_inputs.HeadInputs(HEADS), _inputs_found, _inputs_expected,
            ("llama left", "qwen3 left", "mistral left", "bert right", "vit"),
        ),
        Reader(
            head_writes._Writes,
            lambda case: head_writes._Writes(case.queries / case.queries.sum(1, keepdim=True)),
            lambda m, case: by_layer(m.found), _writes_expected, tuple(CAUSAL),
        ),
        Reader(
            capture._Capture, lambda case: capture._Capture(host(case.model), None, False),
            lambda m, case: {f"{layer}.{head}": w for (layer, head), w in m.maps[""].items()},
            lambda case: {f"{layer}.{head}": row for layer, w in enumerate(case.maps) for head, row in enumerate(w[0])},
            tuple(name for name, case in CASES.items() if case.part == "auto"), is_linear=False,
        ),
        Reader(
            image_stream._ClassRows, lambda case: image_stream._ClassRows(host(case.model).attention_modules()),
            lambda m, case: by_layer([(rows[:, :, None] @ values)[:, :, 0] for rows, values in m.found.values()]),
            lambda case: by_layer([x[:, :, 0] for x in case.outputs]), ("bert right", "vit"),
        ),
    )
}  # fmt: skip

#: Readers that work on a trace of the same run: the tests of their functions compare them with the eager model.
APART: dict[type[Method], str] = {
    edge_attribution._Record: "tests/lens/test_attribution_patching.py",
    next_logits._Reader: "tests/lens/test_next_logits.py",
    qk_attribution._ScoreRead: "tests/lens/test_qk_attribution.py",
    stream_reads.StreamReads: "tests/lens/test_edges.py",
}

#: Methods of the room that change what a model does; their tests are their own.
EDITS: set[type[Method]] = {
    interventions.Scale, interventions.Patch, set_attention.SetAttention, head_inputs.EditInputs, edges.EdgePatch,
    attribution_patching._LayerDrop,
}  # fmt: skip

#: The readers through which each catalogued system of the room reads a model.
ROWS: dict[str, tuple[str, ...]] = {
    "attention_sink_emergence": ("Lens", "_Norms"),
    "attention_vs_posthoc": ("_Maps",),
    "attentionviz": ("_Capture",),
    "bert_attention_analysis": ("_Maps", "_Outputs"),
    "bertviz": ("_Capture",),
    "circuit_reuse": ("HeadOutputs", "HeadInputs", "_Heads"),
    "correct_letter_heads": ("_LastRow", "HeadOutputs", "_Heads"),
    "discrete_sae_circuits": ("HeadOutputs",),
    "graph_attention_window": ("_Maps",),
    "head_pursuit": ("_Writes",),
    "indicwav2vec": ("_Maps",),
    "offset_local_heads": ("_Maps",),
    "preplan_anchor": ("_RhythmProbe",),
    "retrieval_heads": ("_Hits", "_Looks"),
    "second_order_lens": ("_ClassRows",),
    "sink_reference_frames": ("_Maps", "_Anchored"),
    "sixteen_heads": ("HeadOutputs",),
    "vit_head_analytics": ("_Maps",),
}


def catalogued() -> set[str]:
    """Return the keys of the room's systems."""
    return {row.key for row in systems() if row.room == "lens"}


def methods() -> set[type[Method]]:
    """Return every method that a module of the room defines."""
    found = set()
    for info in pkgutil.walk_packages(foveate.lens.__path__, "foveate.lens."):
        for value in vars(importlib.import_module(info.name)).values():
            ours = isinstance(value, type) and issubclass(value, Method) and value.__module__ == info.name
            if ours and not inspect.isabstract(value):
                found.add(value)
    return found


def every_measure() -> set[type[Measure]]:
    """Return every kind of measure that a module of the room defines."""
    methods()  # imports them
    left, found = [Measure], set[type[Measure]]()
    while left:
        for kind in left.pop().__subclasses__():
            if kind.__module__.startswith("foveate.lens"):
                left.append(kind)
                if not inspect.isabstract(kind) and kind is not TokenMeasure:
                    found.add(kind)
    return found


# -- runs --------------------------------------------------------------------------------------------------------------

#: Sizes of the calls in which a text of 24 tokens, or a decoder's 11, is read: a prompt in two calls, then decoding.
PIECES = {24: (10, 9, 1, 1, 1, 1, 1), 11: (4, 3, 1, 1, 1, 1)}


def new_cache(model: PreTrainedModel, kind: str = "dynamic") -> Any:
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return StaticCache(config=model.config, max_cache_len=32) if kind == "static" else DynamicCache(config=model.config)


def feed(
    model: PreTrainedModel, inputs: dict[str, Tensor], pieces: tuple[int, ...], cache: str = "dynamic"
) -> list[Tensor]:
    """Read a text in pieces on one cache, and return the logits of each piece."""
    is_pair = model.config.is_encoder_decoder
    ids, mask = (inputs[f"decoder_{name}" if is_pair else name] for name in ("input_ids", "attention_mask"))
    held, end, out = new_cache(model, cache), 0, []
    more: dict[str, Any] = {}
    if is_pair:
        source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        more = {"encoder_outputs": host(model).model.get_encoder()(**source),
                "attention_mask": inputs["attention_mask"]}  # fmt: skip
    for size in pieces:
        begin, end = end, end + size
        own = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        own = {f"decoder_{name}": x for name, x in own.items()} if is_pair else own
        out.append(model(**own, **more, past_key_values=held, use_cache=True).logits)
    assert end == ids.shape[1]
    return out


@torch.no_grad()
def read(case: Case, method: Method, pieces: tuple[int, ...] | None = None) -> list[Tensor]:
    """Run a case under a method, and return its outputs."""
    with foveate.apply(case.model, method, on=covering(case.part)):
        return run(case, pieces)


@torch.no_grad()
def run(case: Case, pieces: tuple[int, ...] | None = None) -> list[Tensor]:
    """Run a case, and return its outputs."""
    return [case.model(**case.inputs)[0]] if pieces is None else feed(case.model, case.inputs, pieces)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):  # an expanded view takes no memory
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


#: A text for which whole maps would show, and models that can read it.
LONG = 512
LONG_MODELS = {
    "llama": ("llama", {}), "mistral": ("mistral", {}), "bert": ("bert", {"max_position_embeddings": LONG}),
    "bart": ("bart", {"max_position_embeddings": LONG}),
}  # fmt: skip
