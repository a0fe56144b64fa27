"""Edges between heads: they equal the same change made by hand in front of a projection, also under other methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM

import foveate
from foveate.core.errors import FoveateError, UnsupportedModel
from foveate.host import Method
from foveate.kv import SinkRecent
from foveate.lens import (
    EdgePatch,
    HeadEdge,
    LogitDifference,
    Patch,
    ablate,
    ablate_edges,
    head_means,
    head_outputs,
    method_effects,
    patch_along,
    path_edges,
    path_patch,
)
from foveate.lens.circuits.stream_reads import StreamReads
from foveate.steer import ActCalibration
from tests.lens.test_direct_effects import random
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import model, padded, tokens
from tests.support.tensors import assert_near

SENDER = (0, 1)
ALL = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2")


def logits(lm: Any, ids: Tensor, *methods: Method, pieces: list[int] | None = None, **more: Any) -> Tensor:
    """Logits under methods; in pieces, over one cache."""
    with torch.no_grad(), foveate.apply(lm, *methods):
        if pieces is None:
            return lm(ids, use_cache=False, **more).logits
        cache = DynamicCache(config=lm.config)
        return torch.cat([lm(piece, past_key_values=cache).logits for piece in ids.split(pieces, 1)], 1)


def own_edges(lm: Any, given: dict[str, Tensor]) -> dict[HeadEdge, Tensor]:
    """Edges of every kind with the outputs that their senders have."""
    found = head_outputs(lm, given)
    last = len(found) - 1
    edges = [HeadEdge(SENDER, (last, 2), name) for name in ("q", "k", "v")]
    edges += [HeadEdge((0, 3), (last, 3), "k"), HeadEdge(SENDER), HeadEdge((last, 0))]
    return {edge: found[edge.sender[0]][:, edge.sender[1]] for edge in edges}


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ALL)
def test_own_outputs_change_nothing_and_others_do(name: str, side: str) -> None:
    lm = random(name)
    given = dict(zip(("input_ids", "attention_mask"), padded(tokens(), side), strict=True))
    edges = own_edges(lm, given)
    real = given["attention_mask"].bool()
    before = logits(lm, given["input_ids"], attention_mask=given["attention_mask"])[real]
    after = logits(lm, given["input_ids"], EdgePatch(edges), attention_mask=given["attention_mask"])[real]
    assert_near(after, before, 1e-4)
    for edge in edges:
        other = logits(lm, given["input_ids"], ablate_edges([edge]), attention_mask=given["attention_mask"])[real]
        assert (other - before).abs().max() > 1e-4, edge


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "olmo2"])
def test_what_heads_write_adds_up_to_what_the_stream_gets(name: str) -> None:
    """Also where a norm stands between the output projection and the stream."""
    lm, ids, added = random(name), tokens(), list[Tensor]()
    reads = StreamReads(writers=range(len(lm.model.layers)))
    # Llama's norm of this name stands in front of the MLP
    behind = [b.self_attn.o_proj if name == "llama" else b.post_attention_layernorm for b in lm.model.layers]

    def note(module: nn.Module, given: Any, made: Tensor) -> None:
        if made.shape[:2] == ids.shape:  # norms are also called with other inputs, to learn their linear part
            added.append(made)

    with torch.no_grad(), foveate.apply(lm, reads), ExitStack() as stack:
        for module in behind:
            stack.callback(module.register_forward_hook(note).remove)
        lm(ids, use_cache=False)
        written = [reads.written(layer).sum(2) for layer in range(len(lm.model.layers))]
    for made, expected in zip(written, added, strict=True):
        assert_near(made, expected, 1e-5)


# -- by hand -----------------------------------------------------------------------------------------------------------


@contextmanager
def by_hand(lm: LlamaForCausalLM, sender: tuple[int, int], value: Tensor, name: str) -> Iterator[None]:
    """Another output of a sender in what the last layer's second group of heads reads; `value` is for all tokens."""
    writer, reader, seen = lm.model.layers[sender[0]].self_attn, lm.model.layers[2], dict[str, Tensor]()
    columns = slice(16, 32) if name == "q" else slice(8, 16)
    head = slice(8 * sender[1], 8 * sender[1] + 8)

    def changed(projection: nn.Linear, _: Any, made: Tensor) -> Tensor:
        more = (value - seen["z"][..., head]) @ writer.o_proj.weight[:, head].mT
        hidden = reader.input_layernorm(seen["stream"] + more)
        made = made.clone()
        made[..., columns] = F.linear(hidden, projection.weight, projection.bias)[..., columns]
        return made

    with ExitStack() as stack:
        for handle in (
            writer.o_proj.register_forward_pre_hook(lambda _, given: seen.update(z=given[0])),
            reader.register_forward_pre_hook(lambda _, given: seen.update(stream=given[0])),
            getattr(reader.self_attn, f"{name}_proj").register_forward_hook(changed),
        ):
            stack.callback(handle.remove)
        yield


def both(value: Tensor, name: Any, sender: tuple[int, int] = SENDER) -> EdgePatch:
    return EdgePatch({HeadEdge(sender, (2, head), name): value for head in (2, 3)})


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("sender", [SENDER, (1, 2)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_edge_is_a_change_in_front_of_the_projection(kind: str, sender: tuple[int, int], name: str) -> None:
    lm, ids = random(kind), tokens()
    value = torch.randn(8, generator=torch.Generator().manual_seed(1))
    with by_hand(lm, sender, value, name):
        expected = logits(lm, ids)
    assert_near(logits(lm, ids, both(value, name, sender)), expected, 1e-5)
    assert (expected - logits(lm, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("methods", ["alone", "policy", "policy and steering"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_it_composes_with_a_cache_policy_and_with_steering(name: str, methods: str) -> None:
    """A cache that drops tokens, calibrated sinks, a prompt in pieces, and decoding: as by hand, to rounding."""
    lm, ids, pieces = random("llama"), tokens(length=20), [9, 6, 1, 1, 1, 1, 1]
    value = torch.randn(8, generator=torch.Generator().manual_seed(1))
    others: list[Method] = []
    if "policy" in methods:
        others.append(SinkRecent(2, 5))
    if "steering" in methods:
        others.append(ActCalibration([(1, 0), (2, 2)], beta=0.1, alpha=1.2))
    with by_hand(lm, SENDER, value, name):
        expected = logits(lm, ids, *others, pieces=pieces)
    assert_near(logits(lm, ids, *others, both(value, name), pieces=pieces), expected, 1e-5)
    assert_near(logits(lm, ids, both(value, name), *others, pieces=pieces), expected, 1e-5)
    assert (expected - logits(lm, ids, *others, pieces=pieces)).abs().max() > 1e-3
    if others:
        assert (expected - logits(lm, ids, both(value, name), pieces=pieces)).abs().max() > 1e-3


def test_an_edge_under_a_policy_generates() -> None:
    lm, ids = random("llama"), tokens(length=16)
    values = {HeadEdge(SENDER, (2, 1), "k"): torch.zeros(8), HeadEdge((1, 0)): torch.zeros(8)}
    with torch.no_grad(), foveate.apply(lm, SinkRecent(2, 4), EdgePatch(values)) as run:
        out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 22) and run.stats.kept < 0.5


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_direct_paths_are_those_of_path_patching_with_frozen_mlps(kind: str) -> None:
    lm = random(kind)
    clean, corrupt, answers = torch.randint(2, 60, (3, 4, 10), generator=torch.Generator().manual_seed(1))
    metric, sent = LogitDifference(answers[:, :2]), head_outputs(lm, corrupt)
    for receiver, name in (((2, 1), "q"), ((2, 1), "k"), ((2, 1), "v"), (None, None)):
        found = path_patch(
            lm, clean, corrupt, answers[:, :2], receivers=None if receiver is None else [receiver],
            component=name or "q", positions="all", freeze_mlps=True,
        )  # fmt: skip
        edges = [HeadEdge(sender, receiver, name) for sender in ((0, 1), (1, 2))]
        patches = {e: EdgePatch({e: sent[e.sender[0]][:, e.sender[1]]}) for e in edges}
        ours = method_effects(lm, clean, patches, metric)
        for edge in edges:
            assert abs(ours[edge]) > 1e-4
            assert ours[edge] == pytest.approx(float(found.changes[edge.sender]), rel=1e-2, abs=2e-5), edge


def test_all_edges_of_a_head_together_are_the_head() -> None:
    """Without MLPs a head acts through its edges alone."""
    lm, ids = copy.deepcopy(random("llama")), tokens()
    for layer in lm.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    outputs = head_outputs(lm, ids.flip(0))
    for sender in (SENDER, (1, 3)):
        later = [(layer, head) for layer in range(sender[0] + 1, 3) for head in range(4)]
        edges = [HeadEdge(sender, end, name) for end in later for name in ("q", "k", "v")] + [HeadEdge(sender)]
        value = outputs[sender[0]][:, sender[1]]
        expected = logits(lm, ids, Patch({sender: value}))
        assert_near(logits(lm, ids, EdgePatch(dict.fromkeys(edges, value))), expected, 1e-5)
        assert (expected - logits(lm, ids)).abs().max() > 1e-3


def test_a_path_carries_the_change_and_nothing_else() -> None:
    """Along a path a receiver has the output that it would have with the edge open, and only the next stop gets it."""
    lm, ids = random("llama"), tokens()
    value = head_outputs(lm, ids.flip(0))[0][:, 1]
    open_edge = EdgePatch({HeadEdge(SENDER, (1, 3), "k"): value})
    with torch.no_grad(), foveate.apply(lm, open_edge):
        inner = head_outputs(lm, ids)[1][:, 3]
    for end in ((2, 0, "v"), None):
        last = HeadEdge((1, 3)) if end is None else HeadEdge((1, 3), (2, 0), "v")
        expected = logits(lm, ids, EdgePatch({last: inner}))
        assert_near(logits(lm, ids, patch_along([SENDER, (1, 3, "k"), end], value)), expected, 1e-5)
        assert (expected - logits(lm, ids)).abs().max() > 1e-4
        assert (expected - logits(lm, ids, open_edge)).abs().max() > 1e-4
    whole = [SENDER, (1, 3, "k"), (2, 0, "v"), None]
    with torch.no_grad(), foveate.apply(lm, EdgePatch({HeadEdge((1, 3), (2, 0), "v"): inner})):
        arrived = head_outputs(lm, ids)[2][:, 0]
    expected = logits(lm, ids, EdgePatch({HeadEdge((2, 0)): arrived}))
    assert_near(logits(lm, ids, patch_along(whole, value)), expected, 1e-5)
    assert [str(edge) for edge in path_edges(whole)] == ["0.1 -> 1.3 k", "1.3 -> 2.0 v", "2.0 -> logits"]


def test_a_path_in_pieces_and_under_a_policy_is_that_in_one() -> None:
    lm, ids, pieces = random("llama"), tokens(length=15), [9, 4, 1, 1]
    value = torch.randn(1, 15, 8, generator=torch.Generator().manual_seed(1))
    path = patch_along([SENDER, (1, 3, "k"), (2, 0, "v"), None], value)
    expected = logits(lm, ids, path)
    assert_near(logits(lm, ids, path, pieces=pieces), expected, 1e-5)
    assert_near(logits(lm, ids, path, SinkRecent(2, 12), pieces=pieces), expected, 1e-5)
    assert (logits(lm, ids, path, SinkRecent(2, 5), pieces=pieces)[:, -1] - expected[:, -1]).abs().max() > 1e-3


def test_zero_mean_and_resample() -> None:
    """Into the logits, without the final norm, an edge is the sender's own part of them."""
    lm, ids = copy.deepcopy(random("llama")), tokens()
    lm.model.norm = nn.Identity()
    found, other, means = head_outputs(lm, ids), head_outputs(lm, ids.flip(0)), head_means(lm, [ids, ids.flip(1)])
    weight = lm.lm_head.weight @ lm.model.layers[1].self_attn.o_proj.weight[:, 16:24]
    before, edge = logits(lm, ids), HeadEdge((1, 2))
    for new, given in ((0.0, {}), (means[1][2], {"means": means}), (other[1][:, 2], {"outputs": other})):
        expected = before + (new - found[1][:, 2]) @ weight.mT
        assert_near(logits(lm, ids, ablate_edges([edge], **given)), expected, 1e-4)
        some = logits(lm, ids, ablate_edges([edge], **given, positions=[3, -2]))
        assert_near(some[:, [3, -2]], expected[:, [3, -2]], 1e-4)
        assert_near(some[:, [0, 5, -1]], before[:, [0, 5, -1]], 1e-4)
        assert_near(  # the last layer's heads reach the logits alone, past the MLP
            logits(lm, ids, ablate_edges([HeadEdge((2, 1))], **given)) - before,
            logits(lm, ids, ablate([(2, 1)], **given)) - before - _through_mlp(lm, ids, given),
            1e-4,
        )  # fmt: skip


def _through_mlp(lm: Any, ids: Tensor, given: dict[str, Any]) -> Tensor:
    """What a change of head 2.1 does to the logits through the last MLP."""
    seen: list[Tensor] = []
    handle = lm.model.layers[2].mlp.register_forward_hook(lambda _, args, made: seen.append(made))
    logits(lm, ids)
    logits(lm, ids, ablate([(2, 1)], **given))
    handle.remove()
    return (seen[1] - seen[0]) @ lm.lm_head.weight.mT


def test_the_edge_of_an_induction_circuit_is_what_it_needs() -> None:
    lm, (ids, answers) = induction_lm(3, 4, 4, matching=[(1, 2)]), recall(6, length=64, answer=2)
    assert accuracy(lm, ids, answers) == 1.0

    def left(*edges: HeadEdge) -> float:
        with foveate.apply(lm, ablate_edges(edges)):
            return accuracy(lm, ids, answers)

    assert left(HeadEdge((0, 0), (1, 2), "k")) < 0.3
    assert left(HeadEdge((1, 2))) < 0.3
    others = [HeadEdge((0, 0), (1, 2), "q"), HeadEdge((0, 0), (1, 2), "v"), HeadEdge((0, 0), (1, 1), "k")]
    assert left(*others, HeadEdge((0, 1), (1, 2), "k"), HeadEdge((0, 0)), HeadEdge((1, 2), (2, 0), "v")) == 1.0


def test_the_block_leaves_no_hook_and_a_copy_has_none() -> None:
    lm, ids = random("gemma2"), tokens()
    method = EdgePatch(own_edges(lm, {"input_ids": ids}))

    def hooks(subject: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.modules())

    before = hooks(lm)
    with foveate.apply(lm, method):
        assert hooks(lm) > before
        made = copy.deepcopy(lm)
    assert hooks(lm) == before
    assert torch.equal(logits(made, ids), logits(lm, ids))
    with pytest.raises(ZeroDivisionError), foveate.apply(lm, method):
        raise ZeroDivisionError
    assert hooks(lm) == before


class Silent(Method):
    def attend(self, site: Any) -> Tensor:
        return torch.zeros_like(site.q)


class Flat(Method):
    def edit_weights(self, site: Any, weights: Tensor) -> Tensor:
        return torch.ones_like(weights) / weights.shape[-1]


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    zero, lm, ids = torch.zeros(8), random("llama"), tokens()
    edge = HeadEdge(SENDER, (1, 3), "k")
    yield "must lead to a later layer", lambda: EdgePatch({HeadEdge((1, 0), (1, 2), "q"): zero})
    yield "input='o' must be one of", lambda: EdgePatch({HeadEdge((0, 0), (1, 2), "o"): zero})  # type: ignore[arg-type]
    yield "must be None for an edge into the logits", lambda: EdgePatch({HeadEdge((0, 0), None, "q"): zero})
    yield "pairs (layer, head)", lambda: ablate_edges([HeadEdge((0,), (1, 2), "q")])  # type: ignore[arg-type]
    yield "edges must be HeadEdge", lambda: ablate_edges([((0, 0), (1, 2), "q")])  # type: ignore[list-item]
    yield "head 0.1 has None", lambda: EdgePatch({edge: None})
    yield "(Dv,) or (B, N, Dv)", lambda: EdgePatch({edge: torch.zeros(2, 3)})
    yield "both given", lambda: ablate_edges([edge], head_means(lm, [ids]), head_outputs(lm, ids))
    yield "head 7.0 must be in a layer whose outputs", lambda: ablate([(7, 0)], head_means(lm, [ids]))
    yield "path", lambda: path_edges([SENDER])
    yield "path", lambda: path_edges([SENDER, None, (2, 1, "q")])
    yield "head 1.9 must be in 0.0..2.3", lambda: logits(lm, ids, ablate_edges([HeadEdge(SENDER, (1, 9), "q")]))
    yield "replaced attention", lambda: logits(lm, ids, Silent(), ablate_edges([edge]))
    yield "which a path uses", lambda: logits(lm, ids, Flat(), patch_along([SENDER, (1, 3, "k"), None], zero))


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value), message


def test_a_model_without_such_edges_is_refused() -> None:
    edge = HeadEdge((0, 0), (1, 0), "q")
    with pytest.raises(UnsupportedModel, match="decoder with a language-model head"):
        logits(model("bert"), tokens(), ablate_edges([edge]))
    with pytest.raises(UnsupportedModel, match="do not sum to the residual stream"):
        logits(random("granite"), tokens(), ablate_edges([edge]))
    with pytest.raises(FoveateError, match="answers must be token ids"):
        LogitDifference(torch.zeros(2, 2))
