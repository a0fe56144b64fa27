"""The contract of readers: every measure, and every method that only reads, on every kind of attention.

What they find equals the values from the eager model's whole maps. They change nothing, and hold no map unless maps are
what they are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core import oracle
from foveate.core.errors import FoveateError
from foveate.host import Site
from foveate.host.fused_statistics import Statistics
from foveate.host.hf.model import host
from foveate.lens import HeadOutputs, Lens, Look, attention_maps, head_outputs, look, weight_gradients
from foveate.lens.measures import KeyTokens
from foveate.lens.parts.stack import covering
from tests.contracts import readers
from tests.contracts.readers import (
    APART,
    CASES,
    DEFINITIONS,
    EDITS,
    GROUPS,
    LONG,
    LONG_MODELS,
    PIECES,
    READERS,
    ROWS,
    Case,
    LargestTensor,
    Reader,
    expected,
    feed,
    groups,
    read,
    run,
    whole,
)
from tests.lens.models import BOTH, PARTS, pair, text, tiny
from tests.support.tensors import assert_near, qkv

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
READ = [(name, case) for name, reader in READERS.items() for case in reader.cases]
READS = pytest.mark.parametrize("name, case", READ, ids=[f"{name.strip('_')} {case}" for name, case in READ])


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_near(found[name].detach(), value, tolerance, name)


# -- the contract covers everything ------------------------------------------------------------------------------------


def test_every_measure_has_a_definition_and_is_tried() -> None:
    assert readers.every_measure() == set(DEFINITIONS)
    assert {type(measure) for group in GROUPS for measure in group} == set(DEFINITIONS)


def test_every_reader_and_every_system_of_the_room_is_here() -> None:
    assert {reader.method for reader in READERS.values()} | {Lens, *APART} == readers.methods() - EDITS
    assert all(Path(file).is_file() for file in APART.values())
    assert set(ROWS) == readers.catalogued()
    assert {name for names in ROWS.values() for name in names} == {*READERS, "Lens"}


# -- measures ----------------------------------------------------------------------------------------------------------


@EVERY
def test_measures_equal_those_of_eager_maps(case: Case) -> None:
    for group in groups(case.kind, case.part):
        kept = {(1, 1): [3, 0, -1], (0, 0): slice(5, 9)}
        seen = look(case.model, case.inputs, measures=group, keep_maps=kept, part=case.part)
        assert not seen.lens.unseen
        for measure in group:
            assert seen.values(measure).keys() == set(range(len(case.maps)))
            for layer in range(len(case.maps)):
                found, wanted = seen.values(measure)[layer], expected(measure, whole(case, layer))
                assert_near(found, wanted, 1e-4, f"{measure}, layer {layer}")
        last = case.maps[1].shape[2] - 1
        assert_near(seen.map(1, 1), case.maps[1][:, 1, [0, 3, last]], 1e-4)
        assert_near(seen.map(0, 0), case.maps[0][:, 0, 5:9], 1e-4)


@EVERY
def test_a_lens_changes_nothing(case: Case) -> None:
    before = run(case)
    during = read(case, Lens(list(next(groups(case.kind, case.part))), keep_maps={(1, 0): slice(None)}, part=case.part))
    assert torch.equal(before[0], during[0]) and torch.equal(before[0], run(case)[0])


@pytest.mark.parametrize("measure", [m for group in GROUPS for m in group if not m.reads_output], ids=str)
@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_both_computations_of_a_measure_agree(measure: Any, left: int, causal: bool) -> None:
    n = 120
    q, k, _ = qkv(n, dtype=torch.float32)
    real = torch.ones(2, n, dtype=torch.bool)
    real[0, :left] = False
    w = oracle.weights(q, k, mask=real[:, None, None], causal=causal, scale=0.7) * real[:, None, :, None]
    ids = torch.randint(0, 9, (2, n), generator=torch.Generator().manual_seed(3))
    tokens = KeyTokens(torch.arange(n).expand(2, 1, n), real, torch.arange(n), ids)
    call, found = Statistics(q, k, 0.7, causal, real, real), measure.from_weights(w, tokens)
    fused = measure.fused(call, tokens)
    assert fused is not None or (not causal and measure.name in ("mean_distance", "future_influence_2_end"))
    if fused is not None:
        assert_near(fused, found, 1e-4, measure.name)


SEQUENCES = [
    Case("llama", "left"), Case("qwen3", "left"), Case("mistral", "left"), Case("gemma2", "left"),
    Case("gpt_oss", "left"), Case("bart", "none", "decoder"), Case("bart", "none", "cross"),
    Case("t5", "none", "decoder"), Case("t5", "none", "cross"),
]  # fmt: skip


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_generated_tokens_are_measured_as_one_text(case: Case) -> None:
    """A prompt in two calls and tokens one by one give the measures of one call over all of them."""
    pieces = PIECES[case.maps[0].shape[2]]
    for cache in ("dynamic", "static") if case.kind in ("llama", "qwen3") else ("dynamic",):
        for group in groups(case.kind, case.part):
            lens = Lens(group, phase="all", keep_maps={(0, 1): [2, 8, -1]}, part=case.part)
            with torch.no_grad(), foveate.apply(case.model, lens):
                feed(case.model, case.inputs, pieces, cache)
            for measure in group:
                for layer in range(len(case.maps)):
                    wanted = expected(measure, whole(case, layer))
                    assert_near(lens.values(measure)[layer], wanted, 1e-4, f"{measure}, layer {layer}, {cache}")
            ends = {sum(pieces[: number + 1]) - 1 for number in range(len(pieces))}  # each call's last query
            assert_near(lens.map(0, 1), case.maps[0][:, 1, sorted({2, 8} | ends)], 1e-4, "kept rows")


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_a_lens_tells_prompts_from_decoding(case: Case) -> None:
    n = case.maps[0].shape[2]
    pieces, prompt = (PIECES[n], 2) if case.kind not in BOTH else ((1,) * n, 1)  # a decoder begins with one token
    rows = {"prefill": sum(pieces[:prompt]), "decode": len(pieces) - prompt, "all": n}
    lenses = {phase: Lens(["entropy"], phase=phase, part=case.part) for phase in rows}  # type: ignore[arg-type]
    with torch.no_grad(), foveate.apply(case.model, *lenses.values()):
        feed(case.model, case.inputs, pieces)
    assert {phase: lens.values("entropy")[1].shape[2] for phase, lens in lenses.items()} == rows


# -- other readers -----------------------------------------------------------------------------------------------------


@READS
def test_readers_find_what_the_eager_model_has(name: str, case: str) -> None:
    reader, subject = READERS[name], CASES[case]
    method = reader.make(subject)
    before = run(subject, reader.pieces)
    during = read(subject, method, reader.pieces)
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True)), "it changes the outputs"
    check(reader.found(method, subject), reader.expected(subject))


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_outputs_of_generated_tokens_are_joined(case: Case) -> None:
    record, pieces = HeadOutputs(part=case.part), PIECES[case.maps[0].shape[2]]
    with torch.no_grad(), foveate.apply(case.model, record):
        feed(case.model, case.inputs, pieces)
    reader = READERS["HeadOutputs"]
    check(reader.found(record, case), reader.expected(case))


def test_texts_on_two_caches_are_told_apart() -> None:
    """Calls on two caches in turn are two sequences, each of which goes on with its own outputs."""
    case, record = Case("llama"), HeadOutputs()
    ids = case.inputs["input_ids"]
    caches = [readers.new_cache(case.model) for _ in ids]
    with torch.no_grad(), foveate.apply(case.model, record):
        for piece in ids.split([20, 1, 3], 1):
            for row, cache in enumerate(caches):
                case.model(piece[row : row + 1], past_key_values=cache)
    for layer, out in record.found.items():
        assert_near(out, case.outputs[layer][1:], 1e-4)


@EVERY
def test_functions_that_take_a_model_return_what_their_readers_find(case: Case) -> None:
    real = case.queries[:, None, :, None]
    assert_near(attention_maps(case.model, case.inputs, part=case.part), torch.stack(case.maps, 1), 1e-4)
    for layer, out in head_outputs(case.model, case.inputs, part=case.part).items():
        assert_near(out * real, case.outputs[layer] * real, 1e-4)


GRADIENTS = ["llama left", "gemma2 left", "gpt_oss left", "bert right", "vit", "bart encoder right", "bart cross right"]


@pytest.mark.parametrize("name", [*GRADIENTS, "t5 decoder right"])
def test_gradients_of_weights_are_those_of_the_eager_model(name: str) -> None:
    case = CASES[name]
    mask = case.inputs.get(PARTS["decoder" if case.part == "cross" else case.part][1])
    # an encoder is followed by a decoder, whose tokens the loss takes
    mask = case.inputs["decoder_attention_mask"] if case.part == "encoder" else mask

    def loss(output: Any) -> Tensor:
        some = output[0][..., :5]  # the squares of all channels behind a norm have a constant sum
        return (some if mask is None else some * mask[..., None]).square().mean()

    found = weight_gradients(case.model, case.inputs, loss, part=case.part)
    before = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    output = case.model(**case.inputs, output_attentions=True)
    slopes = torch.autograd.grad(loss(output), output[PARTS[case.part][0]])
    if before != "eager":
        case.model.set_attn_implementation(before)
    largest = max(float(slope.abs().max()) for slope in slopes)
    for layer, (slope, w) in enumerate(zip(slopes, case.maps, strict=True)):
        assert_near(found[:, layer] / largest, slope.masked_fill(w == 0, 0.0) / largest, 1e-4, f"layer {layer}")


# -- memory ------------------------------------------------------------------------------------------------------------


def largest(method: Any, model: Any, inputs: dict[str, Tensor], part: Any, patch: pytest.MonkeyPatch) -> int:
    """Return the size of the largest tensor that a reader makes while a model runs."""
    watch, calls, kind = LargestTensor(), [], type(method)

    def watched(hook: Any) -> Any:
        def call(self: Any, site: Site, out: Tensor) -> Any:
            calls.append(site.layer)
            with watch:
                return hook(self, site, out)

        return call

    patch.setattr(kind, "read", watched(kind.read))
    if "edit_output" in vars(kind):
        patch.setattr(kind, "edit_output", watched(kind.edit_output))
    for place in ("foveate.host.weight_tiles.TILE", "foveate.host.one_pass.TILE"):
        patch.setattr(place, 1 << 15)
    with torch.no_grad(), foveate.apply(model, method, on=covering(part)):
        model(**inputs)
    assert len(set(calls)) >= 1
    return watch.elements


LONG_CASES = [
    ("llama", "none", "auto"), ("llama", "left", "auto"), ("mistral", "left", "auto"), ("bert", "left", "auto"),
    ("bart", "right", "encoder"), ("bart", "right", "decoder"), ("bart", "right", "cross"),
]  # fmt: skip


@pytest.mark.parametrize("kind, padding, part", LONG_CASES, ids=[" ".join(each) for each in LONG_CASES])
def test_measures_take_linear_memory(kind: str, padding: str, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes = LONG_MODELS[kind]
    model = tiny(name, **changes)
    inputs = pair(padding, LONG, LONG) if kind == "bart" else text(padding, LONG)
    for group in groups(kind, part) if kind == "llama" else [next(groups(kind, part))]:
        with monkeypatch.context() as patch:
            # batch · heads · length · a head's width, padded for the kernel
            assert largest(Lens(group, part=part), model, inputs, part, patch) <= 2 * 4 * LONG * 16 < LONG * LONG


LINEAR = [(name, case) for name, reader in READERS.items() if reader.is_linear for case in reader.cases[:1]]


@pytest.mark.parametrize("name, kind", LINEAR)
def test_readers_take_linear_memory(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that was made for a short text reads a long one, and keeps no map."""
    reader, case = READERS[name], CASES[kind]
    method = _lengthened(reader, case)
    model = tiny(case.kind, **({"max_position_embeddings": LONG} if case.kind == "bert" else {}))
    if hasattr(method, "modules"):
        method.modules = set(host(model).attention_modules())
    assert largest(method, model, {name: x[:2] for name, x in text("none", LONG).items()}, "auto", monkeypatch) <= (
        2 * 4 * LONG * 16
    )


def _lengthened(reader: Reader, case: Case) -> Any:
    """Make a reader for a long text: what it holds by token is repeated."""
    method: Any = reader.make(case)
    for name in ("response", "shares"):
        if hasattr(method, name):
            setattr(method, name, getattr(method, name).repeat_interleave(LONG // 24 + 1, 1)[:, :LONG])
    return method


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if not reader.is_linear])
def test_what_keeps_maps_is_seen_to_do_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of memory sees a map where there is one."""
    method = READERS[name].make(Case("llama"))
    assert largest(method, tiny("llama"), text("none", LONG), "auto", monkeypatch) >= LONG * LONG


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_lens_of_an_encoder_and_one_of_a_decoder_work_side_by_side() -> None:
    cases = [Case("bart", "right", part) for part in ("encoder", "decoder", "cross")]
    lenses = [Lens(["entropy", "received_mass"], part=case.part) for case in cases]
    with torch.no_grad(), foveate.apply(cases[0].model, *lenses, on="all"):
        cases[0].model(**cases[0].inputs)
    for case, lens in zip(cases, lenses, strict=True):
        for layer, w in enumerate(case.maps):
            assert_near(lens.values("entropy")[layer], torch.special.entr(w).sum(-1), 1e-4, case.name)
            assert_near(lens.values("received_mass")[layer], w.sum(-2), 1e-4, case.name)
        table = {(row["layer"], row["head"]): row["value"] for row in lens.table() if row["measure"] == "entropy"}
        w = case.maps[1]
        mean = torch.special.entr(w).sum(-1).sum(-1) / case.queries.sum(-1)[:, None]
        assert table[1, 1] == pytest.approx(float(mean.mean(0)[1]), abs=1e-4), "padding of the queries does not count"


def test_interventions_act_on_one_part() -> None:
    """Scaling a head of one part equals that change before its own output projection, and no other's."""
    for part, at in (("encoder", 0), ("decoder", 1), ("cross", 2)):
        case = Case("bart", "right", part)  # type: ignore[arg-type]
        stack = (2, 4) if part == "encoder" else (3, 2)
        factors = torch.ones(stack)
        factors[1, 1] = 0.0
        scaled = read(case, foveate.lens.Scale(factors, part=part))  # type: ignore[arg-type]
        patched = read(case, foveate.lens.ablate([(1, 1)], part=part))
        module, width = readers.projections(case)[1], 32 // stack[1]

        def remove(_: Any, given: tuple[Tensor], width: int = width) -> tuple[Tensor]:
            changed = given[0].clone()
            changed[..., width : 2 * width] = 0.0
            return (changed,)

        handle = module.register_forward_pre_hook(remove)
        wanted = run(case)
        handle.remove()
        for got in (scaled, patched):
            assert_near(got[0], wanted[0], 1e-5, f"{part} {at}")
        assert float((run(case)[0] - wanted[0]).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: look(readers.subject("bart"), pair()), 'choose part="encoder", "decoder" or "cross"'),
        (lambda: look(readers.subject("t5"), pair()), "more than a single stack"),
        (lambda: look(readers.subject("llama"), text(), part="encoder"), "part='encoder': LlamaForCausalLM has none"),
        (lambda: look(readers.subject("llama"), text(), part="cross"), "part='cross': LlamaForCausalLM has none"),
        (lambda: look(readers.subject("bert"), text(), part="decoder"), "part='decoder': BertModel has none"),
        (lambda: look(readers.subject("bart"), pair(), part="both"), "part='both' must be one of"),  # type: ignore[arg-type]
        (lambda: look(readers.subject("bart"), pair(), part="cross", measures=["mean_distance"]), "two sequences"),
        (lambda: look(readers.subject("bart"), pair(), part="encoder", layers=[2]), "layers: 2 must be in 0..1"),
        (
            lambda: look(readers.subject("bart"), pair(), part="decoder", keep_maps={(0, 2): [0]}),
            "head 2 must be in 0..1",
        ),
        (lambda: foveate.apply(readers.subject("bart"), Lens(part="encoder")).__enter__(), 'on="all"'),
        (lambda: attention_maps(readers.subject("bart"), pair()), "more than a single stack"),
        (lambda: head_outputs(readers.subject("t5"), pair()), "more than a single stack"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_look_at_several_parts_shows_the_outputs_of_each() -> None:
    found: list[Look] = [
        look(readers.subject("t5"), pair("right"), part=part) for part in ("encoder", "decoder", "cross")
    ]
    assert [len({row["layer"] for row in seen.measures()}) for seen in found] == [2, 3, 3]
    assert all(torch.equal(found[0].output.logits, seen.output.logits) for seen in found)
