"""Attribution patching: the derivative of true patching, exact where that is linear, and in its order on the lab."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from foveate.core.errors import FoveateError
from foveate.lens import (
    EdgePatch,
    HeadEdge,
    LogitDifference,
    Patch,
    attribute_edges,
    attribute_heads,
    head_means,
    head_outputs,
    method_effects,
    retrieval_prompts,
)
from foveate.lens.circuits.edge_attribution import EdgeAttributions
from foveate.lens.parts.rank_correlation import rank_correlation
from tests.lens.test_direct_effects import random
from tests.support.constructed import BOS, KEYS, VALUES, induction_lm
from tests.support.host_models import model, padded, tokens
from tests.support.lab import lab

#: Edges of every kind in a model of three layers.
EDGES = [
    HeadEdge((0, 1), (1, 2), "q"), HeadEdge((0, 1), (2, 3), "k"), HeadEdge((1, 0), (2, 2), "v"),
    HeadEdge((0, 3), (1, 0), "k"), HeadEdge((0, 2)), HeadEdge((2, 1)),
]  # fmt: skip


def texts(seed: int = 1) -> tuple[Tensor, Tensor, LogitDifference]:
    clean, corrupt, answers = torch.randint(2, 60, (3, 4, 10), generator=torch.Generator().manual_seed(seed))
    return clean, corrupt, LogitDifference(answers[:, :2])


def plain(name: str = "llama") -> LlamaForCausalLM:
    """A model without MLPs and norms, whose last layer's heads reach the logits in a linear way."""
    lm = copy.deepcopy(model(name))
    for layer in lm.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    lm.model.norm = nn.Identity()
    return lm


def true_heads(lm: Any, clean: Any, sent: dict[int, Tensor], metric: Any) -> Tensor:
    layers, heads = len(sent), sent[0].shape[1]
    patches = {(la, h): Patch({(la, h): sent[la][:, h]}) for la in range(layers) for h in range(heads)}
    return torch.tensor(list(method_effects(lm, clean, patches, metric).values()), dtype=torch.float64).view(
        layers, heads
    )


def true_edges(lm: Any, clean: Any, sent: dict[int, Tensor], metric: Any, edges: list[HeadEdge]) -> Tensor:
    patches = {edge: EdgePatch({edge: sent[edge.sender[0]][:, edge.sender[1]]}) for edge in edges}
    return torch.tensor(list(method_effects(lm, clean, patches, metric).values()), dtype=torch.float64)


def test_it_is_exact_where_patching_is_linear() -> None:
    """Heads of the last layer; edges into the logits and into the values of the last layer, and all edges into it with
    its heads computed anew."""
    lm, (clean, corrupt, metric) = plain(), texts()
    sent = head_outputs(lm, corrupt)
    found, true = attribute_heads(lm, clean, sent, metric), true_heads(lm, clean, sent, metric)
    assert torch.allclose(found.table[2], true[2], atol=1e-4)
    assert true[2].abs().min() > 1e-2
    assert found.value == pytest.approx(float(metric(lm(clean).logits)), abs=1e-5)
    edges = attribute_edges(lm, clean, sent, metric)
    linear = [HeadEdge((layer, head)) for layer in range(3) for head in range(4)]
    linear += [HeadEdge((layer, 1), (2, head), "v") for layer in range(2) for head in range(4)]
    true = true_edges(lm, clean, sent, metric, linear)
    assert torch.allclose(estimates(edges, linear), true, atol=1e-4)
    others = [HeadEdge((layer, 1), (2, head), name) for layer in range(2) for head in range(4) for name in ("q", "k")]
    true = true_edges(lm, clean, sent, metric, others)
    exact = attribute_edges(lm, clean, sent, metric, exact_heads=True)
    assert torch.allclose(estimates(exact, others), true, atol=1e-4)
    assert torch.allclose(estimates(exact, linear), estimates(edges, linear),
                          atol=1e-4)  # fmt: skip
    assert (estimates(edges, others) - true).abs().max() > 1e-3


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "phi", "olmo2"])
def test_it_is_the_derivative_of_true_patching(name: str, exact: bool) -> None:
    """The slope of patches that go a little of the way; the estimates of exact heads are of small patches too."""
    lm, (clean, corrupt, metric) = random(name), texts()
    own, other = head_outputs(lm, clean), head_outputs(lm, corrupt)
    step = 0.005
    near = {layer: z + step * (other[layer] - z) for layer, z in own.items()}
    far = {layer: z - step * (other[layer] - z) for layer, z in own.items()}
    edges = [edge for edge in EDGES if max(edge.sender[0], (edge.receiver or (0, 0))[0]) < len(own)]
    slope = (true_edges(lm, clean, near, metric, edges) - true_edges(lm, clean, far, metric, edges)) / (2 * step)
    sent = near if exact else other
    found = attribute_edges(lm, clean, sent, metric, exact_heads=exact)
    ours = estimates(found, edges) / (step if exact else 1.0)
    assert torch.allclose(ours, slope, rtol=0.02 if exact else 0.01, atol=2e-3), (ours, slope)
    assert slope.abs().max() > 1e-2
    if not exact:
        heads = attribute_heads(lm, clean, other, metric)
        slope = (true_heads(lm, clean, near, metric) - true_heads(lm, clean, far, metric)) / (2 * step)
        assert torch.allclose(heads.table, slope, rtol=0.01, atol=2e-3)


def test_padding_is_no_part_of_it() -> None:
    lm, ids = random("llama"), tokens()
    given = dict(zip(("input_ids", "attention_mask"), padded(ids, "left"), strict=True))
    metric = LogitDifference(ids[:, :2])
    means = head_means(lm, [ids])
    found = attribute_edges(lm, given, means, metric)
    alone = [
        attribute_edges(lm, {k: v[row : row + 1, 4 * (1 - row) :] for k, v in given.items()}, means,
                        LogitDifference(ids[row : row + 1, :2]))
        for row in range(2)
    ]  # fmt: skip
    for table in ("heads", "logits"):
        expected = sum(getattr(each, table) for each in alone) / 2
        assert torch.allclose(getattr(found, table), expected, atol=1e-4)


@cache
def on_the_lab() -> tuple[Any, Tensor, dict[int, Tensor], LogitDifference]:
    lm, tokenizer = lab()
    prompts = retrieval_prompts(3, 256, seed=3)
    clean, corrupt = (
        tokenizer([getattr(p, k) for p in prompts], return_tensors="pt").input_ids for k in ("clean", "corrupt")
    )
    answers = torch.tensor([[tokenizer.encode(text)[-1] for text in (p.answer, p.distractor)] for p in prompts])
    return lm, clean, head_outputs(lm, corrupt), LogitDifference(answers)


def estimates(found: EdgeAttributions, edges: list[HeadEdge]) -> Tensor:
    return torch.tensor([found.of(edge) for edge in edges], dtype=torch.float64)


def spearman(one: Tensor, other: Tensor) -> float:
    return float(rank_correlation(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


@pytest.mark.slow
def test_on_the_lab_it_orders_heads_as_true_patching_does() -> None:
    lm, clean, sent, metric = on_the_lab()
    found, true = attribute_heads(lm, clean, sent, metric), true_heads(lm, clean, sent, metric)
    assert spearman(found.table, true) > 0.5
    best = {divmod(int(number), 8) for number in true.abs().flatten().topk(4).indices}
    assert len(best & set(found.top(4))) >= 3


@pytest.mark.slow
def test_on_the_lab_it_orders_edges_as_true_patching_does() -> None:
    lm, clean, sent, metric = on_the_lab()
    plain, exact = (attribute_edges(lm, clean, sent, metric, exact_heads=flag) for flag in (False, True))
    edges = [edge for edge, _ in exact.top(25)]
    edges += [edge for edge in plain.edges()[:: len(plain.edges()) // 25] if edge not in edges]
    true = true_edges(lm, clean, sent, metric, edges)
    close, rough = (spearman(estimates(f, edges), true) for f in (exact, plain))
    assert close > 0.7 and rough > 0.5, (close, rough)


def saturated() -> tuple[LlamaForCausalLM, Tensor, Tensor, LogitDifference]:
    """Two keys with values, and the question for one of them; the counterfactual exchanges the two keys."""
    lm = induction_lm(2, 4, 4, matching=[(1, 2)])
    clean = torch.full((1, 24), 5)
    clean[0, 0], clean[0, 4:6], clean[0, 12:14], clean[0, -1] = BOS, torch.tensor([KEYS[0], VALUES[0]]), torch.tensor(
        [KEYS[1], VALUES[1]]), KEYS[0]  # fmt: skip
    corrupt = clean.clone()
    corrupt[0, 4], corrupt[0, 12] = KEYS[1], KEYS[0]
    return lm, clean, corrupt, LogitDifference(torch.tensor([[VALUES[0], VALUES[1]]]))


def test_a_saturated_softmax_hides_an_edge_from_gradients_and_not_from_exact_heads() -> None:
    lm, clean, corrupt, metric = saturated()
    sent, edge = head_outputs(lm, corrupt), HeadEdge((0, 0), (1, 2), "k")
    true = float(true_edges(lm, clean, sent, metric, [edge])[0])
    assert true < -10.0
    plain, exact = (attribute_edges(lm, clean, sent, metric, exact_heads=flag) for flag in (False, True))
    assert abs(plain.of(edge)) < 0.05 * abs(true)
    assert exact.of(edge) < 0.5 * true
    assert {found for found, _ in exact.top(2)} == {edge, HeadEdge((1, 2))}
    assert edge not in [found for found, value in plain.top(3) if abs(value) > 1.0]


def test_dropped_layers_show_effects_that_cancel() -> None:
    """The last layer's heads act through no other layer. An earlier head whose direct effect a later one undoes has no
    estimate, unless a layer is left out."""
    lm, (clean, corrupt, metric) = random("llama"), texts()
    sent = head_outputs(lm, corrupt)
    whole, parts = (attribute_heads(lm, clean, sent, metric, drop_layers=flag) for flag in (False, True))
    assert torch.allclose(parts.by_token[2], whole.by_token[2].abs(), atol=1e-5)
    assert (parts.by_token[0] - whole.by_token[0].abs()).abs().max() > 1e-3
    undone = cancelling()
    sent = head_outputs(undone, corrupt)
    whole, parts = (attribute_heads(undone, clean, sent, metric, drop_layers=flag) for flag in (False, True))
    assert whole.table[0].abs().max() < 1e-3 * parts.table[0].max()


def cancelling() -> LlamaForCausalLM:
    """A model whose second layer subtracts from the stream what its first layer's heads wrote."""
    lm = plain()
    first, second, third = (layer.self_attn for layer in lm.model.layers)
    for projection in (third.o_proj, second.o_proj):
        projection.weight.data.zero_()

    class Undo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x @ keep

    keep = torch.diag((torch.arange(32) >= 16).float())  # heads write to the upper half, tokens lie in the lower one
    lm.model.embed_tokens.weight.data[:, 16:] = 0.0
    first.o_proj.weight.data[:16] = 0.0
    lm.model.layers[1].mlp = Undo()
    return lm


def test_prompts_differ_in_their_names_alone() -> None:
    for prompt in retrieval_prompts(10, 256, seed=2):
        assert len(prompt.clean) == len(prompt.corrupt) == 256 and prompt.clean.endswith(" is ")
        asked = prompt.clean.rsplit("key of ", 1)[1].removesuffix(" is ")
        for words, digit in ((prompt.clean, prompt.answer), (prompt.corrupt, prompt.distractor)):
            assert f"The pass key of {asked} is {digit}" in words
        differ = [one for one, other in zip(prompt.clean, prompt.corrupt, strict=True) if one != other]
        assert 4 <= len(differ) <= 12 and all(letter.isalpha() for letter in differ)
    assert retrieval_prompts(3, seed=1) == retrieval_prompts(3, seed=1)


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    lm, (clean, corrupt, metric) = random("llama"), texts()
    sent = head_outputs(lm, corrupt)
    yield (
        "outputs must hold all layers; [2] are missing",
        lambda: attribute_heads(lm, clean, {layer: sent[layer] for layer in (0, 1)}, metric),
    )
    yield (
        "those of layer 0 must be (4, 4, 10, 8)",
        lambda: attribute_heads(lm, clean, {layer: z[:, :, :5] for layer, z in sent.items()}, metric),
    )
    yield "answers must be token ids (4, 2)", lambda: attribute_edges(lm, clean, sent, LogitDifference(clean[:2, :2]))
    yield (
        "decoder with a language-model head",
        lambda: attribute_edges(model("bert"), tokens(), head_outputs(model("bert"), tokens()), metric),
    )
    yield "count=0", lambda: EdgeAttributions(torch.zeros(1, 1, 1, 1, 3), torch.zeros(1, 1), 0.0).top(0)


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value), message
