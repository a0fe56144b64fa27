"""Sigmoid attention: weights do not compete, and the bias makes it trainable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.core.call import AttentionCall
from foveate.core.engines import chunked
from foveate.core.errors import OptionError, UnsupportedPattern
from foveate.ops.base.scored import Scored
from foveate.ops.dense.sigmoid_attention import SigmoidAttention
from foveate.ops.dense.softmax import Softmax
from foveate.ops.functional import alibi
from tests.support.tensors import assert_near, gradients, qkv


def test_by_hand() -> None:
    q, k, v = qkv(6, kv_heads=4)
    logits = q @ k.transpose(-1, -2) * 8**-0.5
    assert_near(SigmoidAttention(-1.5)(q, k, v), torch.sigmoid(logits - 1.5) @ v, 1e-12)
    assert_near(SigmoidAttention()(q, k, v), torch.sigmoid(logits - math.log(6)) @ v, 1e-12)
    seen = torch.arange(1, 7, dtype=torch.float64)[:, None]
    assert_near(SigmoidAttention("row").weights(q, k, causal=True), torch.sigmoid(logits - seen.log()).tril(), 1e-12)
    assert_near(SigmoidAttention("row")(q, k, v), SigmoidAttention()(q, k, v), 1e-12)


def test_alibi() -> None:
    q, k, _ = qkv(6, kv_heads=4)
    logits = q @ k.transpose(-1, -2) * 8**-0.5
    gap = torch.arange(6) - torch.arange(6)[:, None]
    for variant, distance in (("paper", -gap.abs()), ("release", gap)):
        expected = torch.sigmoid(logits + alibi.alibi_slopes(4)[:, None, None] * distance)
        op = SigmoidAttention(0.0, alibi=True, variant=variant)
        assert_near(op.weights(q, k), expected, 1e-12)
        assert_near(op.weights(q, k, causal=True), expected.tril(), 1e-12)
        assert_near(op.weights(q[:, :, 4:], k, causal=True), expected.tril()[:, :, 4:], 1e-12)
    assert alibi.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert torch.allclose(alibi.alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=torch.float64))


def test_limits() -> None:
    q, k, v = qkv(9, 1)
    assert_near(SigmoidAttention(50.0)(q, k, v), v.repeat_interleave(2, 1).expand(-1, -1, 9, -1), 1e-12)
    q, k, v = qkv(9)
    weights = SigmoidAttention().weights(0 * q, k)
    assert_near(weights, torch.full_like(weights, 1 / 10), 1e-12)
    small = 1e-3
    near = (SigmoidAttention()(small * q, k, v) * 10 / 9 - Softmax()(small * q, k, v)).abs().max()
    assert near < 1e-3, "small scores: the softmax to first order, up to the row sum n / (n + 1)"


@pytest.mark.parametrize("size", [16, 64, 200])
def test_chunks_add_up(size: int) -> None:
    q, k, v = qkv(200, grad=True)
    op = SigmoidAttention()
    out = chunked.attend(AttentionCall(q, k, v, 8**-0.5, None, True, scoring=op.scoring()), queries=size)
    expected = op(q, k, v, causal=True, engine="reference")
    assert_near(out, expected, 1e-12)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_near(ours, theirs, 1e-12)


def test_huge_scores_stay_finite() -> None:
    q, k, v = qkv(9, grad=True, dtype=torch.float32)
    for sign in (1, -1):
        out = SigmoidAttention()(sign * 1e4 * q, k, v)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in gradients(out, (q, k, v)))


def test_it_streams_with_the_bias_it_was_trained_with() -> None:
    with pytest.raises(UnsupportedPattern, match="SigmoidAttention cannot go one token at a time"):
        SigmoidAttention().init_state(1, 4, 2, 8, 8)
    q, k, v = qkv(7)
    op = SigmoidAttention(-math.log(7))
    state = op.init_state(2, 4, 2, 8, 8, dtype=torch.float64)
    for t in range(7):
        out, state = op.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], state)
    assert_near(out, SigmoidAttention()(q, k, v, causal=True)[:, :, -1:], 1e-12)


@pytest.mark.parametrize("bias", ["log n", True, float("nan"), float("inf")])
def test_a_bad_bias_is_refused(bias: object) -> None:
    with pytest.raises(OptionError, match="bias="):
        SigmoidAttention(bias)


def test_a_bad_variant_is_refused() -> None:
    with pytest.raises(OptionError, match="variant='published'"):
        SigmoidAttention(variant="published")


def test_the_bias_keeps_the_first_weights_near_one_in_all(claim) -> None:
    q, k, _ = qkv(256, width=64)

    def distance_from_one(op: SigmoidAttention) -> float:
        return abs(op.weights(q, k).sum(-1).mean().item() - 1)

    claim(
        "a bias of -log n gives fresh weights a sum near 1, as in the softmax: its distance from 1 for n = 256",
        ours=distance_from_one(SigmoidAttention()), baseline=distance_from_one(SigmoidAttention(0.0)), better="lower",
        margin=100.0, baseline_name="no bias", seed=0,
    )  # fmt: skip
    assert distance_from_one(SigmoidAttention()) < 0.8


def test_keys_do_not_compete(claim) -> None:
    q, k, _ = qkv(32)
    changed = k.clone()
    changed[:, :, 5] = -3 * changed[:, :, 5]

    def spill(op: Scored) -> float:
        difference = (op.weights(q, k) - op.weights(q, changed)).abs()
        assert difference[..., 5].max() > 1e-3
        return difference[..., [j for j in range(32) if j != 5]].max().item()

    claim(
        "a key's weight depends only on that key: largest change of other weights if one key changes",
        ours=spill(SigmoidAttention()), baseline=spill(Softmax()), better="lower", baseline_name="softmax", seed=0,
    )  # fmt: skip
    assert spill(SigmoidAttention()) < 1e-12


class Classifier(nn.Module):
    """A one-block Transformer that classifies digits pixel by pixel, with any attention."""

    def __init__(self, op: Scored) -> None:
        super().__init__()
        self.op, self.heads = op, 4
        self.embed, self.place = nn.Linear(1, 32), nn.Parameter(0.5 * torch.randn(64, 32))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, 8)).permute(2, 0, 3, 1, 4)
        return self.out(self.op(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embed(pixels[..., None]) + self.place
        x = x + self.attend(x)
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


def test_the_bias_keeps_the_first_output_small(claim) -> None:
    def size(op: Scored) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Classifier(op)
            return model.attend(torch.randn(8, 64, 32)).norm(dim=-1).mean().item()

    claim(
        "a bias of -log n keeps an untrained block's attention output small: its norm over that of a softmax",
        ours=size(SigmoidAttention()) / size(Softmax()), baseline=size(SigmoidAttention(0.0)) / size(Softmax()),
        better="lower", margin=5.0, baseline_name="no bias", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_it_learns_as_well_as_softmax(claim) -> None:
    """It learns as well as softmax, up to one point, as the paper claims."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, digit = map(torch.tensor, datasets.load_digits(return_X_y=True))
    pixels = pixels.float() / 8 - 1
    order = torch.randperm(len(digit), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1400], order[1400:]

    def accuracy(op: Scored, seed: int) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Classifier(op)
            optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
            for batch in (train[torch.randint(1400, (64,))] for _ in range(300)):
                optimiser.zero_grad()
                F.cross_entropy(model(pixels[batch]), digit[batch]).backward()
                optimiser.step()
        with torch.no_grad():
            return (model(pixels[held_out]).argmax(-1) == digit[held_out]).float().mean().item()

    ours, softmax = (sum(accuracy(op, seed) for seed in range(2)) / 2 for op in (SigmoidAttention(), Softmax()))
    claim(
        "with the bias, sigmoid attention learns as well as softmax: accuracy on held-out digits",
        ours=ours, baseline=softmax - 0.01, better="higher", baseline_name="softmax less one point", seed=0,
    )  # fmt: skip
