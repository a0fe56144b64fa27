"""Attention Matching: the fit by hand and by scipy, the limits, and what weights and refitted values are worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError, ShapeError
from foveate.host import Context, Method, Site, Slots, apply
from foveate.kv import AttentionMatching, SnapKV
from foveate.kv.attention_matching import shared_out
from foveate.kv.parts import matching
from foveate.kv.parts.matching import Reference, Tokens, matched, projected, pursued, received
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.systems.kv.test_score_policies import best, kept

N = 40


def problem(seed: int = 0, n: int = 60, s: int = 24, d: int = 8, rows: int = 2) -> tuple[Reference, Tokens]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, size, d, generator=draw, dtype=torch.float64) for size in (n, s, s))
    bias = torch.rand(rows, s, generator=draw, dtype=torch.float64)
    real, usable = torch.ones(rows, n, dtype=torch.bool), torch.ones(rows, s, dtype=torch.bool)
    real[0, :7], usable[0, [3, 20]] = False, False  # queries and tokens that do not count may hold anything
    q[0, :7], k[0, [3, 20]], v[0, [3, 20]] = torch.nan, torch.nan, torch.nan
    q = torch.where(real[..., None], q, 0.0)
    return Reference(q, real, d**-0.5, None), Tokens(k, v, bias, usable)


def cut(held: Tokens, index: Any) -> Tokens:
    return Tokens(held.k[:, index], held.v[:, index], held.bias[:, index], held.usable[:, index])


def dense(reference: Reference, held: Tokens, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's exponentials over the largest of each query, their sums, and its outputs."""
    real, usable = reference.real[row], held.usable[row]
    logits = reference.q[row, real] @ held.k[row, usable].T * reference.scale
    e = (logits + held.bias[row, usable] - (logits + held.bias[row, usable]).amax(-1, keepdim=True)).exp()
    return e, e.sum(-1), (e / e.sum(-1, keepdim=True)) @ held.v[row, usable]


@pytest.mark.parametrize("tile", [1, 500, 1 << 21])
def test_weights_and_values_are_the_least_squares_solutions(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TILE", tile)
    reference, held = problem()
    size = 10
    bias, values = matched(reference, cut(held, slice(0, size)), cut(held, slice(size, None)), 1.0, 1e-12)
    for row in range(2):
        e, total, out = dense(reference, held, row)
        own = held.usable[row, :size]
        m = e[:, : int(own.sum())] / held.bias[row, :size][own].exp()
        found = lsq_linear(m.numpy(), total.numpy(), bounds=(torch.e**-1, torch.e), tol=1e-12)
        ours = 0.5 * float((m @ bias[row, own].exp() - total).square().sum())
        assert ours <= found.cost * (1 + 1e-6) and abs(float(bias[row, own].abs().max()) - 1) < 1e-6
        x = m * bias[row, own].exp()
        solution = torch.linalg.lstsq(x / x.sum(-1, keepdim=True), out).solution
        torch.testing.assert_close(values[row, own], solution, atol=1e-4, rtol=1e-4)
    assert bias[0, 3] == held.bias[0, 3] and values[0, 3].isnan().all(), "what does not count stays"


def test_where_all_tokens_stay_the_outputs_are_those_of_all() -> None:
    reference, held = problem(rows=1)
    bias, values = matched(reference, held, cut(held, slice(0, 0)), 3.0, 1e-9)
    fitted = Tokens(held.k, values, bias, held.usable)
    _, total, out = dense(reference, held, 0)
    _, again, made = dense(reference, fitted, 0)
    torch.testing.assert_close(made, out, atol=1e-6, rtol=1e-6)
    logits = reference.q[0, reference.real[0]] @ held.k[0, held.usable[0]].T * reference.scale
    masses = [(logits + one.bias[0, held.usable[0]]).logsumexp(-1) for one in (held, fitted)]
    torch.testing.assert_close(*masses, atol=1e-5, rtol=1e-5)


def test_a_bound_of_zero_leaves_the_weights_and_a_strong_ridge_the_values() -> None:
    reference, held = problem(rows=1)
    held = replace(held, bias=torch.zeros_like(held.bias))
    bias, values = matched(reference, cut(held, slice(0, 3)), cut(held, slice(4, None)), 0.0, 1e12)
    assert (bias == 0).all()
    torch.testing.assert_close(values, held.v[:, :3], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_bounded_solver_agrees_with_scipy(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    m = torch.rand(1, 50, 20, generator=draw, dtype=torch.float64) ** 3
    y = m @ (4 * torch.rand(1, 20, 1, generator=draw, dtype=torch.float64) - 1)
    found = lsq_linear(m[0].numpy(), y[0, :, 0].numpy(), bounds=(torch.e**-1, torch.e), tol=1e-12)
    x = projected(m.mT @ m, m.mT @ y, torch.ones_like(m[:, :20, :1]), 1.0, 2000)
    assert float((m @ x - y).square().sum()) / 2 <= found.cost * (1 + 1e-6)


@pytest.mark.parametrize("how", ["rms", "max", "mean"])
def test_attention_is_that_of_all_queries(how: str) -> None:
    reference, held = problem()
    for row, score in enumerate(received(reference, held, how)):
        e, total, _ = dense(reference, held, row)
        weights = e / total[:, None]
        made = {"max": weights.amax(0), "mean": weights.mean(0), "rms": weights.square().mean(0).sqrt()}[how]
        torch.testing.assert_close(score[held.usable[row]], made)


def test_pursuit_takes_what_matches_the_mass() -> None:
    """The first choice is by hand; the mass of the chosen is nearer than that of those with most attention."""
    reference, held = problem(rows=1, n=200, s=40)
    none, off = torch.zeros_like(held.usable), {}
    order = pursued(reference, held, none, 8, 7.0)
    e, total, _ = dense(reference, held, 0)
    first = held.usable[0].nonzero()[:, 0][(e * total[:, None]).sum(0).argmax()]
    assert order[0].argmax() == first and (order.isfinite().sum(-1) == 8).all() and not order[0, 3].isfinite()
    for name, scores in (("pursuit", order), ("attention", received(reference, held, "rms"))):
        chosen = scores[0].masked_fill(~held.usable[0], -1e9).topk(8).indices
        m = e[:, (chosen[:, None] == held.usable[0].nonzero()[:, 0]).int().argmax(-1)]
        off[name] = lsq_linear(m.numpy(), total.numpy(), bounds=(1e-9, 1e3)).cost
    assert off["pursuit"] < 0.9 * off["attention"]
    forced = none.clone()
    forced[0, 11] = True
    assert pursued(reference, held, forced, 8, 7.0)[0].argmax() == 11


class Watch(Method):
    """Notes the last output of each layer."""

    def __init__(self) -> None:
        self.out: dict[int, Tensor] = {}
        self.q: dict[int, Tensor] = {}
        self.k: dict[int, Tensor] = {}

    def read(self, site: Site, out: Tensor) -> None:
        self.out[site.order], self.q[site.order], self.k[site.order] = out.clone(), site.q.clone(), site.k.clone()


def test_the_policy_keeps_the_keys_with_most_attention_from_the_prompts_own_queries() -> None:
    """As in the release, a query attends to later tokens too."""
    llama, ids, watch = model("llama"), tokens(1, N), Watch()
    with torch.no_grad(), apply(llama, watch):
        llama(ids)
    q, k = watch.q[0][0].unflatten(0, (2, 2)), watch.k[0][0]
    weights = (q @ k[:, None].mT * 8**-0.5).softmax(-1).flatten(1, 2)
    expected = best(weights.square().mean(1).sqrt(), 10, range(4))
    assert kept(llama, ids, AttentionMatching())[0] == expected
    some = best(weights.unflatten(1, (2, N))[:, :, [2, 7, 12, 17, 22, 27, 32, 37]].flatten(1, 2).mean(1), 10)
    assert kept(llama, ids, AttentionMatching(queries=8, measure="mean", sink=0))[0] == some


def errors(policy: Method, ids: Tensor, later: Tensor) -> float:
    """The error of the last layer's output at later tokens, relative to that of the full cache."""
    llama, outs = model("llama"), []
    for methods in ((), (policy,)):
        cache, watch = DynamicCache(), Watch()
        with torch.no_grad(), apply(llama, *methods):
            llama(ids, past_key_values=cache)
            made = []
            for token in later.split(1, 1):
                with apply(llama, watch):
                    llama(token, past_key_values=cache)
                made.append(watch.out[0])
        outs.append(torch.cat(made, 2))
    return float((outs[1] - outs[0]).norm() / outs[0].norm())


@pytest.mark.parametrize("options", [{}, {"keys": "pursuit", "bound": 7.0}, {"reference": "random"}], ids=str)
def test_outputs_are_nearer_than_with_the_same_tokens_alone(options: dict[str, Any], claim: ClaimFixture) -> None:
    ids, later = tokens(2, 200), tokens(2, 12, seed=1)
    policy = AttentionMatching(share=0.1, **options)
    ours = errors(policy, ids, later)
    plain = errors(replace(policy, bound=0.0, refit_values=False), ids, later)
    unweighted = errors(replace(policy, bound=0.0), ids, later)
    snap = errors(SnapKV(share=0.1, recent=8), ids, later)
    assert ours < 0.95 * unweighted, "values alone do not bring back the mass"
    name = "random queries" if "reference" in options else "pursuit" if options else "most attention"
    claim(
        f"weights and refitted values bring outputs nearer to the full cache's (keys by {name}): relative error",
        ours=ours, baseline=min(plain, snap), better="lower", margin=0.05,
        baseline_name="the same tokens as they were, or SnapKV's", seed=0,
    )  # fmt: skip


def test_later_tokens_weigh_as_before() -> None:
    """The mass of the prompt stays, so that a later token's part of the attention does."""
    llama, ids = model("llama"), tokens(1, 200)
    mass: dict[str, Tensor] = {}
    policies = {"full": [], "ours": [AttentionMatching(share=0.1)], "cut": [AttentionMatching(share=0.1, bound=0.0)]}
    for name, methods in policies.items():
        cache, seen = DynamicCache(), []

        class Mass(Method):
            def edit_weights(self, site: Site, weights: Tensor) -> Tensor:
                if site.order == 0 and site.q.shape[2] == 1:
                    later = (site.positions >= 200).repeat_interleave(2, 1)[:, :, None]
                    seen.append((weights * later).sum(-1))  # noqa: B023
                return weights

        with torch.no_grad(), apply(llama, *methods, Mass()):
            llama(ids, past_key_values=cache)
            for token in tokens(1, 8, seed=1).split(1, 1):
                llama(token, past_key_values=cache)
        mass[name] = torch.stack(seen)
    off = {name: float((mass[name] - mass["full"]).abs().mean()) for name in ("ours", "cut")}
    assert off["ours"] < 0.4 * off["cut"]


def test_a_table_of_heads_is_followed() -> None:
    table = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.5, 1.5]])
    layers = kept(model("llama"), tokens(1, 80), AttentionMatching(0.25, table=table))
    assert [[len(head) for head in layer] for layer in layers] == [[45, 15], [15, 15], [8, 22]]
    real = torch.ones(3, 2, dtype=torch.bool)
    wide = shared_out(torch.tensor([[9.0, 1.0], [1.0, 1.0], [0.0, 4.0]]).double(), real, 0.5)
    assert wide[0, 0] == 1.0 and wide[2, 0] == 0 and abs(float(wide.mean()) - 0.5) < 1e-6
    with pytest.raises(ShapeError, match="table"), apply(model("llama"), AttentionMatching(table=torch.ones(2, 2))):
        pass


@torch.no_grad()
def test_a_prompt_in_pieces_is_compacted_again_and_a_question_counts_but_goes() -> None:
    llama, ids = model("llama"), tokens(1, 60)
    stores, pieces = {}, {}
    ours, cut_ = AttentionMatching(0.4), AttentionMatching(0.4, bound=0.0, refit_values=False)
    for name, policies in {"full": [], "ours": [ours], "cut": [cut_]}.items():
        cache = DynamicCache()
        with apply(llama, *policies):
            for piece in ids.split(20, 1):
                llama(piece, past_key_values=cache)
            pieces[name] = llama(tokens(1, 1, seed=3), past_key_values=cache).logits
            if policies:
                held = cache.layers[0].store
                assert (held.padded("positions") >= 0).sum(-1).unique().tolist() == [25]
    assert (pieces["ours"] - pieces["full"]).norm() < (pieces["cut"] - pieces["full"]).norm()
    for question in (None, tokens(1, 6, seed=5)):
        context = Context(llama, AttentionMatching(0.2))
        context.read(ids, question=question)
        stores[question is None] = context.cache.layers[0].store
        positions = context.cache.layers[0].store.padded("positions")
        assert positions.max() < 60 and (positions >= 0).sum(-1).unique().tolist() == [12]
        context.generate(tokens(1, 3, seed=6), max_new_tokens=2)
    assert not torch.equal(stores[True].padded("v"), stores[False].padded("v")), "the question's queries count"


@torch.no_grad()
def test_layers_with_a_window_are_not_refitted() -> None:
    mistral, cache = model("mistral"), DynamicCache(config=model("mistral").config)
    with apply(mistral, AttentionMatching(0.1)):
        mistral(tokens(1, 30), past_key_values=cache)
    slots: Slots = cache.layers[0].store.groups[0].slots
    assert slots.weight is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keys": "best"}, "keys='best'"),
        ({"measure": "sum"}, "measure='sum'"),
        ({"reference": "none"}, "reference='none'"),
        ({"queries": 0}, "queries=0"),
        ({"bound": -1.0}, "bound=-1.0"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"every": 4}, "every=4: compaction needs"),
        ({"heads": "adaptive", "keys": "pursuit"}, "heads='adaptive' compares scores"),
        ({"table": torch.tensor([-1.0])}, "table must be"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        AttentionMatching(**options)
