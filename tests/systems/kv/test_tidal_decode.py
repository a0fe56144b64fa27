"""TidalDecode does what its paper claims, on a deeper induction model with constructed weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from foveate.core.errors import FoveateError, OptionError
from foveate.host import Method, Site, apply
from foveate.host.hf.model import host
from foveate.kv.parts.layer_overlap import topk_overlap
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.tidal_decode import TidalDecode, reselection_losses, split_budget
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import WINDOW, Reads, feed, model, padded, tokens

DECODING = [20, *[1] * 10]


def deep() -> LlamaForCausalLM:
    """Make six layers. The last three attend to the same token, and the last one copies it to the output."""
    return induction_lm(6, heads=4, kv_heads=4, matching=[(3, 0), (4, 0), (5, 0)], silent=[(3, 0), (4, 0)])


# -- exact limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_a_full_budget_is_dense(name: str) -> None:
    ids, mask = padded(tokens(2, 30), "left")
    expected = feed(model(name), ids, mask, DECODING)
    for policy in (TidalDecode(30, 1, ()), TidalDecode(4, 0, (0, 1, 2)), TidalDecode(4, 3, ())):
        with apply(model(name), policy):
            assert torch.equal(feed(model(name), ids, mask, DECODING), expected)


@pytest.mark.parametrize("per", ["head", "group", "layer"])
@torch.no_grad()
def test_a_padded_sequence_whose_tokens_all_fit_is_dense(per: Any) -> None:
    ids, mask = padded(tokens(2, 30), "left", 12)
    expected = feed(model("llama"), ids, mask, DECODING)
    with apply(model("llama"), TidalDecode(18, 0, (), per)):
        got = feed(model("llama"), ids, mask, DECODING)
    torch.testing.assert_close(got[:18], expected[:18], atol=1e-5, rtol=1e-5)
    assert (got[18:] - expected[18:]).abs().max() > 0.01


# -- the mechanism -----------------------------------------------------------------------------------------------------


class Checks(Method):
    """A method that computes each layer's output by hand: full attention, or attention to the last chosen set."""

    def __init__(self, policy: TidalDecode) -> None:
        self.policy, self.full, self.sparse = policy, 0, 0
        self.chosen = torch.empty(0)

    def read(self, site: Site, out: Tensor) -> None:
        if site.phase == "prefill":
            return
        k, v = (x.repeat_interleave(site.groups, 1) for x in (site.k, site.v))
        logits = (site.q @ k.mT)[:, :, 0] * site.scale
        selects = site.layer == self.policy.dense_layers or site.layer in self.policy.reselect_layers
        if not selects and site.layer > self.policy.dense_layers:
            logits = logits.masked_fill(~self.chosen, float("-inf"))
            self.sparse += 1
        else:
            self.full += 1
        torch.testing.assert_close(out[:, :, 0], (logits.softmax(-1)[:, :, None] @ v)[:, :, 0], atol=1e-5, rtol=1e-4)
        if selects:
            self.chosen = self.choose(logits)

    def choose(self, logits: Tensor) -> Tensor:
        heads = {"head": 1, "group": 2, "layer": 4}[self.policy.per]
        groups = logits.unflatten(1, (-1, heads))
        scores = groups.max(2).values if self.policy.reduce == "max" else groups.sum(2)
        rank = scores.argsort(descending=True).argsort()
        return (rank < self.policy.top_k).repeat_interleave(heads, 1)


@pytest.mark.parametrize("per", ["head", "group", "layer"])
@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("dense, again", [(0, ()), (0, (1,)), (1, ()), (1, (2,))])
@torch.no_grad()
def test_sparse_layers_read_the_chosen_set(per: Any, reduce: Any, dense: int, again: tuple[int, ...]) -> None:
    ids, policy = tokens(2, 30), TidalDecode(5, dense, again, per, reduce)
    checks = Checks(policy)
    with apply(model("llama"), policy, checks) as run:
        feed(model("llama"), ids, torch.ones_like(ids), DECODING)
    full = dense + 1 + len(again)
    assert (checks.full, checks.sparse) == (10 * full, 10 * (3 - full))
    shares = [1.0] * full + [None] * (3 - full)
    expected = [5 / n if share is None else share for n in range(21, 31) for share in shares]
    assert run.stats.read == pytest.approx(sum(expected) / 30)


@torch.no_grad()
def test_prefill_is_dense_and_nothing_is_evicted() -> None:
    llama, ids, cache = model("llama"), tokens(2, 30), DynamicCache()
    expected = llama(ids).logits
    with apply(llama, TidalDecode(2, 0, ())) as run:
        assert torch.equal(llama(ids, past_key_values=cache).logits, expected)
        llama(ids[:, :1], past_key_values=cache)
    assert run.stats.kept == 1.0
    assert all(layer.keys.shape[2] == 31 for layer in cache.layers)


@cache
def hybrid() -> hf.PreTrainedModel:
    """Make five layers with a soft cap. The second, fourth and fifth see all tokens."""
    kinds = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    torch.manual_seed(0)
    config = hf.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, sliding_window=WINDOW,
        layer_types=kinds, attn_logit_softcapping=2.0,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config).eval()


@torch.no_grad()
def test_layers_are_counted_among_those_that_see_all_tokens() -> None:
    """The other layers read their whole window: a set chosen over the whole sequence does not apply to them."""
    shares: dict[int, list[float]] = {}

    def share(site: Site) -> None:
        if site.phase == "decode":
            chosen = site.selections[0].keys_read() if site.selections else site.k.shape[2]
            shares.setdefault(site.layer, []).append(chosen / site.k.shape[2])
            if site.k.shape[2] == WINDOW:
                assert site.layer in (0, 2) and not site.selections

    with apply(hybrid(), TidalDecode(5, 1, (2,)), Reads(share)):
        hybrid().generate(tokens(2, 20), max_new_tokens=3, do_sample=False)
    assert shares == {layer: [1.0, 1.0] for layer in range(5)}
    shares.clear()
    with apply(hybrid(), TidalDecode(5, 0, (1,)), Reads(share)):
        hybrid().generate(tokens(2, 20), max_new_tokens=3, do_sample=False)
    assert shares == {**{layer: [1.0, 1.0] for layer in range(4)}, 4: [5 / 21, 5 / 22]}
    assert topk_overlap(hybrid(), tokens(2, 20), 5).shape == (3, 3)


@pytest.mark.parametrize("name, layers", [("gemma2", 1), ("gemma3", 1)])
def test_one_layer_that_sees_all_tokens_is_too_few(name: str, layers: int) -> None:
    message = f"needs two layers that attend to all tokens.* has {layers}"
    with pytest.raises(FoveateError, match=message), apply(model(name), TidalDecode(5, 0, ())):
        pass


def test_a_window_as_short_as_what_is_read_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"top_k.*reads 8 tokens, but no layer .* sees more than 8"):
        apply(model("mistral"), TidalDecode(8, 0, ())).__enter__()


# -- what the paper claims ---------------------------------------------------------------------------------------------


def test_one_selection_in_the_middle_is_enough(claim: ClaimFixture) -> None:
    """The answer's position is known from layer 3 on: a set chosen there suits layer 5, an earlier one does not."""
    lm = deep()
    ids, answers = recall(8, length=256, answer=8, away=100)

    def score(policy: Method) -> float:
        with apply(lm, policy):
            return accuracy(lm, ids, answers)

    ours = score(TidalDecode(8, 2, (3,)))
    statement = "with 8 of 256 tokens and one re-selection in the middle, eight tokens from far away are recalled"
    for policy, name in (
        (TidalDecode(8, 2, ()), "selection at layer 2 alone"),
        (SinkRecent(sink=4, recent=4), "sinks and a recent window, same size"),
    ):
        claim(statement, ours=ours, baseline=score(policy), better="higher", margin=0.7, baseline_name=name, seed=0)
    assert ours >= 0.9


# -- the place of the re-selection -------------------------------------------------------------------------------------


def test_overlap() -> None:
    """Layers that attend to the same token agree, the diagonal is one, and the matrix is symmetric."""
    ids, answers = recall(4, length=128, answer=4, away=40)
    whole = torch.cat([ids, answers], 1)[:, :-1]
    queries = torch.arange(whole.shape[1]).expand_as(whole) >= ids.shape[1] - 1
    overlap = topk_overlap(deep(), whole, 1, queries)
    assert overlap.shape == (6, 6)
    torch.testing.assert_close(overlap.diagonal(), torch.ones(6))
    torch.testing.assert_close(overlap, overlap.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(overlap[3:, 3:], torch.ones(3, 3))
    assert overlap[:3, 3:].max() <= 0.75 + 1e-6  # their retrieval heads differ, the three others are alike
    last = topk_overlap(model("llama"), tokens(2, 20), 5)
    queries = torch.zeros(2, 20, dtype=torch.bool)
    queries[:, -1] = True
    assert torch.equal(last, topk_overlap(model("llama"), tokens(2, 20), 5, queries))
    assert 0.0 < last[0, 1] < 1.0


def test_overlap_by_hand() -> None:
    """The overlap equals that of sets that are made one by one."""
    seen: dict[int, list[set[int]]] = {}

    class Sets(Method):
        def read(self, site: Site, out: Tensor) -> None:
            k = site.k.repeat_interleave(site.groups, 1)
            logits = (site.q @ k.mT)[:, :, [3, 9]].masked_fill(
                torch.arange(12) > torch.tensor([3, 9])[:, None], float("-inf")
            )
            rows = logits.flatten(0, 2)
            seen[site.layer] = [set(row.topk(4).indices.tolist()) for row in rows]

    ids = tokens(2, 12)
    with torch.no_grad(), apply(model("llama"), Sets()):
        model("llama")(ids)
    queries = torch.zeros(2, 12, dtype=torch.bool)
    queries[:, [3, 9]] = True
    overlap = topk_overlap(model("llama"), ids, 4, queries)
    for a in range(3):
        for b in range(3):
            pairs = [len(x & y) / 4 for x, y in zip(seen[a], seen[b], strict=True)]
            assert overlap[a, b] == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_finds_the_layer() -> None:
    """Calibration re-selects at the first layer that knows the answer's position; the default does not measure."""
    lm, learnt = host(deep()), {}
    ids, answers = recall(2, length=128, answer=4, away=40)
    whole = torch.cat([ids, answers], 1)[:, :-1]
    marked = torch.arange(whole.shape[1]).expand_as(whole) >= ids.shape[1]
    notes: list[str] = []
    learnt = TidalDecode.calibrate(lm, [(whole, marked)], lambda step, steps, note: notes.append(note))
    assert len(notes) == 4
    assert TidalDecode.at_budget(0.6, lm, 128, **learnt).reselect_layers == (3,)
    losses = learnt["losses"]
    assert losses[:2].isinf().all() and losses[2] > losses[3] + 1.0, "layer 2 does not know the place"
    torch.testing.assert_close(losses[4:], losses[3].expand(2), atol=1e-4, rtol=0)
    with pytest.raises(OptionError, match="answers must mark a token"):
        reselection_losses(deep(), whole, torch.zeros_like(marked), 8)
    assert TidalDecode.at_budget(0.6, lm, 128).reselect_layers == (2,)


@pytest.mark.parametrize(
    "layers, budget, dense, again, top_k",
    [(32, 0.25, 2, 13, 143), (32, 0.15, 2, 13, 29), (8, 1.0, 2, 3, 1000), (4, 0.25, 1, 2, 250), (4, 0.9, 1, 2, 600)],
)
def test_budget(layers: int, budget: float, dense: int, again: int, top_k: int) -> None:
    """Models of eight layers or more have two dense layers; `top_k` uses what the full reads leave."""
    assert split_budget(budget, layers, 1000, None) == (top_k, dense, (again,))


def test_budget_is_what_is_read() -> None:
    lm = induction_lm(8, heads=2, kv_heads=2, matching=[(3, 0)])
    policy = TidalDecode.at_budget(0.6, host(lm), 200)
    with torch.no_grad(), apply(lm, policy) as run:
        lm.generate(recall(1, 200)[0], max_new_tokens=2, do_sample=False)
    assert run.stats.read == pytest.approx(0.6, abs=0.01)


def test_the_last_layer_reselects_if_no_earlier_choice_suits_it() -> None:
    inf = float("inf")
    assert split_budget(0.5, 4, 64, torch.tensor([inf, inf, 2.0, 1.0]))[1:] == (1, (3,))
    assert split_budget(0.5, 4, 64, torch.tensor([inf, inf, 1.0, 2.0]))[1:] == (1, (2,))
    assert split_budget(0.5, 4, 64, torch.tensor([inf, inf, 1.0, 1.0]))[1:] == (1, (2,)), "the middle one of equals"


def test_shallow_models() -> None:
    for layers, dense, again in ((2, 0, ()), (3, 0, (1,))):
        lm = induction_lm(layers, heads=2, kv_heads=2, matching=[])
        policy = TidalDecode.at_budget(0.5, host(lm), 64)
        assert (policy.dense_layers, policy.reselect_layers) == (dense, again)
        with torch.no_grad(), apply(lm, policy):
            lm.generate(recall(1, 64)[0], max_new_tokens=2, do_sample=False)
    lm = induction_lm(1, heads=2, kv_heads=2, matching=[])
    with pytest.raises(FoveateError, match="two layers that attend to all tokens.* has 1"), apply(lm, TidalDecode(4)):
        pass


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"top_k": 0}, "top_k=0 must be a whole number, at least 1"),
        ({"dense_layers": -1}, "dense_layers=-1 must be a whole number, at least 0"),
        ({"reselect_layers": (-1,)}, "reselect_layers=-1 must be a whole number, at least 0"),
        ({"per": "token"}, "per='token' must be one of 'head', 'group', 'layer'"),
        ({"reduce": "mean"}, "reduce='mean' must be one of 'max', 'sum'"),
        ({"reselect_layers": (3,)}, "must be under the 3 layers of this model"),
    ],
)
def test_bad_options(bad: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(FoveateError, match=message),
        apply(model("llama"), TidalDecode(**{"reselect_layers": ()} | bad)),
    ):
        pass
