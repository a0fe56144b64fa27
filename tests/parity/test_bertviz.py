"""Views against BertViz's neuron view: the same weights, queries, keys and segments of the same BERT.

BertViz's side is a record: `bertviz_record.py` makes it, with BertViz's own copy of BERT, and says how.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from transformers import BertConfig, BertModel

from foveate.lens import AttentionView, attention_view
from tests.parity import bertviz_record as record
from tests.support.tensors import assert_near

SHOWN = json.loads(record.RECORD.read_text())["shown"]


@cache
def view() -> AttentionView:
    config = BertConfig(vocab_size=record.VOCAB, max_position_embeddings=record.POSITIONS, **record.SIZES)
    model = BertModel(config).eval()
    left = model.load_state_dict(record.weights(), strict=False)
    assert not left.unexpected_keys and not left.missing_keys
    words = record.Words()
    first, second = (words.tokenize(text) for text in record.SENTENCES)
    tokens = [words.cls_token, *first, words.sep_token, *second, words.sep_token]
    kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    inputs = {
        "input_ids": torch.tensor([words.convert_tokens_to_ids(tokens)]), "token_type_ids": torch.tensor([kinds]),
    }  # fmt: skip
    return attention_view(model, inputs, tokens=tokens)


def test_weights_queries_and_keys() -> None:
    stack, theirs = view().stack(), SHOWN["all"]
    assert theirs["left_text"] == theirs["right_text"] == list(stack.keys)
    for layer in range(2):
        assert_near(stack.products[layer].q, torch.tensor(theirs["queries"][layer]), 1e-5)
        assert_near(stack.products[layer].k, torch.tensor(theirs["keys"][layer]), 1e-5)
        for head in range(2):
            assert_near(stack.map(layer, head), torch.tensor(theirs["attn"][layer][head]), 1e-5)


@pytest.mark.parametrize("segments", ["A->A", "A->B", "B->A", "B->B"])
def test_segments(segments: str) -> None:
    theirs, boundary = SHOWN[segments.lower().replace("->", "")], view().stack().boundary
    assert boundary == 6
    start = {"A": 0, "B": boundary}
    for layer in range(2):
        lines = view().head(layer, [1]).edges(segments=segments)  # type: ignore[arg-type]
        weights = torch.zeros(len(theirs["left_text"]), len(theirs["right_text"]))
        for query, key, _, weight in lines:
            weights[query - start[segments[0]], key - start[segments[-1]]] = weight
        assert_near(weights, torch.tensor(theirs["attn"][layer][1]), 1e-5)


def test_products_of_neurons() -> None:
    """BertViz draws products of a query's and a key's numbers; their scaled sums have the softmax that it draws."""
    theirs = SHOWN["all"]
    for layer, head, query in ((0, 0, 3), (1, 1, 8)):
        q, k = (torch.tensor(theirs[name][layer][head]) for name in ("queries", "keys"))
        found = view().neuron(layer, head, query)
        assert_near(found.qk, q[query] * k, 1e-5)
        assert_near(found.prob, torch.tensor(theirs["attn"][layer][head][query]), 1e-5)
