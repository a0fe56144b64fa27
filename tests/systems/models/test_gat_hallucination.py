"""A graph of generations: the attention layer, the levels and their scores, the loss, and what neighbours add."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

from foveate.core.errors import FoveateError
from foveate.core.node_graphs import adjacency
from foveate.models import (
    GenerationGraph,
    HallucinationGAT,
    generation_embeddings,
    level_scores,
    ordinal_bits,
    ordinal_levels,
    split_nodes,
)
from foveate.models.graph import generation_graph
from foveate.nn import GraphAttention
from foveate.train import fit_levels, pretrain_embedder, supcon_loss
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support.random_graphs import random_graph
from tests.support.tensors import assert_near, gradients

NO_EDGES = torch.empty(2, 0, dtype=torch.int64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dim: int = 5, out: int = 3, heads: int = 2, **options: Any) -> GraphAttention:
    """Make a layer in float64 in which every parameter has an effect."""
    torch.manual_seed(0)
    made = GraphAttention(dim, out, heads, **options).double()
    if made.bias is not None:
        made.bias.data = randn(*made.bias.shape, seed=9)
    return made


def dense(made: GraphAttention, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and weights (H, N, N) from a softmax over a masked matrix of all pairs; edges go one way."""
    n = len(x)
    seen = torch.eye(n).bool()
    seen[edges[1], edges[0]] = True
    values = (x @ made.lin_src.weight.T).view(n, made.heads, -1).transpose(0, 1)
    sent = (values * made.att_src[0, :, None]).sum(-1)
    asked = (values * made.att_dst[0, :, None]).sum(-1)
    logits = asked[:, :, None] + sent[:, None, :]
    logits = torch.where(logits > 0, logits, made.slope * logits)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    heads = weights @ values
    out = torch.cat(list(heads), -1) if made.concat else heads.mean(0)
    return out if made.bias is None else out + made.bias, weights


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"concat": True}, {"bias": False}, {"slope": 0.5}, {"heads": 3}], ids=str)
def test_the_layer_is_a_masked_softmax(options: dict[str, Any]) -> None:
    _, edges = random_graph(12, 0.3, 0)  # one direction of each
    edges = torch.cat([edges, torch.tensor([[4], [4]])], 1)  # a loop is given once more
    made, x = layer(**options), 3 * randn(12, 5)
    x.requires_grad_()
    out, weights = dense(made, x, edges)
    assert_near(made(x, edges), out, 1e-12)
    inputs = [x, *made.parameters()]
    for ours, theirs in zip(gradients(made(x, edges), inputs), gradients(out, inputs), strict=True):
        assert_near(ours, theirs, 1e-10)
    (source, target), found = made.weights(x, edges)
    whole = torch.zeros_like(weights).index_put((torch.arange(made.heads)[:, None], target, source), found.T)
    assert_near(whole, weights, 1e-12)


def test_weights_add_up_to_one_and_loud_nodes_stay_finite() -> None:
    _, edges = random_graph(12, 0.3, 0)
    both = torch.cat([edges, edges.flip(0)], 1)
    for gain in (1.0, 1e6):
        (_, target), weights = layer().weights(gain * randn(12, 5), both)
        assert_near(torch.zeros(12, 2).double().index_add(0, target, weights), torch.ones(12, 2).double(), 1e-12)
    assert len(target) == both.shape[1] + 12
    assert torch.equal(adjacency(both, 12).sum(1) + 1, target.bincount())


def test_dropout_takes_weights_in_training_alone() -> None:
    made, x, edges = layer(dropout=0.5), randn(12, 5), random_graph(12, 0.5, 0)[1]
    assert not torch.equal(made(x, edges), made(x, edges))
    made.eval()
    assert torch.equal(made(x, edges), made(x, edges))
    assert_near(made(x, edges), dense(made, x, edges)[0], 1e-12)


# -- the network's limits ----------------------------------------------------------------------------------------------


def network(dim: int = 6, seed: int = 0, **options: Any) -> HallucinationGAT:
    torch.manual_seed(seed)
    return HallucinationGAT(dim, 8, 4, **options).double()


def test_without_edges_it_is_a_linear_classifier_of_each_node() -> None:
    gat, x = network(), randn(9, 6)
    hidden = gat.linear(gat.embedder[2](torch.relu(gat.embedder[0](x))))
    mean = gat.conv.lin_src.weight.view(2, 3, 4).mean(0)
    assert_near(gat(x, NO_EDGES), hidden @ mean.T + gat.conv.bias, 1e-12)


def test_equal_heads_are_one_head() -> None:
    two, one, x = network(), network(heads=1), randn(9, 6)
    _, edges = random_graph(9, 0.4, 1)
    state = {name: value.clone() for name, value in two.state_dict().items()}
    state["conv.lin_src.weight"][3:] = state["conv.lin_src.weight"][:3]
    for name in ("conv.att_src", "conv.att_dst"):
        state[name][:, 1] = state[name][:, 0]
    two.load_state_dict(state)
    for name in ("conv.att_src", "conv.att_dst"):
        state[name] = state[name][:, :1]
    one.load_state_dict(state | {"conv.lin_src.weight": state["conv.lin_src.weight"][:3]})
    assert_near(two(x, edges), one(x, edges), 1e-12)


def test_attention_is_that_of_the_layer_and_parts_have_the_release_s_names() -> None:
    gat, x = network(), randn(9, 6)
    _, edges = random_graph(9, 0.4, 1)
    hidden = gat.linear(gat.embedder(x))
    assert torch.equal(gat.attention(x, edges)[1], gat.conv.weights(hidden, edges)[1])
    assert {name: tuple(value.shape) for name, value in HallucinationGAT().state_dict().items()} == {
        "embedder.0.weight": (768, 768), "embedder.0.bias": (768,), "embedder.2.weight": (128, 768),
        "embedder.2.bias": (128,), "linear.weight": (32, 128), "linear.bias": (32,), "conv.att_src": (1, 2, 3),
        "conv.att_dst": (1, 2, 3), "conv.bias": (3,), "conv.lin_src.weight": (6, 32),
    }  # fmt: skip


# -- levels ------------------------------------------------------------------------------------------------------------


def test_levels_go_round_and_the_last_bit_decides() -> None:
    levels = torch.tensor([0, 1, 2, 3])
    bits = ordinal_bits(levels)
    assert bits.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert torch.equal(ordinal_levels(bits), levels)
    assert torch.equal(ordinal_levels(bits - 0.5), levels)
    assert ordinal_levels(torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])).tolist() == [3, 2, 0]
    for count in (2, 5):
        assert torch.equal(ordinal_levels(ordinal_bits(torch.arange(count), count)), torch.arange(count))


def rewritten(logits: Tensor) -> int:
    """The release's level of a row: bits rounded twice, and looked through from the last."""
    bits = logits.sigmoid().round().sigmoid().round()
    return next((3 - at for at in range(3) if bits[2 - at] == 1), 0)


def test_levels_are_the_release_s() -> None:
    logits = 2 * randn(200, 3)
    assert ordinal_levels(logits).tolist() == [rewritten(row) for row in logits]


@pytest.mark.parametrize("present", [4, 3])
def test_scores_are_scikit_learn_s(present: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(present, (2, 200), generator=draw)
    found, seen = level_scores(predicted, labels), range(present)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found.recall == pytest.approx(metrics.recall_score(labels, predicted, average="macro"))
    assert found.precision == pytest.approx(metrics.precision_score(labels, predicted, average="macro"))
    areas = [metrics.average_precision_score(labels == level, predicted == level) for level in seen]
    assert found.auprc == pytest.approx(sum(areas) / 4)
    assert found.agreement == pytest.approx(float(((labels - predicted).abs() < 2).double().mean()))
    if present == 4:
        ends = (labels == 0) | (labels == 3)
        assert found.binary_recall == pytest.approx(metrics.recall_score(labels[ends] > 0, predicted[ends] > 0))
    else:
        assert math.isnan(found.binary_recall)


# -- the graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 1000])
def test_edges_are_the_similar_pairs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_graph, "_ROWS", rows)
    x = randn(15, 4) * torch.linspace(0.1, 5, 15, dtype=torch.float64)[:, None]
    graph = GenerationGraph(x, 0.5)
    expected = {
        (i, j): float(F.cosine_similarity(x[i], x[j], 0)) for i in range(15) for j in range(15) if i != j
        and float(F.cosine_similarity(x[i], x[j], 0)) >= 0.5
    }  # fmt: skip
    pairs = [tuple(pair) for pair in graph.edge_index.T.tolist()]
    assert len(pairs) == len(expected) and set(pairs) == set(expected)
    assert [expected[pair] for pair in pairs] == pytest.approx(graph.similarity.tolist())
    assert graph.nodes == 15


def test_the_threshold_belongs_to_the_edges_and_lonely_nodes_stay() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    assert GenerationGraph(x, 1.0).edge_index.tolist() == [[2, 1], [1, 2]]
    assert GenerationGraph(x, 0.0).edge_index.shape[1] == 2 * 5
    assert GenerationGraph(x[:0]).edge_index.shape == (2, 0)


def test_edges_within_some_nodes() -> None:
    graph = GenerationGraph(randn(20, 3), 0.3)
    nodes = torch.tensor([3, 17, 4, 9, 0, 11])
    kept = {tuple(pair) for pair in graph.within(nodes).T.tolist()}
    every = {tuple(pair) for pair in graph.edge_index.T.tolist()}
    assert kept == {(a, b) for a, b in every if a in nodes and b in nodes} and 0 < len(kept) < len(every)


def test_similarities_are_not_read() -> None:
    """Other embeddings with the same edges have other similarities; the logits depend on the edges alone."""
    x = randn(20, 6)
    first, second = GenerationGraph(x, 0.3), GenerationGraph(x + 1e-4 * randn(20, 6, seed=1), 0.3)
    assert torch.equal(first.edge_index, second.edge_index) and not torch.equal(first.similarity, second.similarity)
    assert torch.equal(network()(x, first.edge_index), network()(x, second.edge_index))


def test_nodes_are_split_once() -> None:
    split = split_nodes(101)
    assert [len(part) for part in split] == [70, 15, 16]
    assert torch.equal(torch.cat(split).sort().values, torch.arange(101))
    assert torch.equal(split.test, split_nodes(101).test) and not torch.equal(split.test, split_nodes(101, 1).test)


class Words:
    """A tokenizer: a word is its length in letters; `[CLS]` comes first."""

    def __call__(self, texts: list[str], return_tensors: str, padding: bool) -> BatchEncoding:
        ids = [[1, *(1 if word == "[CLS]" else 2 + len(word) for word in text.split())] for text in texts]
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids])
        padded = torch.tensor([each + [0] * (longest - len(each)) for each in ids])
        return BatchEncoding({"input_ids": padded, "attention_mask": mask})


@pytest.mark.parametrize("prefix", ["[CLS] ", ""])
def test_embeddings_are_the_first_token_s_last_state(prefix: str) -> None:
    bert, texts = tiny("bert"), ["one two", "a much longer text", "x"]
    found = generation_embeddings(bert, Words(), texts, batch=2, **({} if prefix else {"prefix": ""}))
    for text, vector in zip(texts, found, strict=True):
        ids = [1, *([1] if prefix else []), *(2 + len(word) for word in text.split())]
        with torch.no_grad():
            alone = bert(torch.tensor([ids])).last_hidden_state[0, 0]
        assert_near(vector, alone, 1e-4)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_the_loss_is_that_by_loops(own: bool) -> None:
    z, labels = randn(9, 4), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 0])  # the only 2 has no positive
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(9):
        s = torch.stack([F.cosine_similarity(z[i], z[k], 0) / 0.2 for k in range(9)])
        row = torch.logsumexp(s if own else torch.cat([s[:i], s[i + 1 :]]), 0)
        each = [row - s[j] for j in range(9) if j != i and labels[j] == labels[i]]
        if each:
            total, count = total + torch.stack(each).mean(), count + 1
    options = {} if own else {"own": False}
    assert_near(supcon_loss(z, labels, 0.2, **options), total / count, 1e-12)


@pytest.mark.parametrize("own", [True, False])
def test_the_loss_of_strangers_is_zero_without_nan(own: bool) -> None:
    for z, labels in ((randn(3, 4), torch.tensor([0, 1, 2])), (randn(1, 4), torch.tensor([0]))):
        z.requires_grad_()
        loss = supcon_loss(z, labels, own=own)
        loss.backward()
        assert loss.item() == 0.0 and z.grad is not None and not z.grad.isnan().any()


# -- what the paper claims ---------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """Generations of four levels that overlap; some embeddings are noise, the graph was made before."""

    x: Tensor
    levels: Tensor
    graph: GenerationGraph


def planted(seed: int, count: int = 360, spread: float = 4.0, lost: float = 0.3, threshold: float = 0.35) -> Planted:
    draw = torch.Generator().manual_seed(seed)
    levels = torch.randint(4, (count,), generator=draw)
    centres = F.normalize(torch.randn(4, 64, generator=draw), dim=-1) * spread
    clean = centres[levels] + torch.randn(count, 64, generator=draw)
    noise = torch.randn(count, 64, generator=draw) * clean.std()
    x = torch.where(torch.rand(count, 1, generator=draw) < lost, noise, clean)
    return Planted(x, levels, GenerationGraph(clean, threshold))


def accuracy_of(data: Planted, edges: Tensor, seed: int, train_edges: Tensor | None = None) -> float:
    """Train a network and return its accuracy on test nodes."""
    torch.manual_seed(seed)
    split, gat = split_nodes(len(data.x), seed), HallucinationGAT(64, 32, 16)
    fit_levels(
        gat, data.x, edges if train_edges is None else train_edges, data.levels, split.train,
        validation=split.validation, epochs=60, lr=1e-2,
    )  # fmt: skip
    with torch.no_grad():
        predicted = ordinal_levels(gat(data.x, edges))
    return level_scores(predicted[split.test], data.levels[split.test]).accuracy


def rewired(edges: Tensor, nodes: int, seed: int) -> Tensor:
    """Return as many edges between random nodes."""
    ends = torch.randint(nodes, (2, edges.shape[1] // 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([ends, ends.flip(0)], 1)


def test_neighbours_tell_the_level_of_a_spoilt_embedding(claim: ClaimFixture) -> None:
    gat, alone, random = 0.0, 0.0, 0.0
    for seed in range(3):
        data = planted(seed)
        edges = data.graph.edge_index
        gat += accuracy_of(data, edges, seed) / 3
        alone += accuracy_of(data, NO_EDGES, seed) / 3
        random += accuracy_of(data, rewired(edges, len(data.x), seed), seed) / 3
    claim(
        "accuracy of levels with attention to similar generations, 30% of embeddings spoilt, 3 seeds", ours=gat,
        baseline=alone, better="higher", margin=0.05, baseline_name="the same network without edges, an MLP", seed=0,
    )  # fmt: skip
    claim(
        "accuracy of levels with edges between similar generations, 3 seeds", ours=gat, baseline=random,
        better="higher", margin=0.05, baseline_name="as many edges between random ones", seed=0,
    )  # fmt: skip
    assert random < alone + 0.02


def test_it_generalises_to_generations_without_an_edge_in_training(claim: ClaimFixture) -> None:
    data = planted(0)
    split = split_nodes(len(data.x), 0)
    seen = torch.cat([split.train, split.validation])
    ours = accuracy_of(data, data.graph.edge_index, 0, train_edges=data.graph.within(seen))
    claim(
        "accuracy on generations that no edge of the training touches", ours=ours,
        baseline=accuracy_of(data, NO_EDGES, 0), better="higher", margin=0.05, baseline_name="without edges, an MLP",
        seed=0,
    )  # fmt: skip


def nearest(known: Tensor, levels: Tensor, asked: Tensor, k: int = 5) -> Tensor:
    """The most frequent level among the k most similar known states."""
    near = (F.normalize(asked, dim=-1) @ F.normalize(known, dim=-1).T).topk(k).indices
    return F.one_hot(levels[near], 4).sum(1).argmax(-1)


def gap(z: Tensor, levels: Tensor) -> float:
    """The mean cosine of pairs of one level, less that of pairs of two."""
    cosine, same = F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).T, levels[:, None] == levels
    other = ~torch.eye(len(z)).bool()
    return float(cosine[same & other].mean() - cosine[~same].mean())


def test_contrastive_training_parts_the_levels(claim: ClaimFixture) -> None:
    data = planted(0, 480, spread=5.0, lost=0.0)
    torch.manual_seed(0)
    split, embedder = split_nodes(len(data.x), 0), HallucinationGAT(64, 32, 16).embedder
    known, asked = data.x[split.train], data.x[split.test]

    def state() -> tuple[float, float]:
        with torch.no_grad():
            z, unseen = embedder(known), embedder(asked)
        found = nearest(z, data.levels[split.train], unseen)
        return gap(unseen, data.levels[split.test]), level_scores(found, data.levels[split.test]).accuracy

    before, before_knn = state()
    losses = pretrain_embedder(embedder, known, data.levels[split.train], epochs=80, batch=64, lr=1e-3)
    after, after_knn = state()
    assert losses[-1] < 0.8 * losses[0] and len(losses) == 80
    claim(
        "cosine of held-out generations of one level, less that of two levels", ours=after, baseline=before,
        better="higher", margin=0.2, baseline_name="before contrastive training", seed=0,
    )  # fmt: skip
    claim(
        "accuracy of 5 nearest neighbours on held-out generations", ours=after_knn, baseline=before_knn,
        better="higher", baseline_name="before contrastive training", seed=0,
    )  # fmt: skip


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_follows_its_description() -> None:
    """Adam on the bits of the training nodes, step by step; nothing else is read."""
    data, split = planted(1, 60), split_nodes(60, 0)
    torch.manual_seed(0)
    ours, theirs = HallucinationGAT(64, 8, 4), HallucinationGAT(64, 8, 4)
    theirs.load_state_dict(ours.state_dict())
    unread = data.levels.clone()
    unread[split.test] = 3 - unread[split.test]
    losses = fit_levels(ours, data.x, data.graph.edge_index, unread, split.train, epochs=5, lr=1e-2)
    optimiser = torch.optim.Adam(theirs.parameters(), lr=1e-2, weight_decay=5e-4)
    for loss in losses:
        found = F.binary_cross_entropy_with_logits(
            theirs(data.x, data.graph.edge_index)[split.train], ordinal_bits(data.levels[split.train])
        )
        assert found.item() == pytest.approx(loss, rel=1e-5)
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
    assert not ours.training


class Plan(nn.Module):
    """A network whose validation recall goes up and down by plan: its weight counts the steps."""

    def __init__(self, right: list[int]) -> None:
        super().__init__()
        self.right, self.step = right, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        if self.training:
            return x * 0 + self.step * 0 - 1.0 * self.step  # a slope of one sign: the weight moves one way
        at = min(round(abs(float(self.step.detach())) / 0.1), len(self.right)) - 1
        levels = torch.where(torch.arange(len(x)) < self.right[at], torch.arange(len(x)) % 2, 2)
        return 2 * ordinal_bits(levels) - 1


def test_the_best_epoch_on_validation_nodes_is_kept() -> None:
    levels = torch.arange(8) % 2
    network = Plan([2, 6, 4, 6])
    fit_levels(
        network, torch.zeros(8, 3), NO_EDGES, levels, torch.arange(2), validation=torch.arange(8), epochs=4, lr=0.1,
        decay=0.0,
    )  # fmt: skip
    assert abs(network.step.item()) == pytest.approx(0.2, rel=1e-2), "the first of the two best"


def test_batches_are_whole_and_small_data_is_one_batch() -> None:
    x, levels, seen = randn(10, 3, dtype=torch.float32), torch.arange(10) % 2, []
    embedder = nn.Linear(3, 4)
    embedder.register_forward_hook(lambda module, given, made: seen.append(len(given[0])))
    pretrain_embedder(embedder, x, levels, epochs=2, batch=4)
    assert seen == [4, 4, 4, 4]
    seen.clear()
    pretrain_embedder(embedder, x, levels, epochs=2, batch=256)
    assert seen == [10, 10] and not embedder.training


# -- refusals ----------------------------------------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    x, levels = randn(5, 6), torch.arange(5) % 4
    yield "heads=0 must be a whole number", lambda: HallucinationGAT(heads=0)
    yield "levels=1 must be a whole number", lambda: HallucinationGAT(levels=1)
    yield "dropout=2.0 must be in", lambda: HallucinationGAT(dropout=2.0)
    yield "concat=1 must be True or False", lambda: GraphAttention(3, 3, concat=1)  # type: ignore[arg-type]
    yield r"x must be embeddings \(N, C=6\)", lambda: network()(x[:, :5], NO_EDGES)
    yield r"x must be nodes \(N, C=5\)", lambda: layer()(x, NO_EDGES)
    yield r"edges must name nodes that are in 0..4", lambda: network()(x, torch.tensor([[5], [0]]))
    yield "embeddings must be numbers", lambda: GenerationGraph(x.long())
    yield "threshold=2 must be in", lambda: GenerationGraph(x, 2)
    yield "nodes must be in 0..4", lambda: GenerationGraph(x).within(torch.tensor([7]))
    yield "shares=.* must be in", lambda: split_nodes(5, shares=(0.9, 0.3))
    yield "at least one text", lambda: generation_embeddings(tiny("bert"), Words(), [])
    yield "levels must be in 0..3; got 0..4", lambda: ordinal_bits(torch.tensor([0, 4]))
    yield "labels must be whole numbers", lambda: level_scores(levels, levels.float())  # type: ignore[arg-type]
    yield "predicted and labels must be", lambda: level_scores(levels, levels[:2])
    yield "temperature=0 must be a number above 0", lambda: supcon_loss(x, levels, 0)
    yield "z must be states", lambda: supcon_loss(x, levels[:3])
    yield "x and labels must be", lambda: pretrain_embedder(nn.Linear(6, 2), x, levels[:3])
    yield r"levels must be \(N=5,\)", lambda: fit_levels(network(), x, NO_EDGES, levels[:4], torch.arange(3))


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
