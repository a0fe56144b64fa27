"""QK attribution: the terms sum to the model's own score, each is that by hand, and a planted match is found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import foveate
from foveate.core.errors import FoveateError
from foveate.host import Method, Site
from foveate.lens import head_outputs, qk_attribution
from tests.lens.test_direct_effects import random
from tests.support.constructed import induction_lm, recall
from tests.support.host_models import model, padded, tokens

NAMES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2")


class Scores(Method):
    """Notes a layer's scores."""

    def __init__(self, layer: int) -> None:
        self.layer, self.found = layer, torch.zeros(0)

    def read(self, site: Site, out: Tensor) -> None:
        if site.layer == self.layer:
            k = site.k.repeat_interleave(site.groups, 1)
            self.found = site.scale * site.q @ k.mT


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_the_terms_sum_to_the_score(name: str, side: str) -> None:
    lm = random(name)
    given = dict(zip(("input_ids", "attention_mask"), padded(tokens(), side), strict=True))
    last = lm.config.num_hidden_layers - 1
    seen, queries, keys = Scores(last), torch.tensor([13, 11]), torch.tensor([6, 11])
    with torch.no_grad(), foveate.apply(lm, seen):
        lm(**given, use_cache=False)
    for head in (1, 3):
        found = qk_attribution(lm, given, (last, head), queries, keys)
        own = seen.found[torch.arange(2), head, queries, keys]
        assert torch.allclose(found.score, own, atol=1e-5)
        assert torch.allclose(found.total(), own, atol=2e-5 * max(1.0, float(found.terms.abs().max())))
        assert found.terms.abs().max() > 1e-2
        assert found.terms.shape == (2, len(found.parts), len(found.parts))
        assert len(found.parts) == 1 + last * (4 + 2) + 1


def test_a_term_is_that_by_hand() -> None:
    """What head 0.3 adds to the query's stream, against the embedding of the key's token."""
    lm, ids = random("llama"), tokens()
    found = qk_attribution(lm, ids, (2, 3), query=10, key=4)
    states, layer = [], lm.model.layers[2]
    handle = layer.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with torch.no_grad():
        lm(ids)
        handle.remove()
        written = head_outputs(lm, ids)[0][:, 3] @ lm.model.layers[0].self_attn.o_proj.weight[:, 24:32].mT
        scale = torch.rsqrt(states[0].square().mean(-1, keepdim=True) + 1e-6) * layer.input_layernorm.weight
        q = ((written * scale) @ layer.self_attn.q_proj.weight[24:32].mT)[:, None]
        k = ((lm.model.embed_tokens(ids) * scale) @ layer.self_attn.k_proj.weight[8:16].mT)[:, None]
        cos, sin = lm.model.rotary_emb(states[0], torch.arange(14)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    expected = 8**-0.5 * (q[:, 0, 10] * k[:, 0, 4]).sum(-1)
    assert torch.allclose(found.terms[:, found.parts.index("0.3"), 0], expected, atol=1e-5)
    assert expected.abs().max() > 1e-3
    elsewhere = qk_attribution(lm, ids, (2, 3), query=10, key=5)
    assert (elsewhere.terms - found.terms).abs().max() > 1e-2, "rotations and tokens differ"


def test_biases_are_in_the_constant() -> None:
    lm, ids = copy.deepcopy(random("qwen2")), tokens()
    before = qk_attribution(lm, ids, (1, 0), -1, 3)
    for projection in (lm.model.layers[1].self_attn.q_proj, lm.model.layers[1].self_attn.k_proj):
        projection.bias.data.zero_()
    after = qk_attribution(lm, ids, (1, 0), -1, 3)
    assert before.parts[-1] == "constant" and before.terms[:, -1].abs().max() > 1e-2
    assert not after.terms[:, -1].any() and not after.terms[:, :, -1].any()
    assert torch.allclose(before.terms[:, :-1, :-1], after.terms[:, :-1, :-1], atol=1e-5)


def test_a_planted_match_is_found() -> None:
    """The matching head's query is the token itself, and its key what the previous-token head wrote."""
    lm, (ids, _) = induction_lm(2, 4, 4, matching=[(1, 2)]), recall(3, length=40, answer=1)
    place = torch.tensor([int((row[:-1] == row[-1]).nonzero()[0]) + 1 for row in ids])
    found = qk_attribution(lm, ids, (1, 2), -1, place)
    (query, key, term), (_, _, second) = found.top(2)
    assert (query, key) == ("embedding", "0.0")
    assert term > 0.9 * float(found.score.mean()) and abs(second) < 0.1 * term


def bad_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    lm, ids = random("llama"), tokens()
    yield "key=9 must not come after query=3", lambda: qk_attribution(lm, ids, (1, 0), 3, 9)
    yield "head 3.0 must be in 0.0..2.3", lambda: qk_attribution(lm, ids, (3, 0), -1, 0)
    yield "positions must be one token of each of 2 texts", lambda: qk_attribution(lm, ids, (1, 0), 14, 0)
    yield "decoder with a language-model head", lambda: qk_attribution(model("bert"), ids, (1, 0), -1, 0)
    yield "count=0", lambda: qk_attribution(lm, ids, (1, 0), -1, 0).top(0)
    odd = copy.deepcopy(lm)
    odd.model.layers[1].self_attn.q_proj.register_forward_hook(lambda _, given, made: made.tanh())
    yield "the terms sum to another score", lambda: qk_attribution(odd, ids, (1, 0), -1, 0)


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value), message
