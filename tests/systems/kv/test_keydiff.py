"""KeyDiff: its score by hand, what it does not look at, and that what it keeps differs and finds needles."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from foveate.host import Method, Site, apply
from foveate.kv import KeyDiff, KNorm, RandomKeep, ScorePolicy, SinkRecent
from foveate.tasks.parts.corpus import text
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import feed, model, padded, tokens
from tests.support.lab import lab, lab_ids
from tests.systems.kv.test_score_policies import N, best, kept


@torch.no_grad()
def keys(ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The keys of each layer, `(B, Hkv, N, D)`."""
    cache = DynamicCache()
    model("llama")(ids, attention_mask=mask, past_key_values=cache)
    return [layer.keys.double() for layer in cache.layers]


def by_hand(k: Tensor) -> Tensor:
    """Minus the mean cosine between each key `(N, D)` and all of them, which orders keys as the anchor does."""
    unit = k / (k * k).sum(-1, keepdim=True).sqrt()
    return torch.stack([-sum(one @ other for other in unit) / len(k) for one in unit])  # type: ignore[misc]


def test_each_head_keeps_the_keys_that_are_least_like_all_of_them() -> None:
    ids = tokens(1, N)
    chosen = kept(model("llama"), ids, KeyDiff(share=0.4))
    assert chosen == [best(torch.stack([by_hand(head) for head in k[0]]), 16) for k in keys(ids)]


@torch.no_grad()
def test_all_of_them_is_the_model() -> None:
    ids = tokens(2, N + 6)
    plain = feed(model("llama"), ids, torch.ones_like(ids), [N, *[1] * 6])
    with apply(model("llama"), KeyDiff(share=1.0)):
        assert torch.equal(feed(model("llama"), ids, torch.ones_like(ids), [N, *[1] * 6]), plain)


def scores(k: Tensor, positions: Tensor | None = None) -> Tensor:
    n = k.shape[2]
    positions = torch.arange(n).expand(k.shape[:3]) if positions is None else positions
    site: Any = SimpleNamespace(
        k=k, step={}, seen=n, real=None, q=torch.zeros(k.shape[0], 2, 1, 1), positions=positions
    )  # fmt: skip
    return KeyDiff().score(site)


def test_the_length_of_a_key_does_not_matter_and_its_direction_does() -> None:
    draw = torch.Generator().manual_seed(0)
    k, lengths = torch.randn(1, 2, 30, 8, generator=draw), 10 ** torch.randn(1, 2, 30, 1, generator=draw)
    torch.testing.assert_close(scores(k * lengths), scores(k), atol=1e-5, rtol=1e-4)
    turned = k @ torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    torch.testing.assert_close(scores(turned), scores(k), atol=1e-5, rtol=1e-4)
    k[:, :, 7] = -3 * F.normalize(k, dim=-1).sum(2)
    assert scores(k).argmax(-1).unique().tolist() == [7]


def test_empty_slots_are_no_part_of_the_anchor() -> None:
    draw = torch.Generator().manual_seed(0)
    k, filler = torch.randn(1, 2, 9, 8, generator=draw), 100 * torch.ones(1, 2, 4, 8)
    positions = torch.cat([torch.arange(9), torch.full((4,), -1)]).expand(1, 2, 13)
    torch.testing.assert_close(scores(torch.cat([k, filler], 2), positions)[..., :9], scores(k))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_no_part_of_the_anchor(side: str) -> None:
    (ids, mask), cache = padded(tokens(2, N), side, 15), DynamicCache()
    with apply(model("llama"), KeyDiff(share=0.4, layers=(0,))):
        model("llama")(ids, attention_mask=mask, past_key_values=cache)
        positions = cache.layers[0].store.padded("positions")[0]
    real, k = mask[0].nonzero()[:, 0], keys(ids, mask)[0][0]
    expected = best(torch.stack([by_hand(head[real]) for head in k]), 10)
    assert [sorted(p for p in head if p >= 0) for head in positions.tolist()] == [
        real[head].tolist() for head in expected
    ]


@torch.no_grad()
def alikeness(policy: Method) -> float:
    """The mean cosine between two of the keys that a head of the lab model keeps."""
    found, source = [], text("heldout")
    for number in range(3):
        ids, cache = lab_ids(source[2000 * number : 2000 * number + 383]), DynamicCache()
        lab()[0](ids, past_key_values=cache)
        for layer, stored in zip(cache.layers, kept(lab()[0], ids, policy), strict=True):
            for head, positions in zip(layer.keys[0], stored, strict=True):
                unit, n = F.normalize(head[positions], dim=-1), len(positions)
                found.append(float((unit.sum(0) @ unit.sum(0) - n) / (n * (n - 1))))
    return sum(found) / len(found)


def test_what_is_kept_differs(claim: ClaimFixture) -> None:
    """The paper's objective is the choice of keys that are the least alike. Trained keys have much in common."""
    ours = alikeness(KeyDiff(share=0.25))
    for name, other in (
        ("random tokens", RandomKeep(share=0.25, sink=0)),
        ("KNorm", KNorm(share=0.25)),
        ("the newest tokens", SinkRecent(0, 96)),
    ):
        claim(
            "the kept keys are unlike each other: mean cosine of two of them", ours=ours, baseline=alikeness(other),
            better="lower", margin=0.04, baseline_name=name, seed=0,
        )  # fmt: skip


@dataclass(eq=False)
class Alike(ScorePolicy):
    """The opposite: keeps keys that are like the others."""

    sink: int = 0

    def score(self, site: Site) -> Tensor:
        return -KeyDiff().score(site)


def test_needles_are_kept_without_a_question(claim: ClaimFixture) -> None:
    """A text of few different words is read in blocks; then a question asks for what stood behind a rare one."""
    lm, (ids, answers) = induction_lm(), recall(24, length=160, away=48)
    right = {}
    for name, policy in (
        ("ours", KeyDiff(share=0.3, sink=1)),
        ("sinks and recent tokens", SinkRecent(sink=1, recent=47)),
        ("keys that are like the others", Alike(share=0.3, sink=1)),
    ):
        found = 0
        for asked, answer in zip(ids.split(1), answers.split(1), strict=True):
            with torch.no_grad(), apply(lm, policy):
                cache = DynamicCache()
                for block in asked[:, :-1].split(53, 1):
                    lm(block, past_key_values=cache)
                found += int(lm(asked[:, -1:], past_key_values=cache).logits[0, -1].argmax() == answer[0, 0])
        right[name] = found / len(ids)
    assert accuracy(lm, ids, answers) == 1.0
    for name in list(right)[1:]:
        claim(
            "a token unlike the rest of the text is kept before anybody asks for it: needles found later",
            ours=right["ours"], baseline=right[name], better="higher", margin=0.4, baseline_name=name, seed=0,
        )  # fmt: skip
