"""The lens against TransformerLens and bertviz: maps, outputs of heads, logit attribution, and scores of heads.

Both have an environment of their own, so that their side is a record: `lens_record.py` makes it and says how. It has
six decimals, and TransformerLens multiplies in another order, so that they agree to 1e-5.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.lens import attention_maps, direct_effects, head_outputs, next_logits, span_masses
from foveate.lens.lens import look
from tests.parity import lens_record as record
from tests.parity.lens_record import HEADS, LAYERS, PAIR
from tests.support.tensors import assert_near

RECORD = json.loads(record.RECORD.read_text())
needs_transformer_lens = pytest.mark.skipif(
    "transformer_lens" not in RECORD, reason="not recorded yet: tests/parity/lens_record.py says how"
)
OURS = {
    "previous_token_head": "previous_token",
    "duplicate_token_head": "duplicate_token",
    "induction_head": "induction",
}


@cache
def model(name: str) -> PreTrainedModel:
    """One of the models, with the kernel that a user has."""
    made = {"gpt2": record.gpt2, "bert": record.bert}[name]()
    made.set_attn_implementation("sdpa")
    return made


def theirs(*path: str) -> Tensor:
    found = RECORD
    for name in path:
        found = found[name]
    return torch.tensor(found)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_both_sides_have_the_same_model(name: str) -> None:
    made = {"gpt2": record.gpt2, "bert": record.bert}[name]()
    assert_near(torch.tensor(record.sample(made)), theirs(name), 1e-5)


# -- TransformerLens ---------------------------------------------------------------------------------------------------


@needs_transformer_lens
def test_maps_are_its_patterns() -> None:
    found = attention_maps(model("gpt2"), record.ids())[0]
    assert_near(found, theirs("transformer_lens", "pattern"), 1e-5)
    kept = look(model("gpt2"), record.ids(), keep_maps={(1, 2): slice(None)}).map(1, 2)[0]
    assert_near(kept, theirs("transformer_lens", "pattern")[1, 2], 1e-5)


@needs_transformer_lens
def test_outputs_of_heads_are_its_z() -> None:
    found = head_outputs(model("gpt2"), record.ids())
    assert_near(torch.cat([found[layer] for layer in range(LAYERS)]), theirs("transformer_lens", "z"), 1e-5)


@needs_transformer_lens
def test_direct_effects_are_its_logit_attribution() -> None:
    """Of the next token's logit, at every token; ours centres logits over the vocabulary, as its folding does."""
    ids, wanted = record.ids(), theirs("transformer_lens", "effects")
    assert_near(next_logits(model("gpt2"), ids).heads[0, ..., :-1], wanted, 1e-4)
    for place in (3, 16):
        effects = direct_effects(model("gpt2"), ids, ids[0, place + 1 : place + 2], positions=place, centred=True)
        assert_near(effects.heads[0, ..., 0], wanted[..., place], 1e-4)


@needs_transformer_lens
@pytest.mark.parametrize("name", OURS)
def test_scores_of_heads_are_its_detectors(name: str) -> None:
    """Its score is the mean mass over all queries. Ours counts those that have a token to look at."""
    seen, n = look(model("gpt2"), record.ids(), measures=[OURS[name]]), record.ids().shape[1]
    values = torch.stack([seen.values(OURS[name])[layer][0] for layer in range(LAYERS)])
    wanted = theirs("transformer_lens", "detected", name)
    assert wanted.shape == (LAYERS, HEADS) and wanted.std() > 1e-3
    assert_near(values.sum(-1) / n, wanted, 1e-5)
    ours = torch.stack([seen.lens.reduced(OURS[name])[layer][0] for layer in range(LAYERS)])
    if name != "previous_token_head":
        ids = record.ids()[0].tolist()
        asked = sum(token in ids[:place] for place, token in enumerate(ids))
        assert 0 < asked < n
        assert_near(ours, wanted * n / asked, 1e-4)
    else:
        assert_near(ours, wanted, 1e-5)


# -- bertviz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_maps_are_what_bertviz_draws(name: str) -> None:
    found = attention_maps(model(name), record.ids())[0]
    wanted = theirs("bertviz", "gpt2") if name == "gpt2" else theirs("bertviz", "bert", "All")
    assert_near(found, wanted, 1e-5)


def test_bertviz_does_not_round_and_its_views_share_their_data() -> None:
    assert RECORD["bertviz"]["most decimals"] > 12
    assert RECORD["bertviz"]["model view is the same"] is True
    assert RECORD["bertviz"]["text"] == [record.tokens()] * 2


def test_a_sentence_pair_is_two_spans() -> None:
    """Its choice of sentences cuts the map; the sums of a row of these cuts are our masses between spans."""
    n = record.ids().shape[1]
    spans = {"A": (0, PAIR), "B": (PAIR, n)}
    measures = span_masses(spans)
    seen = look(model("bert"), record.ids(), measures=measures)
    for measure in measures:
        source, target = measure.name.split("->")
        cut = theirs("bertviz", "bert", f"Sentence {source} -> Sentence {target}")
        assert cut.shape == (LAYERS, HEADS, *(spans[side][1] - spans[side][0] for side in (source, target)))
        for layer in range(LAYERS):
            assert_near(seen.lens.reduced(measure)[layer][0], cut[layer].sum(-1).mean(-1), 1e-5)
