"""BERT's heads: where they look, which arcs they follow, their distances, and probes on all of them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.manifold import smacof
from sklearn.metrics import silhouette_score
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.lens import (
    AttentionProbe,
    ParsedSentence,
    StructuralProbe,
    attention_maps,
    embed_heads,
    head_relation_accuracy,
    js_distance,
    relation_table,
    surface_report,
    to_words,
    weight_gradients,
)
from foveate.lens.heads.bert_attention_analysis import coreference_accuracy, gradient_report, offset_accuracy
from foveate.lens.parts.parse_probes import distance_features, word_pairs
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, text, tiny
from tests.support.tensors import assert_near

WORDS = ["[CLS]", "a", "cat", ",", "sat", "[SEP]", ".", "[SEP]"]


def random_maps(t: int, layers: int = 2, heads: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(layers, heads, t, t, generator=draw, dtype=torch.float64).mul(2).softmax(-1)


def random_tree(n: int, draw: torch.Generator) -> list[int]:
    """Return heads of a tree: a random root, then each word hangs on one that is already in the tree."""
    order, heads = torch.randperm(n, generator=draw).tolist(), [0] * n
    for at, word in enumerate(order[1:], 1):
        heads[word] = order[int(torch.randint(at, (), generator=draw))] + 1
    return heads


def noisy(heads: list[int], hit: float, draw: torch.Generator) -> Tensor:
    """Return a map whose rows put 0.6 on the gold head with probability `hit`, else on any other word."""
    n = len(heads)
    rows = torch.rand(n + 2, n + 2, generator=draw) / (n + 2)
    for word, head in enumerate(heads, 1):
        to = head if head and float(torch.rand((), generator=draw)) < hit else 1 + int(
            torch.randint(n, (), generator=draw)
        )  # fmt: skip
        rows[word, to] += 1.5
    return rows / rows.sum(-1, keepdim=True)


def planted(count: int, hits: list[float], seed: int, transposed: int | None = None) -> list[ParsedSentence]:
    """Return sentences with one layer of heads; each follows the gold arcs with its own probability."""
    draw, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        heads = random_tree(int(torch.randint(6, 12, (), generator=draw)), draw)
        maps = [noisy(heads, hit, draw) for hit in hits]
        if transposed is not None:
            maps[transposed] = maps[transposed].mT
        relations = [
            "root" if not head else "near" if abs(head - at) == 1 else "far" for at, head in enumerate(heads, 1)
        ]
        found.append(ParsedSentence(torch.stack(maps)[None], heads, relations))
    return found


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_by_hand() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.4, 0.1, 0.1], [0.0, 0.2, 0.2, 0.6], [0.25, 0.25, 0.5, 0.0]])
    words = [None, 0, 0, None]
    first = torch.tensor([[0.1, 0.5, 0.4], [0.4, 0.5, 0.1], [0.25, 0.75, 0.0]])
    assert_near(to_words(attention, words), first, 1e-6)
    mean = first.clone()
    mean[1] = torch.tensor([0.2, 0.45, 0.35])
    assert_near(to_words(attention, words, "mean"), mean, 1e-6)
    largest = first.clone()
    largest[1] = torch.tensor([0.4, 0.5, 0.6]) / 1.5
    assert_near(to_words(attention, words, "max"), largest, 1e-6)


@pytest.mark.parametrize("reduction", ["first", "mean", "max"])
def test_rows_keep_their_sum_and_whole_words_are_left_as_they_are(reduction: Any) -> None:
    maps = random_maps(8)
    split = to_words(maps, [None, 0, 0, 0, 1, 2, 2, None], reduction)
    assert split.shape[-2:] == (5, 5)
    assert_near(split.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64), 1e-6)
    assert_near(to_words(maps, [None, *range(6), None], reduction), maps, 1e-12)


# -- surface patterns --------------------------------------------------------------------------------------------------


def test_surface_of_a_uniform_and_a_diagonal_head() -> None:
    n = len(WORDS)
    ahead = torch.eye(n).roll(1, 1)  # row i looks at i + 1
    maps = torch.stack([torch.full((n, n), 1 / n), torch.eye(n), ahead])[None]
    report = surface_report([maps], [WORDS])
    uniform = {"self": 1 / n, "previous": (n - 1) / n / n, "first": 1 / n, "separator": 2 / n, "punctuation": 2 / n}
    for name, value in uniform.items():
        assert float(report[name][0, 0]) == pytest.approx(value, abs=1e-6), name
    assert float(report["entropy"][0, 0]) == pytest.approx(np.log(n), abs=1e-5)
    assert float(report["entropy_first"][0, 0]) == pytest.approx(np.log(n), abs=1e-5)
    assert float(report["entropy_uniform"][0, 0]) == pytest.approx(np.log(n), abs=1e-5)
    assert float(report["self"][0, 1]) == 1.0 and float(report["entropy"][0, 1]) == 0.0
    assert float(report["separator_to_separator"][0, 1]) == 1.0 and float(report["other_to_separator"][0, 1]) == 0.0
    assert float(report["next"][0, 2]) == pytest.approx((n - 1) / n) and float(report["previous"][0, 2]) == 0.0


def test_previous_looks_back_and_a_text_counts_once() -> None:
    back = torch.eye(4).roll(-1, 1)[None, None]  # row i looks at i - 1
    report = surface_report([back, torch.eye(2)[None, None]], [["[CLS]", "a", "b", "[SEP]"], ["[CLS]", "[SEP]"]])
    assert float(report["previous"]) == pytest.approx(0.75 / 2) and float(report["next"]) == 0.0
    assert float(report["self"]) == pytest.approx(0.5)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, padding", [("bert", "none"), ("bert", "right"), ("llama", "none"), ("mistral", "left")])
def test_gradients_are_those_of_the_models_own_weights(kind: str, padding: str) -> None:
    model, inputs = tiny(kind), text(padding)
    real = inputs["attention_mask"].bool()

    def loss(out: Any) -> Tensor:
        return out[0][real][:, :5].square().mean()

    found = weight_gradients(model, inputs, loss)
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True)
    expected = torch.stack(torch.autograd.grad(loss(out), out.attentions), 1)
    seen = torch.stack(eager_maps(model, inputs), 1) > 0
    assert float(expected[seen].abs().max()) > 1e-3
    assert_near(found, expected.masked_fill(~seen, 0.0), 1e-5)


def test_gradients_of_a_frozen_model_and_their_report() -> None:
    model = tiny("bert").requires_grad_(False)
    ids = torch.randint(2, 50, (1, len(WORDS)), generator=torch.Generator().manual_seed(0))
    slopes = weight_gradients(model, ids, lambda out: out[0][0, 0, 0])
    report = gradient_report(slopes, [WORDS])
    assert float(report["separator"][1, 2]) == pytest.approx(float(slopes[0, 1, 2][:, [5, 7]].abs().mean()))
    assert float(report["other"][0, 1]) == pytest.approx(float(slopes[0, 0, 1][:, [1, 2, 4]].abs().mean()))
    last = slopes[0, 1]
    assert float(last[:, 0].abs().max()) > 1e-3, "only the first token's row reaches this loss at the last layer"
    assert float(last[:, 1:].abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["bert", "llama", "mistral"])
def test_maps_are_the_models_own(kind: str) -> None:
    model, inputs = tiny(kind), text("right")
    assert_near(attention_maps(model, inputs), torch.stack(eager_maps(model, inputs), 1), 1e-5)


# -- heads as parsers --------------------------------------------------------------------------------------------------


def test_heads_that_follow_arcs_are_found_and_beat_fixed_offsets(claim: ClaimFixture) -> None:
    sentences = planted(200, [0.0, 0.0, 0.0, 0.8, 0.0], seed=0)
    found = head_relation_accuracy(sentences)["far"]
    assert int(found[0, 0].argmax()) == 3
    row = next(row for row in relation_table(sentences) if row["relation"] == "far")
    assert (row["layer"], row["head"], row["direction"]) == (0, 3, "dependent to head")
    claim(
        "accuracy of the best head on arcs that it follows four times in five",
        ours=row["accuracy"], baseline=row["baseline"], better="higher", margin=0.4,
        baseline_name="the best fixed offset", seed=0,
    )  # fmt: skip


def test_a_head_that_looks_from_head_to_dependent_is_found_transposed() -> None:
    found = head_relation_accuracy(planted(100, [0.0, 0.0, 0.8], seed=1, transposed=2))["all"]
    assert divmod(int(found.argmax()), 3) == (1, 2)
    assert float(found[1, 0, 2]) > float(found[0].max()) + 0.2


def test_a_words_own_weight_and_special_tokens_do_not_count() -> None:
    rows = torch.tensor([
        [0.2, 0.2, 0.2, 0.2, 0.2], [0.5, 0.3, 0.15, 0.05, 0.0], [0.4, 0.0, 0.3, 0.2, 0.1], [0.3, 0.04, 0.06, 0.2, 0.4],
        [0.2, 0.2, 0.2, 0.2, 0.2],
    ])  # fmt: skip
    sentence = ParsedSentence(rows[None, None], [2, 0, 2], ["det", "root", "dobj"])
    found = head_relation_accuracy([sentence])
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(
        {"all": 2 / 3, "det": 1.0, "root": 0.0, "dobj": 1.0}
    )
    # from head to dependent: word 1 is looked at most by word 3, word 3 most by word 2
    assert float(found["det"][1]) == 0.0 and float(found["dobj"][1]) == 1.0


def test_offsets_by_hand() -> None:
    sentence = ParsedSentence(random_maps(6), [2, 4, 4, 0], ["det", "nsubj", "aux", "root"])
    found = offset_accuracy([sentence], (-4, 1, 2))
    assert found["all"] == {-4: 0.25, 1: 0.5, 2: 0.5}
    assert found["root"][-4] == 1.0 and found["nsubj"][2] == 1.0 and found["aux"][1] == 1.0


def test_coreference_by_hand() -> None:
    attention = torch.zeros(1, 2, 6, 6)
    mentions, entities = [0, 2, 4, 5], [7, 8, 7, 8]
    attention[0, 0, 4, 0] = attention[0, 0, 5, 2] = 0.4  # finds both antecedents
    attention[0, 0, 4, 3] = attention[0, 0, 5, 5] = 0.6  # no mention, and the mention itself
    attention[0, 1, 4, 2] = attention[0, 1, 5, 2] = 0.5  # right once
    found, nearest = coreference_accuracy([(attention, mentions, entities)])
    assert found.tolist() == [[1.0, 0.5]] and nearest == 0.0
    assert coreference_accuracy([(attention, [0, 2], [1, 1])])[1] == 1.0


# -- groups of heads ---------------------------------------------------------------------------------------------------


def test_distance_is_scipys_squared() -> None:
    maps = random_maps(7)
    found = js_distance([maps, random_maps(5, seed=1)])
    expected = torch.zeros_like(found)
    for each in (maps, random_maps(5, seed=1)):
        rows = (0.999 * each + 0.001 / each.shape[-1]).flatten(0, 1).numpy()
        expected += torch.tensor([[(jensenshannon(a, b, axis=-1) ** 2).sum() for b in rows] for a in rows])
    assert_near(found, expected, 1e-9)


def test_distance_is_zero_for_equal_maps_only() -> None:
    maps = random_maps(6)
    maps[1, 2] = maps[0, 0]
    found = js_distance([maps])
    assert float(found[0, 5]) == 0.0 and float(found.diagonal().abs().max()) == 0.0
    assert int((found == 0).sum()) == 6 + 2
    ends = torch.eye(2, dtype=torch.float64)
    opposite = js_distance([torch.stack([ends, ends.flip(0)])[None]], smoothing=0.0)
    assert float(opposite[0, 1]) == pytest.approx(2 * np.log(2))


def test_families_of_heads_lie_apart(claim: ClaimFixture) -> None:
    n, draw = 16, torch.Generator().manual_seed(0)
    kinds = [torch.eye(n).roll(1, 1), torch.eye(n)[:1].expand(n, n), torch.full((n, n), 1 / n)]
    maps = [0.6 * kind + 0.4 * torch.rand(n, n, generator=draw).mul(3).softmax(-1) for kind in kinds for _ in range(4)]
    distance = js_distance([torch.stack(maps)[None]])
    places, family = embed_heads(distance), [kind for kind in range(3) for _ in range(4)]
    claim(
        "silhouette of three families of heads in the plane",
        ours=float(silhouette_score(places.numpy(), family)), baseline=0.5, better="higher",
        baseline_name="well apart", seed=0,
    )  # fmt: skip
    ours = (torch.cdist(places, places) - distance).square().sum() / 2
    peer, _ = smacof(distance.numpy(), n_components=2, n_init=8, eps=1e-10, max_iter=1000, random_state=0)
    other = torch.tensor(peer)
    assert float(ours) <= 1.01 * float((torch.cdist(other, other) - distance).square().sum() / 2)
    start = embed_heads(distance, steps=0)
    assert float(ours) < float((torch.cdist(start, start) - distance).square().sum() / 2)


def test_distances_of_a_plane_come_back() -> None:
    points = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = embed_heads(torch.cdist(points, points))
    assert_near(torch.cdist(places, places), torch.cdist(points, points), 1e-6)


# -- probes ------------------------------------------------------------------------------------------------------------


def test_one_weight_is_that_heads_choice_and_the_root_has_its_column() -> None:
    sentence = ParsedSentence(random_maps(7, 2, 3), [0, 1, 1, 2, 3], ["x"] * 5)
    maps = sentence.attention.flatten(0, 1)
    for head in (0, 4):
        for flipped, each in enumerate((maps[head], maps[head].mT)):
            probe = AttentionProbe(6)
            probe.weights.data[head + 6 * flipped] = 3.0
            probe.root.data = torch.tensor([2.0, -1.0])
            logits = probe(sentence)
            assert logits[:, 1:].argmax(-1).tolist() == each[1:-1, 1:-1].argmax(-1).tolist()
            assert_near(logits[:, 0].double(), 3 * (2 * each[1:-1, 0] - each[1:-1, -1]), 1e-6)
            assert probe.predict(sentence).tolist() == logits.argmax(-1).tolist()


def test_weights_are_linear_in_the_words_with_a_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 4, generator=draw)
    sentence = ParsedSentence(random_maps(7, 1, 2), [0, 1, 1, 2, 3], ["x"] * 5, vectors)
    probe = AttentionProbe(2, words=4)
    probe.dense.weight.data.normal_(generator=draw)
    probe.dense.bias.data.normal_(generator=draw)
    maps = torch.cat([sentence.attention[0], sentence.attention[0].mT]).float()
    for word, candidate in ((0, 3), (4, 1)):
        weights = probe.dense(torch.cat([vectors[word], vectors[candidate]]))
        expected = float((weights.detach() * maps[:, word + 1, candidate + 1]).sum())
        assert float(probe(sentence)[word, candidate + 1]) == pytest.approx(expected, abs=1e-5)
    root = (probe.dense.bias * (maps[:, 2, 0] + maps[:, 2, -1])).sum()
    assert float(probe(sentence)[1, 0]) == pytest.approx(float(root.detach()), abs=1e-5)


def test_a_probe_on_many_noisy_heads_beats_the_best_of_them(claim: ClaimFixture) -> None:
    hits = [0.45, 0.45, 0.45, 0.45, 0.0, 0.0]
    train, held = planted(150, hits, seed=0), planted(100, hits, seed=1)
    probe = AttentionProbe(6).fit(train, epochs=4, lr=0.02)
    best = float(head_relation_accuracy(held)["all"].max())
    claim(
        "attachment score of the probe on four noisy heads and two that know nothing",
        ours=probe.accuracy(held, ()), baseline=best, better="higher", margin=0.1,
        baseline_name="the best head", seed=0,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(2)
    shuffled = [
        ParsedSentence(each.attention, random_tree(len(each.heads), draw), each.relations) for each in (*train, *held)
    ]
    chance = AttentionProbe(6).fit(shuffled[:150], epochs=4, lr=0.02).accuracy(shuffled[150:], ())
    assert chance <= max(offset_accuracy(shuffled[150:])["all"].values()) + 0.05


def by_word(count: int, seed: int) -> list[ParsedSentence]:
    """Return sentences whose words say which of two heads follows their arc."""
    found, draw = planted(count, [0.9, 0.9], seed), torch.Generator().manual_seed(seed + 100)
    for at, each in enumerate(found):
        kind = torch.randint(2, (len(each.heads),), generator=draw)
        maps = each.attention.clone()
        for word, own in enumerate(kind.tolist(), 1):
            wrong = maps[0, 1 - own, word]
            wrong[1:-1] = wrong[1:-1][torch.randperm(len(each.heads), generator=draw)]
        found[at] = ParsedSentence(maps, each.heads, each.relations, torch.eye(2)[kind])
    return found


def test_words_say_which_head_to_trust(claim: ClaimFixture) -> None:
    train, held = by_word(200, 0), by_word(100, 1)
    plain = AttentionProbe(2).fit(train, epochs=4, lr=0.02).accuracy(held, ("root",))
    informed = AttentionProbe(2, words=2).fit(train, epochs=4, lr=0.02).accuracy(held, ("root",))
    claim(
        "attachment score if words say which head to trust",
        ours=informed, baseline=plain, better="higher", margin=0.1, baseline_name="the probe without words", seed=0,
    )  # fmt: skip
    blind = StructuralProbe(2).fit(train, epochs=2).accuracy(held, ("root",))
    assert blind < plain, "arcs are random, so that distances and words alone say little"


def test_the_structural_probe_learns_what_distance_tells() -> None:
    chain = [
        ParsedSentence(random_maps(n + 2, 1, 1), [*range(2, n + 1), 0], ["x"] * n, torch.zeros(n, 3))
        for n in (5, 6, 7, 8)
    ]
    assert StructuralProbe(3).fit(chain, epochs=40).accuracy(chain) > 0.95
    features = distance_features(4)
    assert features[1, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert features[0, 4].tolist() == [0.75, 0, 0, 0, 0, 0, 0, 0]  # three words behind
    assert features[2, 1].tolist() == [0, 0.5, 0, 0, 0, 1, 0, 0]  # two words before
    assert features[2, 2].tolist() == [0, 0.25, 0, 1, 0, 0, 0, 0]
    assert features[0, 2].tolist() == [0.25, 0, 0, 0, 1, 0, 0, 0]
    pairs = word_pairs(ParsedSentence(random_maps(4), [0, 1], ["x"] * 2, torch.eye(2)), 2)
    assert pairs[1].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_ignored_relations_do_not_count() -> None:
    sentence = ParsedSentence(random_maps(4), [0, 1], ["root", "punct"])
    probe = AttentionProbe(6)  # all logits equal: the root is first
    assert probe.accuracy([sentence]) == 1.0 and probe.accuracy([sentence], ()) == 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: to_words(random_maps(4), [None, 0, None]), "T=3"),
        (lambda: to_words(random_maps(2), [None, None], "last"), "reduction="),  # type: ignore[arg-type]
        (lambda: surface_report([random_maps(4)], [["a"]]), "(L, H, 1, 1)"),
        (lambda: surface_report([], []), "at least one map"),
        (lambda: js_distance([]), "at least one map"),
        (lambda: js_distance([random_maps(4)], smoothing=2.0), "smoothing="),
        (lambda: embed_heads(torch.rand(3, 3)), "symmetric"),
        (lambda: ParsedSentence(random_maps(4), [0, 1, 2], ["a"] * 3), "(L, H, 5, 5)"),
        (lambda: ParsedSentence(random_maps(4), [0, 3], ["a"] * 2), "in 0..2"),
        (lambda: ParsedSentence(random_maps(4), [0, 1], ["a"]), "one length"),
        (lambda: ParsedSentence(random_maps(4), [0, 1], ["a"] * 2, torch.ones(3, 1)), "vectors"),
        (lambda: AttentionProbe(5)(ParsedSentence(random_maps(4), [0, 1], ["a"] * 2)), "n_maps=5"),
        (lambda: AttentionProbe(6, 4)(ParsedSentence(random_maps(4), [0, 1], ["a"] * 2)), "width 4"),
        (lambda: AttentionProbe(6).accuracy([]), "not ignored"),
        (lambda: coreference_accuracy([(torch.ones(1, 1, 3, 3), [0, 1], [0, 1])]), "antecedent"),
        (lambda: coreference_accuracy([(torch.ones(1, 1, 3, 3), [1, 0], [0, 0])]), "in order"),
        (lambda: weight_gradients(tiny("bert"), text(), lambda out: out[0]), "one number"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
