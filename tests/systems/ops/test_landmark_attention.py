"""Landmark attention: the two-level softmax by hand, its limits, and how well a few landmarks find the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import oracle
from foveate.core.errors import OptionError
from foveate.ops import LandmarkAttention, with_landmarks
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near, qkv
from tests.systems.ops.recall import VOCAB, Model, Recall


def by_the_paper(q: Tensor, k: Tensor, block: int, top_k: int | None = None) -> Tensor:
    """The weights of one head, `(N, D)`, one query at a time, with a softmax for each group."""
    n, size = len(q), block + 1
    weights = torch.zeros(n, n, dtype=torch.float64)
    scores = q @ k.T / math.sqrt(q.shape[1])
    for i in range(n):
        own = i // size
        landmarks = [c * size + block for c in range(own)]
        if top_k is not None:
            landmarks = sorted(landmarks, key=lambda j: float(scores[i, j]), reverse=True)[:top_k]
        mine = [j for j in range(own * size, i + 1) if j % size != block]
        group = torch.softmax(scores[i, [*mine, *landmarks]], 0)
        weights[i, mine] = group[: len(mine)]
        for share, landmark in zip(group[len(mine) :], landmarks, strict=True):
            keys = list(range(landmark - block, landmark))
            weights[i, keys] = share * torch.softmax(scores[i, keys], 0)
    return weights


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("engine", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("n, block", [(96, 7), (50, 7), (9, 1)])
def test_it_is_the_paper(n: int, block: int, engine: str, top_k: int | None) -> None:
    q, k, v = qkv(n, batch=1)
    op = LandmarkAttention(block, top_k)
    expected = torch.stack([by_the_paper(q[0, h], k[0, h // 2], block, top_k) for h in range(4)])[None]
    assert_near(op.weights(q, k, causal=True), expected, 1e-10)
    assert_near(op(q, k, v, causal=True, engine=engine), expected @ v.repeat_interleave(2, 1), 1e-10)
    assert_near(op(q[:, :, -3:], k, v, causal=True), expected[:, :, -3:] @ v.repeat_interleave(2, 1), 1e-10)


def test_rows_sum_to_one_and_landmarks_have_no_weight() -> None:
    q, k, _ = qkv(60)
    weights = LandmarkAttention(6).weights(3 * q, k, causal=True)
    assert_near(weights.sum(-1), torch.ones(2, 4, 60), 1e-12)
    assert not weights[..., 6::7].any()
    assert not weights.triu(1).any()
    assert (weights[..., 50, :49].unflatten(-1, (7, 7))[..., :6] > 0).all(), "every ordinary key of the past has some"


def test_a_landmark_moves_the_weight_of_its_block_alone() -> None:
    """A higher landmark raises all weights of its block by one factor, and changes no other block's shares."""
    q, k, _ = qkv(32, batch=1, heads=1, kv_heads=1)
    op, moved = LandmarkAttention(7), k.clone()
    moved[..., 15, :] += 2 * q[..., 30, :]
    before, after = (op.weights(q, x, causal=True)[0, 0, 30] for x in (k, moved))
    factors = (
        after[[*range(7), *range(8, 15), *range(16, 23), *range(24, 30)]]
        / before[[*range(7), *range(8, 15), *range(16, 23), *range(24, 30)]]
    )
    assert (factors[7:14] > 1.5).all() and factors[7:14].std() < 1e-9
    assert torch.cat([factors[:7], factors[14:]]).std() < 1e-9 and (factors[:7] < 1).all()


def test_without_landmarks_it_is_causal_attention() -> None:
    q, k, v = qkv(40)
    assert_near(LandmarkAttention(40)(q, k, v, causal=True), oracle.attention(q, k, v, causal=True), 1e-12)


@pytest.mark.parametrize("top_k", [None, 9])
def test_chunks_after_a_cache_equal_the_whole_call(top_k: int | None) -> None:
    """Reading every block, chunk by chunk and at last token by token, gives the training form."""
    q, k, v = qkv(60)
    op, out = LandmarkAttention(5, top_k), []
    state = None
    for first, last in ((0, 6), (6, 12), (12, 29), (29, 54)):
        y, state = op.prefill(*(x[:, :, first:last] for x in (q, k, v)), state=state)
        out.append(y)
    for t in range(54, 60):
        y, state = op.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        out.append(y)
    assert_near(torch.cat(out, 2), LandmarkAttention(5)(q, k, v, causal=True), 1e-10)


def test_a_block_without_keys_gets_no_weight() -> None:
    q, k, _ = qkv(30)
    mask = torch.ones(2, 1, 1, 30, dtype=torch.bool)
    mask[0, ..., 6:11], mask[1, ..., 11] = False, False
    weights = LandmarkAttention(5).weights(q, k, mask=mask, causal=True)
    rows = weights.sum(-1)
    assert_near(rows[1], torch.ones(4, 30), 1e-12)
    assert_near(rows[0, :, 12:], torch.ones(4, 18), 1e-12)
    assert not weights[0, :, 12:, 6:11].any()
    assert not weights[1, :, 12:, 6:11].any(), "a hidden landmark hides its block"


def test_gradients() -> None:
    q, k, v = qkv(16, batch=1, heads=2, kv_heads=1, width=4, grad=True)
    for op in (LandmarkAttention(3), LandmarkAttention(3, 2)):
        assert torch.autograd.gradcheck(lambda *given, op=op: op(*given, causal=True), (q, k, v))
        out = op(q, k, v, causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), k)
        assert grad[..., 3::4, :][..., :3, :].any(), "landmarks are trained though they have no value"


def test_a_few_landmarks_find_the_weight(claim: ClaimFixture) -> None:
    """Keys of a block share a direction, its landmark has it too; 2 of 15 blocks against as many recent keys."""
    random, block, blocks, d = torch.Generator().manual_seed(0), 15, 16, 32
    topics = torch.randn(blocks, d, generator=random, dtype=torch.float64)
    k = (topics.repeat_interleave(block + 1, 0) + 0.5 * torch.randn(256, d, generator=random))[None, None]
    asked = torch.randint(0, blocks - 1, (block,), generator=random)
    q = 2.0 * topics[asked][None, None]
    q = torch.cat([torch.zeros(1, 1, 256 - block, d).double(), q], 2)
    v = torch.randn(1, 1, 256, d, generator=random, dtype=torch.float64)
    rows = slice(256 - block, 255)
    whole = LandmarkAttention(block)(q, k, v, causal=True)[:, :, rows]
    few = LandmarkAttention(block, 2)(q, k, v, causal=True)[:, :, rows]
    at = torch.arange(256)
    recent = (at[:, None] - at < 3 * (block + 1))[None, None]
    local = oracle.attention(q, k, v, causal=True, mask=recent)[:, :, rows]

    def error(out: Tensor) -> float:
        return ((out - whole).norm() / whole.norm()).item()

    claim(
        "two of 15 earlier blocks, found by their landmarks, give the output of all: relative error",
        ours=error(few), baseline=0.2 * error(local), better="lower",
        baseline_name="a fifth of that of as many recent keys", seed=0,
    )  # fmt: skip


# -- a trained model ---------------------------------------------------------------------------------------------------

BLOCK, TASK = 7, Recall(pairs=10, length=56)


class Recent(nn.Module):
    """A trained landmark operator whose queries read the two blocks before their own, instead of the best two."""

    capabilities = LandmarkAttention.capabilities

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        block = torch.arange(k.shape[2]) // (BLOCK + 1)
        return LandmarkAttention(BLOCK)(q, k, v, causal=causal, mask=block[:, None] - block <= 2)


def recall_batch(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return recall with a landmark behind every block, and its targets; landmarks are none."""
    tokens, labels = TASK.batch(size, random)
    return with_landmarks(tokens, BLOCK, VOCAB), with_landmarks(labels + 100, BLOCK, 0) - 100


@pytest.mark.slow
def test_a_trained_model_recalls_from_two_blocks(claim: ClaimFixture) -> None:
    torch.manual_seed(0)
    model = Model([LandmarkAttention(BLOCK), LandmarkAttention(BLOCK)], unit=False)
    model.embed, random = nn.Embedding(VOCAB + 1, 64), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=1000, pct_start=0.1)
    for _ in range(1000):
        tokens, labels = recall_batch(32, random)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    tokens, labels = recall_batch(256, torch.Generator().manual_seed(1))
    far = (labels >= 0) & (torch.arange(tokens.shape[1]) >= 6 * (BLOCK + 1))  # two blocks back are no pairs

    @torch.no_grad()
    def accuracy(op: nn.Module) -> float:
        for mixer in model.mixers:
            mixer.op = op
        return (model(tokens).argmax(-1) == labels)[far].double().mean().item()

    every, few, near = (accuracy(op) for op in (LandmarkAttention(BLOCK), LandmarkAttention(BLOCK, 2), Recent()))
    assert every > 0.9
    claim(
        "a model trained with landmarks recalls values from the best 2 of up to 7 earlier blocks: accuracy",
        ours=few, baseline=every - 0.05, better="higher", baseline_name="that of all blocks, less 5 points", seed=0,
    )  # fmt: skip
    claim(
        "a model trained with landmarks recalls values from the best 2 of up to 7 earlier blocks: accuracy",
        ours=few, baseline=near, better="higher", margin=0.2, baseline_name="the 2 latest blocks", seed=0,
    )  # fmt: skip


def test_landmarks_are_inserted_behind_each_block() -> None:
    ids = torch.arange(10).reshape(2, 5)
    assert with_landmarks(ids, 2, 99).tolist() == [[0, 1, 99, 2, 3, 99, 4], [5, 6, 99, 7, 8, 99, 9]]
    assert with_landmarks(ids, 5, 99).tolist() == [[0, 1, 2, 3, 4, 99], [5, 6, 7, 8, 9, 99]]
    assert torch.equal(with_landmarks(ids, 6, 99), ids)


@pytest.mark.parametrize("make, says", [
    (lambda: LandmarkAttention(0), "block=0"), (lambda: LandmarkAttention(3, 0), "top_k=0"),
    (lambda: with_landmarks(torch.zeros(1, 4, dtype=torch.long), 0, 1), "block=0"),
    (lambda: with_landmarks(torch.zeros(1, 4, dtype=torch.long), 2, -1), "landmark=-1"),
])  # fmt: skip
def test_bad_options_are_refused(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=says):
        make()
