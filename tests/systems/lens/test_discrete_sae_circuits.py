"""Discrete SAE circuits: scores of hand-made codes, the autoencoder, planted clusters and a copy head that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import LlamaForCausalLM

import foveate
from foveate.core.errors import FoveateError, OptionError, ShapeError
from foveate.lens import (
    DiscreteSAE,
    ablate,
    circuit_metrics,
    circuit_scores,
    discrete_sae_circuits,
    edge_heads,
    edge_scores,
)
from tests.conftest import ClaimFixture
from tests.lens.models import text, tiny
from tests.support.constructed import BOS, FILLER, HEAD, KEYS, PREVIOUS, VALUES, VOCAB, induction_lm
from tests.support.tensors import assert_near

# -- codes -------------------------------------------------------------------------------------------------------------

#: Codes of three heads in one layer: apart, in part, and never different.
POSITIVE = torch.tensor([[1, 1, 7], [2, 2, 7], [3, 9, 8], [3, 9, 7]])[:, None]
NEGATIVE = torch.tensor([[4, 1, 7], [5, 2, 8], [6, 2, 7]])[:, None]


def test_scores_count_codes_of_positive_prompts_only() -> None:
    assert circuit_scores(POSITIVE, NEGATIVE).tolist() == [[3.0, 1.0, 0.0]]
    assert_near(circuit_scores(POSITIVE, NEGATIVE, normalize=True), torch.tensor([[3 / 6, 1 / 3, 0.0]]), 1e-6)
    assert circuit_scores(POSITIVE, POSITIVE.flip(0)).tolist() == [[0.0, 0.0, 0.0]]
    apart = circuit_scores(POSITIVE, NEGATIVE + 100, normalize=True)
    assert float(apart[0, 0]) == pytest.approx(3 / 6) and float(apart[0, 2]) == pytest.approx(2 / 4)


def test_softmax_keeps_the_order_and_repeated_prompts_change_nothing() -> None:
    plain, soft = (circuit_scores(POSITIVE, NEGATIVE, softmax=on) for on in (False, True))
    assert torch.equal(plain.argsort(), soft.argsort()) and float(soft.sum()) == pytest.approx(1.0)
    twice = POSITIVE[[0, 0, 1, 2, 3, 3]]
    for normalize in (False, True):
        options = {"normalize": normalize}
        assert torch.equal(circuit_scores(twice, NEGATIVE, **options), circuit_scores(POSITIVE, NEGATIVE, **options))
        assert torch.equal(edge_scores(twice, NEGATIVE, **options), edge_scores(POSITIVE, NEGATIVE, **options))


def test_edges_count_pairs_of_codes() -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randint(4, (9, 2, 2), generator=draw), torch.randint(4, (7, 2, 2), generator=draw)
    pairs = [[[tuple(row[[a, b]].tolist()) for row in codes.flatten(1)] for a in range(4) for b in range(4)]
             for codes in (own, other)]  # fmt: skip
    plain = [float(len(set(p) - set(n))) for p, n in zip(*pairs, strict=True)]
    share = [len(set(p) - set(n)) / (len(set(p)) + len(set(n))) for p, n in zip(*pairs, strict=True)]
    off = ~torch.eye(4, dtype=torch.bool)
    assert_near(edge_scores(own, other), torch.tensor(plain).view(4, 4) * off, 1e-6)
    assert_near(edge_scores(own, other, normalize=True), torch.tensor(share).view(4, 4) * off, 1e-6)
    later = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert_near(edge_scores(own, other, forward=True), torch.tensor(plain).view(4, 4) * later, 1e-6)
    edges = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 9.0], [4.0, 0.0, 0.0]])
    assert edge_heads(edges).tolist() == [1, 1, 2], "the ends of (1, 2) and (2, 0)"
    assert edge_heads(edges, 2).tolist() == [0, 1, 1]


def test_metrics_are_the_usual_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, truth = torch.randint(5, (4, 6), generator=draw).float(), torch.rand(4, 6, generator=draw) < 0.4
    found = circuit_metrics(scores, truth)
    assert found.auc == pytest.approx(roc_auc_score(truth.flatten().numpy(), scores.flatten().numpy()))
    assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))
    perfect = circuit_metrics(truth.float(), truth)
    assert perfect == (1.0, 1.0, 1.0, 1.0, 1.0)
    one = circuit_metrics(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False]))
    assert one == pytest.approx((0.75, 2 / 3, 1.0, 0.8, 2 * 0.5 / 1.5))


# -- the autoencoder ---------------------------------------------------------------------------------------------------


def test_the_loss_is_the_release_s() -> None:
    sae, x = DiscreteSAE(6, 9, 0.3), torch.randn(4, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.bias += 0.1
        features = ((x - sae.bias) @ sae.encoder.mT + sae.offset).clamp_min(0)
        back = features @ sae.decoder.mT + sae.bias
        expected = (back - x).square().mean() + 0.3 * features.sum(-1).mean()
        assert float(sae.loss(x)) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(sae.encode(x), features.argmax(-1))


def test_training_lowers_the_loss_on_the_sphere() -> None:
    x = torch.randn(12, 2, 3, 6, generator=torch.Generator().manual_seed(0)) * 3
    before, after = DiscreteSAE(6, 20, epochs=1, rate=0.0).fit(x), DiscreteSAE(6, 20, epochs=100, rate=1e-2).fit(x)
    assert float(after.loss(x).detach()) < 0.5 * float(before.loss(x).detach())
    for weight in (after.encoder, after.decoder):
        assert_near(weight.norm(dim=1), torch.ones(len(weight)), 1e-5)
    sparse = DiscreteSAE(6, 20, 3.0, epochs=100, rate=1e-2).fit(x)
    assert float((sparse(x)[0] > 0).float().mean()) < 0.5 * float((after(x)[0] > 0).float().mean())


def test_the_global_scale_makes_codes_independent_of_units() -> None:
    x = torch.randn(6, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"epochs": 20, "scale": "global"}
    small, large = DiscreteSAE(6, 20, **options).fit(x), DiscreteSAE(6, 20, **options).fit(64 * x)
    assert torch.equal(small.encode(x), large.encode(64 * x))
    assert_near(64 * small(x)[1], large(64 * x)[1], 1e-3)


def planted(seed: int, moves: bool = True) -> tuple[Tensor, Tensor]:
    """Outputs of 48 heads for 20 positive and 20 negative prompts: six heads have another cluster for positive ones."""
    draw = torch.Generator().manual_seed(seed)
    centre, other = torch.randn(2, 4, 12, 16, generator=draw)
    circuit = (torch.rand(48, generator=draw).argsort().argsort() < 6).view(4, 12)
    writes = centre + 0.1 * torch.randn(40, 4, 12, 16, generator=draw)
    if moves:
        writes[:20] += (other - centre) * circuit[..., None]
    return writes, circuit


def test_planted_heads_are_found(claim: ClaimFixture) -> None:
    ours, shuffled, still = list[float](), list[float](), list[float]()
    for seed in range(3):
        for moves in (True, False):
            writes, circuit = planted(seed, moves)
            codes = DiscreteSAE(16, 100, epochs=100, rate=3e-3, prompts=20).fit(writes).encode(writes)
            auc = circuit_metrics(circuit_scores(codes[:20], codes[20:]), circuit).auc
            (ours if moves else still).append(auc)
            if moves:
                mixed = codes[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
                shuffled.append(circuit_metrics(circuit_scores(mixed[:20], mixed[20:]), circuit).auc)
    assert abs(sum(still) / 3 - 0.5) < 0.15, "nothing to find"
    claim(
        "area under the ROC for six of 48 heads whose outputs move to another cluster, mean of 3 drawings",
        ours=sum(ours) / 3, baseline=sum(shuffled) / 3, better="higher", margin=0.25,
        baseline_name="the same codes with shuffled prompts", seed=0,
    )  # fmt: skip


# -- a model -----------------------------------------------------------------------------------------------------------


def copying(head: int) -> LlamaForCausalLM:
    """An induction LM whose copy head is this head of its second layer; the others there write what stood before."""
    model = induction_lm(kv_heads=4, matching=[(1, head)])
    weight = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        for other in {0, 1, 2, 3} - {head}:
            for token in range(1, VOCAB):
                weight[PREVIOUS + token, other * HEAD + token] = 0.3
                model.model.layers[1].self_attn.v_proj.weight[other * HEAD + token, token] = 1.0
    return model


def tasks(seed: int, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Texts that end in a key which stood before a value, the same with another key there, and the values."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([FILLER.start + torch.randperm(len(FILLER), generator=draw)[:12] for _ in range(count)])
    keys = torch.stack([KEYS.start + torch.randperm(len(KEYS), generator=draw)[:2] for _ in range(count)])
    values = VALUES.start + torch.randint(len(VALUES), (count,), generator=draw)
    ids[:, 0], ids[:, 5], ids[:, -1] = BOS, values, keys[:, 0]
    positive, negative = ids.clone(), ids.clone()
    positive[:, 4], negative[:, 4] = keys[:, 0], keys[:, 1]
    return positive, negative, values


def test_the_copy_head_is_found_without_ablation(claim: ClaimFixture) -> None:
    found, agree = list[int](), list[bool]()
    for seed in range(5):
        model, (positive, negative, values) = copying(seed % 4), tasks(seed)
        circuit = discrete_sae_circuits(
            model, positive, negative, scale="global", epochs=150, rate=3e-3, prompts=None, seed=seed
        )
        assert circuit.scores.shape == (2, 4) and circuit.edges.shape == (8, 8) and circuit.layers == (0, 1)
        lost = []
        for head in range(4):
            with torch.no_grad(), foveate.apply(model, ablate([(1, head)])):
                lost.append(float((model(positive).logits[:, -1].argmax(-1) != values).float().mean()))
        assert max(lost) > 0.9 and sorted(lost)[-2] == 0.0, "one head copies"
        found.append(int(circuit.scores[1].argmax()))
        agree.append(found[-1] == lost.index(max(lost)))
    claim(
        "share of 5 models in which the top-scored head of the second layer is the one whose ablation stops copying",
        ours=sum(agree) / 5, baseline=0.25, better="higher", margin=0.5, baseline_name="a random head", seed=0,
    )  # fmt: skip


def test_identical_sets_have_no_circuit_and_padding_does_not_count() -> None:
    model, inputs = tiny("llama"), text("left")
    options: dict[str, Any] = {"features": 30, "epochs": 20}
    same = discrete_sae_circuits(model, inputs, inputs, **options)
    assert float(same.scores.sum()) == 0.0 and float(same.edges.sum()) == 0.0
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :7] = 9
    assert float(discrete_sae_circuits(model, other, inputs, **options).scores.sum()) == 0.0
    ids = inputs["input_ids"]
    found = discrete_sae_circuits(model, ids, ids.flip(1), scale="global", **options)
    assert float(found.scores.max()) > 0 and set(found.heads(8)) == {(a, b) for a in range(2) for b in range(4)}
    assert float(found.scores[found.heads(1)[0]]) == float(found.scores.max())


def test_bad_input_is_refused() -> None:
    bad: list[tuple[type[FoveateError], str, Any]] = [
        (OptionError, "features=0", lambda: DiscreteSAE(4, 0)),
        (OptionError, "l1=-1", lambda: DiscreteSAE(4, 5, -1.0)),
        (OptionError, "scale=", lambda: DiscreteSAE(4, 5, scale="head")),  # type: ignore[arg-type]
        (OptionError, "prompts=0", lambda: DiscreteSAE(4, 5, prompts=0)),
        (ShapeError, "writes must be", lambda: DiscreteSAE(4, 5).fit(torch.ones(2, 2, 2, 5))),
        (ShapeError, "codes must be", lambda: circuit_scores(POSITIVE, NEGATIVE[..., :2])),
        (OptionError, "must both hold prompts", lambda: edge_scores(POSITIVE, NEGATIVE[:0])),
        (ShapeError, "circuit must be bool", lambda: circuit_metrics(torch.ones(3), torch.ones(3) > 0)),
        (OptionError, "count=0", lambda: discrete_sae_circuits(*few(), epochs=1).heads(0)),
    ]
    for error, words, call in bad:
        with pytest.raises(error, match=words):
            call()


def few() -> tuple[Any, Tensor, Tensor]:
    ids = text()["input_ids"]
    return tiny("llama"), ids, ids
