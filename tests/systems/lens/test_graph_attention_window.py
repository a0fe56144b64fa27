"""The graph window equals its definitions, reports equal means by hand, and a window teaches a toy decoder links."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor

from foveate.core import as_bias, causal, graph_window_mask
from foveate.core.errors import FoveateError
from foveate.lens import (
    GraphAttentionReport,
    NodeTree,
    attention_maps,
    graph_attention_report,
    link_use,
    shuffle_links,
)
from foveate.models import Decoder
from foveate.nn import MultiHeadAttention
from foveate.ops import Softmax
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support import graph_lm
from tests.support.random_graphs import random_graph
from tests.support.tensors import assert_near, qkv

TREE = NodeTree(7, ((3, (4, 5)), (9, ()), (2, (3,))))
#: Text, the centre, text, and the other mentions with text between them; the last token asks.
NODES = torch.tensor([-1, 0, -1, 1, 2, 3, -1, 4, 5, 6, -1, -1])


def links_by_hand(tree: NodeTree) -> set[tuple[int, int]]:
    found, at = set[tuple[int, int]](), 1
    for _, behind in tree.neighbours:
        found.add((0, at))
        found |= {(at, at + 1 + number) for number in range(len(behind))}
        at += 1 + len(behind)
    return found


def random_tree(seed: int) -> NodeTree:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 4, (int(torch.randint(1, 5, (), generator=draw)),), generator=draw).tolist()
    return NodeTree(
        0, tuple((10 * at, tuple(range(10 * at + 1, 10 * at + 1 + size))) for at, size in enumerate(sizes, 1))
    )


# -- the mask ----------------------------------------------------------------------------------------------------------


def test_a_wide_window_is_the_causal_mask() -> None:
    plain = causal(12, 12)
    for k in (4, 10, None):
        assert torch.equal(graph_window_mask(NODES, TREE.links(), k), plain)
    assert not torch.equal(graph_window_mask(NODES, TREE.links(), 3), plain)
    apart = torch.tensor([[0], [1]])
    assert torch.equal(graph_window_mask(NODES, apart, None), plain)
    assert not torch.equal(graph_window_mask(NODES, apart, 100), plain), "no path joins them"


def test_window_one_is_the_neighbourhood_and_text_is_untouched() -> None:
    found = graph_window_mask(NODES, TREE.links(), 1)
    links, plain = links_by_hand(TREE), causal(12, 12)
    for query, key in ((i, j) for i in range(12) for j in range(12)):
        a, b = int(NODES[query]), int(NODES[key])
        near = a == b or (min(a, b), max(a, b)) in links
        assert bool(found[query, key]) == (bool(plain[query, key]) and (a < 0 or b < 0 or near)), (query, key)


def test_both_directions_open_exactly_the_linked_pairs_of_the_future() -> None:
    one_way = graph_window_mask(NODES, TREE.links(), 1)
    both = graph_window_mask(NODES, TREE.links(), 1, bidirectional=True)
    at = {int(node): place for place, node in enumerate(NODES.tolist()) if node >= 0}
    opened = {(at[a], at[b]) for a, b in links_by_hand(TREE)}
    assert {tuple(pair) for pair in (both & ~one_way).nonzero().tolist()} == opened
    assert not (one_way & ~both).any()


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_windows_of_any_graph_are_networkx(k: int, seed: int) -> None:
    graph, edges = random_graph(12, 0.15, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    found = graph_window_mask(order, edges, k, bidirectional=True)
    for query, node in enumerate(order.tolist()):
        seen = networkx.single_source_shortest_path_length(graph, node, cutoff=k)
        assert {int(order[key]) for key in found[query].nonzero()[:, 0]} == set(seen)
    assert torch.equal(graph_window_mask(order, edges, k), found & causal(12, 12))
    assert torch.equal(graph_window_mask(order, edges, k, causal=False), found)


def released(tree: NodeTree, k: int, bidirectional: bool) -> Tensor:
    """Window of the mentions by the release's steps: entries of parents and children, then powers of E + E^T."""
    parents, lists, at = list[int](), list[list[int]](), 1
    for _, behind in tree.neighbours:
        parents.append(at)
        if behind:
            lists.append(list(range(at + 1, at + 1 + len(behind))))
        at += 1 + len(behind)
    entries = torch.ones(at, at, dtype=torch.int64).tril()
    for parent, children in zip([*parents, 0], [*lists, parents], strict=False):
        for child in children:
            entries[child] = 0
            entries[child, parent] = entries[child, child] = 1
            if bidirectional:
                entries[parent, children] = 1
    power = torch.linalg.matrix_power((entries + entries.T).double(), k) > 0
    return power if bidirectional else power.tril()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_release_is_the_same_on_its_links(k: int, bidirectional: bool) -> None:
    differ = 0
    for seed in range(40):
        tree = random_tree(seed)
        expected = released(tree, k, bidirectional)
        mentions = torch.arange(len(expected))
        found = graph_window_mask(mentions, tree.links("release"), k, bidirectional=bidirectional)
        assert torch.equal(found, expected), tree
        differ += not torch.equal(graph_window_mask(mentions, tree.links(), k, bidirectional=bidirectional), expected)
    assert differ > 5, "its links are wrong behind a neighbour without neighbours"


def test_without_links_nodes_see_themselves_and_text() -> None:
    found = graph_window_mask(NODES, torch.empty(2, 0).long(), 3)
    node = NODES >= 0
    assert torch.equal(found[node][:, node], torch.eye(7).bool())
    assert torch.equal(found[~node], causal(12, 12)[~node])
    text = torch.full((5,), -1)
    assert torch.equal(graph_window_mask(text, TREE.links(), 1), causal(5, 5))


def test_the_release_s_number_for_hidden_pairs_gives_the_same_attention() -> None:
    q, k, v = qkv(12, kv_heads=4)
    seen = graph_window_mask(NODES, TREE.links(), 1)
    node = NODES >= 0
    bias = as_bias(causal(12, 12), torch.float64).masked_fill(~seen & node[:, None] & node, -6000.0)
    assert_near(Softmax()(q, k, v, mask=bias), Softmax()(q, k, v, mask=seen), 1e-12)


def test_operators_layers_and_pretrained_models_take_the_mask() -> None:
    seen = graph_window_mask(NODES, TREE.links(), 1)
    hidden = causal(12, 12) & ~seen
    q, k, _ = qkv(12, kv_heads=4)
    assert float(Softmax().weights(q, k, mask=seen)[..., ~seen].abs().max()) == 0.0
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(16, 2), torch.randn(2, 12, 16)
    other = x.clone()
    other[:, 5] += 1.0  # mention 3, which only mention 1 and itself are linked to
    changed = (layer(x, mask=seen) - layer(other, mask=seen)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == (seen[:, 5] & (torch.arange(12) >= 5)).tolist()
    lm = tiny("llama")
    ids = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = as_bias(seen, torch.float32).expand(2, 1, 12, 12)
    maps = attention_maps(lm, ids, attention_mask=mask)
    assert float(maps[..., hidden].abs().max()) == 0.0
    assert float(maps[..., seen].min()) > 0.0
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        eager = lm(ids, attention_mask=mask, output_attentions=True).attentions
    assert_near(maps, torch.stack(eager, 1), 1e-5)


# -- trees -------------------------------------------------------------------------------------------------------------


def test_a_tree_is_listed_in_order() -> None:
    assert TREE.mentions == [7, 3, 4, 5, 9, 2, 3]
    assert TREE.hops.tolist() == [0, 1, 2, 2, 1, 1, 2]
    assert {tuple(pair) for pair in TREE.links().T.tolist()} == links_by_hand(TREE)
    assert torch.equal(TREE.at_tokens([1, 3, 4, 5, 7, 8, 9], 12), NODES)
    assert NodeTree(3).links().shape == (2, 0) and NodeTree(3).mentions == [3]
    assert {tuple(pair) for pair in TREE.links("release").T.tolist()} == {
        (1, 2),
        (1, 3),
        (4, 6),
        (5, 1),
        (5, 4),
        (5, 5),
    }


def test_a_tree_is_sampled_from_a_graph() -> None:
    graph, edges = random_graph(40, 0.3, 0)
    whole = NodeTree.sample(edges, 3, (100, 100))
    assert [node for node, _ in whole.neighbours] == sorted(graph[3])
    for node, behind in whole.neighbours:
        assert behind == tuple(sorted(set(graph[node]) - {3}))
    few = NodeTree.sample(edges, 3, (4, 2), torch.Generator().manual_seed(0))
    assert len(few.neighbours) == 4 and all(len(behind) == 2 for _, behind in few.neighbours)
    for node, behind in few.neighbours:
        assert node in graph[3] and set(behind) <= set(graph[node]) - {3}
    assert few != NodeTree.sample(edges, 3, (4, 2), torch.Generator().manual_seed(1))
    assert len(NodeTree.sample(edges, 3).neighbours) == min(8, len(graph[3]))


# -- shuffled links ----------------------------------------------------------------------------------------------------

WIDE = NodeTree(0, ((1, (11, 12, 13)), (2, (21,)), (3, (31, 32)), (4, ())))


def shuffled(level: Any, seed: int = 0) -> NodeTree:
    return shuffle_links(WIDE, level, torch.Generator().manual_seed(seed), range(100, 120))


def test_two_lists_are_swapped() -> None:
    found = shuffled("swap")
    assert [node for node, _ in found.neighbours] == [1, 2, 3, 4]
    before, after = dict(WIDE.neighbours), dict(found.neighbours)
    moved = [node for node in before if before[node] != after[node]]
    assert len(moved) == 2 and after[moved[0]] == before[moved[1]] and after[moved[1]] == before[moved[0]]


def test_beginnings_of_lists_are_exchanged() -> None:
    found = shuffled("exchange")
    assert [(node, len(behind)) for node, behind in found.neighbours] == [(1, 3), (2, 1), (3, 2), (4, 0)]
    assert sorted(found.mentions) == sorted(WIDE.mentions) and found != WIDE
    assert dict(found.neighbours)[1][2] == 13, "longer than any other list"


def test_all_nodes_are_permuted() -> None:
    found = shuffled("permute")
    assert [len(behind) for _, behind in found.neighbours] == [3, 1, 2, 0]
    assert sorted(found.mentions) == sorted(WIDE.mentions) and found.centre == 0
    drawn = [shuffled("permute", seed).mentions[1] for seed in range(600)]
    counts = torch.tensor(drawn).unique(return_counts=True)[1]
    assert len(counts) == 10 and int(counts.min()) > 35, "each node comes first as often"


def test_foreign_nodes_take_places() -> None:
    found = shuffled("replace")
    assert [len(behind) for _, behind in found.neighbours] == [3, 1, 2, 0]
    foreign = [node for node in found.mentions if node >= 100]
    assert len(foreign) >= 5 and found.centre == 0
    rings = torch.tensor([0.0, 0.0])
    for seed in range(200):
        tree = shuffled("replace", seed)
        rings += torch.tensor([[float(node >= 100) for node in tree.mentions]]).mul(
            torch.stack([tree.hops == 1, tree.hops == 2])
        ).sum(1)  # fmt: skip
    assert rings[0] / 800 > 0.9 and 0.6 < rings[1] / 1200 < 0.95, "22 draws, half of them among four neighbours"


def test_nothing_is_left_and_little_changes_in_small_trees() -> None:
    assert shuffled("drop") == NodeTree(0)
    one, draw = NodeTree(0, ((1, (2, 3)),)), torch.Generator().manual_seed(0)
    for level in ("swap", "exchange", "replace"):
        assert shuffle_links(one, level, draw, [9]) == one
    assert shuffle_links(WIDE, "permute", torch.Generator().manual_seed(0)) == shuffled("permute")


def test_the_use_of_links_is_the_fall_of_a_score() -> None:
    """The score reads the true lists; it is the share of neighbours' neighbours in their right list."""
    trees = [WIDE, NodeTree(50, tuple((60 + at, (70 + at,)) for at in range(6)))]
    true = {(node, each) for tree in trees for node, behind in tree.neighbours for each in behind}

    def score(given: Any) -> float:
        pairs = [(node, each) in true for tree in given for node, behind in tree.neighbours for each in behind]
        return sum(pairs) / len(pairs)

    fall = link_use(score, trees)
    assert list(fall) == ["swap", "exchange", "permute", "replace"]
    assert all(0.3 < each <= 1.0 for each in fall.values()) and fall["permute"] > 0.5
    assert link_use(lambda given: 1.0, trees, ["permute"]) == {"permute": 0.0}
    assert link_use(score, trees, seed=1) != fall


# -- the report --------------------------------------------------------------------------------------------------------


def random_maps(t: int, *shape: int, mask: Tensor | None = None, seed: int = 0) -> Tensor:
    logits = 2 * torch.randn(*shape, t, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(~(causal(t, t) if mask is None else mask), float("-inf")).softmax(-1)


def by_hand(attn: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The report of one map, pair by pair."""
    graph = networkx.Graph([(a, b) for a, b in links_by_hand(TREE)])
    hops = dict(networkx.all_pairs_shortest_path_length(graph))
    found: dict[str, list[float]] = {}
    wins, pairs = 0.0, 0
    for i, j in mask.nonzero().tolist():
        a, b, weight = int(NODES[i]), int(NODES[j]), float(attn[i, j])
        kinds = f"{'node' if a >= 0 else 'text'}_{'node' if b >= 0 else 'text'}"
        found.setdefault(kinds, []).append(weight)
        if b >= 0:
            found.setdefault(f"{'node' if a >= 0 else 'text'}_received{b}", []).append(weight)
        if a >= 0 and b >= 0:
            found.setdefault(f"hop{hops[a][b]}", []).append(weight)
            found.setdefault(f"offset{a - b}", []).append(weight)
    for i in range(len(attn)):
        seen = [j for j in range(len(attn)) if mask[i, j] and NODES[i] >= 0 and NODES[j] >= 0]
        for near in (j for j in seen if hops[int(NODES[i])][int(NODES[j])] == 1):
            for far in (j for j in seen if hops[int(NODES[i])][int(NODES[j])] > 1):
                pairs += 1
                wins += float(attn[i, near] > attn[i, far]) + 0.5 * float(attn[i, near] == attn[i, far])
    means = {name: torch.tensor(sum(each) / len(each), dtype=torch.float64) for name, each in found.items()}
    return means | {"auc": torch.tensor(wins / pairs if pairs else torch.nan, dtype=torch.float64)}


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_report_is_that_by_hand(k: int | None, bidirectional: bool) -> None:
    mask = graph_window_mask(NODES, TREE.links(), k, bidirectional=bidirectional)
    attn = random_maps(12, 2, 3, mask=mask)
    attn[0, 1] = (attn[0, 1] * 8).round() / 8  # ties
    plain = k is None and not bidirectional
    report = graph_attention_report(attn, NODES, TREE.links(), mask=None if plain else mask)
    for layer, head in ((0, 1), (1, 2)):
        expected = by_hand(attn[layer, head], mask)
        for name in ("node_node", "node_text", "text_node", "text_text"):
            assert_near(getattr(report, name)[layer, head], expected[name], 1e-12, name)
        for hop in range(5):
            value = report.by_hop[layer, head, hop]
            assert torch.isnan(value) == (f"hop{hop}" not in expected), hop
            assert torch.isnan(value) or abs(value - expected[f"hop{hop}"]) < 1e-12
        for node in range(7):
            assert_near(report.node_received[layer, head, node], expected[f"node_received{node}"], 1e-12)
            assert_near(report.text_received[layer, head, node], expected[f"text_received{node}"], 1e-12)
            if f"offset{node}" in expected:
                assert_near(report.by_offset[layer, head, node], expected[f"offset{node}"], 1e-12)
        assert_near(report.link_auc[layer, head], expected["auc"], 1e-12)


def test_link_auc_tells_attention_to_links_from_any_other() -> None:
    aucs, draw = [], torch.Generator().manual_seed(0)
    for seed in range(10):
        _, edges = random_graph(30, 0.2, seed)
        linked = torch.zeros(30, 30).index_put((edges[0], edges[1]), torch.tensor(1.0))
        weights = ((linked + linked.T > 0) + torch.eye(30)).tril()
        nodes = torch.arange(30)
        planted = graph_attention_report(weights / weights.sum(-1, keepdim=True), nodes, edges)
        assert float(planted.link_auc) == 1.0
        against = graph_attention_report(random_rest := (1 - weights).tril(), nodes, edges)
        assert float(against.link_auc) == 0.0 and random_rest.shape == (30, 30)
        noise = torch.rand(30, 30, generator=draw).tril()
        aucs.append(float(graph_attention_report(noise / noise.sum(-1, keepdim=True), nodes, edges).link_auc))
        uniform = torch.ones(30, 30).tril() / torch.arange(1, 31)[:, None]
        assert float(graph_attention_report(uniform, nodes, edges).link_auc) == 0.5, "ties count by half"
    assert abs(sum(aucs) / 10 - 0.5) < 0.05


def test_sinks_and_skewed_lines_show() -> None:
    nodes, links = torch.arange(9), torch.empty(2, 0).long()
    sink, line = torch.zeros(9, 9), torch.zeros(9, 9)
    sink[:, 0] = 1.0
    line[torch.arange(3, 9), torch.arange(6)] = 1.0
    both = graph_attention_report(torch.stack([sink, line]), nodes, links)
    assert both.node_received[0].tolist() == [1.0] + [0.0] * 8
    assert both.by_offset[1].tolist() == [0.0, 0.0, 0.0, 1.0] + [0.0] * 5
    assert both.by_hop.shape == (2, 5) and torch.isnan(both.link_auc).all() and torch.isnan(both.text_received).all()


def test_reports_of_several_prompts_have_a_mean() -> None:
    small = NodeTree(0, ((1, ()), (2, ())))
    reports = [
        graph_attention_report(random_maps(12, 2), NODES, TREE.links()),
        graph_attention_report(random_maps(4, 2), small.at_tokens([0, 1, 3], 4), small.links()),
    ]
    found = GraphAttentionReport.mean(reports)
    assert_near(found.node_node, (reports[0].node_node + reports[1].node_node) / 2, 1e-12)
    assert_near(found.by_hop[:, 2], (reports[0].by_hop[:, 2] + reports[1].by_hop[:, 2]) / 2, 1e-12)
    assert_near(found.by_hop[:, 4], reports[0].by_hop[:, 4], 1e-12, "no pair of the second is so far apart")
    assert_near(found.by_offset[:, 3:], reports[0].by_offset[:, 3:], 1e-12)
    assert found.node_received.shape == (2, 7)


# -- what the paper claims ---------------------------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    links, attn = TREE.links(), random_maps(12)
    yield "k=-1 must be a whole number", lambda: graph_window_mask(NODES, links, -1)
    yield "bidirectional=1 must be True or False", lambda: graph_window_mask(NODES, links, 1, bidirectional=1)  # type: ignore[arg-type]
    yield "edges must be pairs", lambda: graph_window_mask(NODES, links.T, 1)
    yield "nodes must be the node of each token", lambda: graph_window_mask(NODES.float(), links, 1)
    yield "attn must be weights", lambda: graph_attention_report(attn[:5], NODES, links)
    yield "attn must be weights", lambda: graph_attention_report(attn, NODES[:5], links)
    yield "mask must be bool", lambda: graph_attention_report(attn, NODES, links, mask=attn)
    yield "hops=-1 must be", lambda: graph_attention_report(attn, NODES, links, hops=-1)
    yield "text alone", lambda: graph_attention_report(attn, torch.full((12,), -1), links)
    yield "at least one report", lambda: GraphAttentionReport.mean([])
    yield "variant='code' must be one of", lambda: TREE.links("code")  # type: ignore[arg-type]
    yield "places=.* must be 7 different tokens of the 12", lambda: TREE.at_tokens([1, 2, 3], 12)
    yield "places=.* must be 7 different tokens of the 12", lambda: TREE.at_tokens([1, 1, 3, 4, 5, 6, 7], 12)
    yield "most=-1 must be", lambda: NodeTree.sample(links, 0, (8, -1))
    yield "level='all' must be one of", lambda: shuffle_links(TREE, "all", torch.Generator())  # type: ignore[arg-type]
    yield "others=.* must hold a node", lambda: shuffle_links(TREE, "replace", torch.Generator(), [7, 3])


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_graph_window_teaches_the_links(claim: ClaimFixture) -> None:
    """Few steps: with five times as many the full decoder has learnt the brackets, and uses links as much."""
    heldout, found = graph_lm.problems(256, seed=1), torch.zeros(2, 2)
    for seed in range(2):
        for at, k in enumerate((2, None)):
            lm = graph_lm.train(k, steps=60, seed=seed)

            def score(trees: Sequence[NodeTree], lm: Decoder = lm, k: int | None = k) -> float:
                return graph_lm.accuracy(lm, heldout, k, trees=trees)

            found[at] += (
                torch.tensor([score(heldout.trees), link_use(score, heldout.trees, ["permute"])["permute"]]) / 2
            )
    (ours, lost), (whole, whole_lost) = found.tolist()
    assert lost >= 0.1
    claim(
        "accuracy on a node's label, which its neighbours have, after equal steps with a window of two links, 2 seeds",
        ours=ours, baseline=whole, better="higher", margin=0.1, baseline_name="full causal attention", seed=0,
    )  # fmt: skip
    claim(
        "accuracy that shuffled links cost a decoder trained with a window of two links, 2 seeds", ours=lost,
        baseline=whole_lost, better="higher", margin=0.1, baseline_name="full causal attention", seed=0,
    )  # fmt: skip
