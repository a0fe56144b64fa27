"""LagKV: its score by hand, equal budgets of partitions, short texts, pieces, and needles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.core.errors import OptionError
from foveate.host import Method, apply
from foveate.kv import LagKV, SinkRecent, SnapKV
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import model, tokens

SINK, LAG, N = 3, 8, 45  # five whole partitions and two tokens more


class Watch(Method):
    """Notes keys and values of the first layer."""

    def __init__(self) -> None:
        self.k, self.v = torch.empty(0), torch.empty(0)

    def read(self, site: Any, out: Tensor) -> None:
        if site.order == 0:
            self.k, self.v = site.k.clone(), site.v.clone()


@torch.no_grad()
def by_hand(ids: Tensor) -> Tensor:
    """The scores `(heads, 4, LAG)` of the partitions that have a reference."""
    watch = Watch()
    with apply(model("llama"), watch):
        model("llama")(ids)
    total = torch.zeros(2, 4, LAG)
    for x in (watch.k[0], watch.v[0]):
        for part in range(4):
            own, after = (x[:, SINK + p * LAG : SINK + (p + 1) * LAG] for p in (part, part + 1))
            low, high = after.amin(1, keepdim=True), after.amax(1, keepdim=True)
            total[:, part] += ((own - low) / (high - low)).std(-1).softmax(-1)
    return total / 2


@torch.no_grad()
def kept(policy: Method, ids: Tensor, pieces: list[int] | None = None) -> list[list[int]]:
    """The positions that each head of the first layer keeps."""
    cache = DynamicCache()
    with apply(model("llama"), policy):
        for piece in ids.split(pieces or [ids.shape[1]], 1):
            model("llama")(piece, past_key_values=cache)
        rows = cache.layers[0].store.padded("positions")[0]
    return [sorted(p for p in row.tolist() if p >= 0) for row in rows]


@pytest.mark.parametrize("best", [1, 3, 6])
def test_each_partition_keeps_its_best(best: int) -> None:
    ids, stay = tokens(1, N), [*range(SINK), *range(SINK + 4 * LAG, N)]
    chosen = by_hand(ids).sort(-1, descending=True).indices[..., :best] + SINK + LAG * torch.arange(4)[:, None]
    expected = [sorted(stay + head.flatten().tolist()) for head in chosen]
    assert kept(LagKV(share=(len(stay) + 4 * best) / N, sink=SINK, lag=LAG), ids) == expected


def test_scores_may_be_compared_over_partitions() -> None:
    ids, stay = tokens(1, N), [*range(SINK), *range(SINK + 4 * LAG, N)]
    chosen = by_hand(ids).flatten(1).sort(-1, descending=True).indices[:, :9] + SINK
    expected = [sorted(stay + head.tolist()) for head in chosen]
    assert kept(LagKV(share=(len(stay) + 9) / N, sink=SINK, lag=LAG, cross=True), ids) == expected


def test_a_short_text_keeps_its_newest() -> None:
    """The limit: without a reference it is a window with sinks."""
    ids, policy = tokens(1, N), LagKV(share=20 / N, sink=SINK, lag=(N - SINK) // 2 + 1)
    assert kept(policy, ids) == [[*range(SINK), *range(N - 17, N)]] * 2
    assert kept(policy, ids) == kept(SinkRecent(SINK, 17), ids)


def test_partitions_of_the_text_keep_alike_in_pieces() -> None:
    """A partition is compressed once: what its first budget left of it stays, though it is scored again."""
    ids, first = tokens(1, SINK + 8 * LAG), SINK + 4 * LAG
    policy = LagKV(share=(SINK + LAG + 7 * 3) / ids.shape[1], sink=SINK, lag=LAG)
    assert all(_sizes(head) == [3] * 7 + [8] for head in kept(policy, ids))
    early, late = kept(policy, ids[:, :first]), kept(policy, ids, [first, 2 * LAG, 2 * LAG])
    for one, other in zip(early, late, strict=True):
        assert one[: SINK + 6] == other[: SINK + 6] and _sizes(one)[:4] == [2, 2, 2, 8]
        assert len(other) == SINK + LAG + 7 * 3 and max(_sizes(other)[:7]) == 4


def _sizes(positions: list[int]) -> list[int]:
    found = Counter((position - SINK) // LAG for position in positions if position >= SINK)
    return [found[part] for part in range(8)]


@torch.no_grad()
def test_channels_that_do_not_vary_give_finite_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    plain = LagKV.score
    monkeypatch.setattr(LagKV, "score", lambda self, site: found.append(plain(self, site)) or found[-1])
    ids = torch.randint(1, 16, (1, 40), generator=torch.Generator().manual_seed(0))
    lm = induction_lm()
    with apply(lm, LagKV(share=0.5, lag=4)):
        lm(ids, past_key_values=DynamicCache())
    assert found and all(bool(scores.isfinite().all()) for scores in found)


def test_needles_that_are_asked_for_later(claim: ClaimFixture) -> None:
    """The question comes after the text was compressed; a needle is unlike the filler that follows it."""
    lm, (ids, answers) = induction_lm(), recall(24, length=160, away=48)
    right = {}
    for policy in (LagKV(share=0.3, lag=16), SnapKV(share=0.3, recent=16), SinkRecent(sink=4, recent=44)):
        found = 0
        for text, answer in zip(ids.split(1), answers.split(1), strict=True):
            with torch.no_grad(), apply(lm, policy):
                cache = DynamicCache()
                lm(text[:, :-1], past_key_values=cache)
                found += int(lm(text[:, -1:], past_key_values=cache).logits[0, -1].argmax() == answer[0, 0])
        right[type(policy).__name__] = found / len(ids)
    assert accuracy(lm, ids, answers) == 1.0
    claim(
        "a needle that leaves the range of the tokens after it is kept without a query: needles found later",
        ours=right["LagKV"], baseline=right["SnapKV"], better="higher", margin=0.4, baseline_name="SnapKV", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(("options", "says"), [({"lag": 0}, "lag=0"), ({"cross": 2}, "cross=2")])
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        LagKV(**options)
