"""Lightning Attention-2: the tiled backward pass is exact, saves only its inputs, and costs constant time per token."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.linear.lightning_attention_2 import LightningAttention2, transnormer_decay


def qkv(n: int, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, n, dim, generator=g, dtype=dtype).requires_grad_() for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, decay: float) -> Tensor:
    """Compute the defining sum as one matrix."""
    lag = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return ((q @ k.transpose(-1, -2)) * torch.where(lag >= 0, decay ** lag.clamp_min(0).double(), 0.0)) @ v


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("n", [96, 101])
@pytest.mark.parametrize("backward", ["tiled", "autograd"])
def test_gradients_are_those_of_the_dense_form(decay, n, backward):
    q, k, v = qkv(n)
    seen = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = LightningAttention2([decay] * 2, block=16, backward=backward)(q, k, v, causal=True)
    exact = dense(q, k, v, decay)
    assert (out - exact).abs().max() < 1e-9
    ours, theirs = (torch.autograd.grad((x * seen).sum(), (q, k, v)) for x in (out, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-9


def test_gradcheck_with_a_state_from_before():
    op = LightningAttention2([0.9, 0.3], block=3)
    q, k, v = (x[:1, :, :8, :3].detach().requires_grad_() for x in qkv(8))
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, causal=True), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, causal=True), (q[:, :, 4:], k, v))


def test_only_autograd_can_be_differentiated_twice():
    q, k, v = (x[:1, :, :5, :2].detach().requires_grad_() for x in qkv(5))
    op = LightningAttention2([0.9, 0.3], block=2, backward="autograd")
    assert torch.autograd.gradgradcheck(lambda q, k, v: op(q, k, v, causal=True), (q, k, v))
    op.backward = "tiled"
    (grad,) = torch.autograd.grad(op(q, k, v, causal=True).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("block", [1, 7, 64, 130, 1000])
def test_the_block_does_not_change_the_result(block):
    q, k, v = qkv(130)
    op = LightningAttention2([0.95, 0.5], block=block)
    assert (op(q, k, v, causal=True) - op(q, k, v, causal=True, engine="recurrent")).abs().max() < 1e-9


def test_without_decay_it_is_plain_causal_linear_attention():
    q, k, v = qkv(40)
    plain = ((q @ k.transpose(-1, -2)).tril()) @ v
    torch.testing.assert_close(LightningAttention2([1.0, 1.0], block=16)(q, k, v, causal=True), plain)


@pytest.mark.parametrize("backward", ["tiled", "autograd"])
def test_a_strong_decay_over_a_long_block_stays_finite(backward):
    q, k, v = qkv(600, dtype=torch.float32)
    out = LightningAttention2([0.01, 1e-30], block=256, backward=backward)(q, k, v, causal=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *grads))
    # with such a decay only the token itself is left
    torch.testing.assert_close(out[:, 1], ((q * k).sum(-1, keepdim=True) * v)[:, 1])


def kept(op: LightningAttention2, n: int) -> int:
    """Count the numbers that are saved for the backward pass besides q, k and v."""
    inputs, sizes = qkv(n, dtype=torch.float32), {}
    own = {x.untyped_storage().data_ptr() for x in inputs}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        op(*inputs, causal=True)
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_nothing_kept_for_the_backward_pass_grows_with_the_length(claim):
    decay = [0.9, 0.8]
    short, long = (kept(LightningAttention2(decay, block=16), n) for n in (64, 512))
    assert short == long
    claim(
        "the tiled backward pass saves only q, k, v: further saved numbers per token at 512 tokens in blocks of 16",
        ours=long / 512, baseline=kept(LightningAttention2(decay, block=16, backward="autograd"), 512) / 512,
        better="lower", margin=1.0, baseline_name="the same blocks under autograd", seed=0,
    )  # fmt: skip


def seconds_per_token(n: int, engine: str) -> float:
    """Return the CPU seconds of forward and backward: the minimum of a few runs, for a busy machine."""
    inputs, op, best = qkv(n, heads=1, dim=16, dtype=torch.float32), LightningAttention2([0.99]), math.inf
    for _ in range(3):
        start = time.thread_time()
        torch.autograd.grad(op(*inputs, causal=True, engine=engine).sum(), inputs)
        best = min(best, time.thread_time() - start)
    return best / n


def test_time_per_token_does_not_grow_with_the_length(claim):
    ours, quadratic = (
        seconds_per_token(4096, engine) / seconds_per_token(512, engine) for engine in ("chunked", "reference")
    )
    assert ours < 1.5
    claim(
        "time per token, forward and backward, does not grow with the length: at 4,096 tokens over that at 512",
        ours=ours, baseline=quadratic, better="lower", margin=2.5, baseline_name="the quadratic form", seed=0,
    )  # fmt: skip


def test_decays_of_the_paper():
    for layer in range(4):
        expected = [math.exp(-(8 * h / 6) * (1 - layer / 4)) for h in range(6)]
        assert transnormer_decay(6, layer, 4).tolist() == pytest.approx(expected, rel=1e-12)
    first, later = transnormer_decay(6, 0, 4), transnormer_decay(6, 2, 4)
    assert first[0] == later[0] == 1.0
    assert (first.diff() < 0).all()
    assert (later[1:] > first[1:]).all()


def test_decays_of_the_release():
    decay = transnormer_decay(8, 3, 12, "release")
    slopes = [2 ** -(h + 1) * (1 - 3 / 11 + 1e-5) for h in range(8)]
    assert decay.tolist() == pytest.approx([math.exp(-s) for s in slopes], rel=1e-12)
    # the slopes of four heads, then every other one of eight
    six = -torch.log(transnormer_decay(6, 0, 12, "release")) / (1 + 1e-5)
    assert six.tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rel=1e-9)
    assert transnormer_decay(8, 0, 1, "release").shape == (8,)


def test_named_decays_are_those_given_by_number():
    q, k, v = qkv(20, heads=4)
    named = foveate.attend(q, k, v, "lightning_attention_2", causal=True, layer=1, depth=3, variant="release")
    given = LightningAttention2(transnormer_decay(4, 1, 3, "release"))(q, k, v, causal=True)
    torch.testing.assert_close(named, given, rtol=0, atol=0)


def test_the_decay_is_no_number_that_half_precision_rounds():
    q, k, v = (x.detach().bfloat16() for x in qkv(300))
    op = LightningAttention2([0.999, 0.995])
    torch.testing.assert_close(op.bfloat16()(q, k, v, causal=True), op(q, k, v, causal=True), rtol=0, atol=0)
    assert op.decay == (0.999, 0.995)
    assert torch.tensor(op.decay).bfloat16().double().tolist() != pytest.approx(op.decay, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": [0.5, 0.0]}, r"decay must be \(H,\) numbers in \(0, 1\]"),
        ({"decay": [0.5, 1.1]}, r"decay must be \(H,\) numbers in \(0, 1\]"),
        ({"decay": 0.5}, r"decay must be \(H,\)"),
        ({"decay": "transformer"}, 'must be "transnormer" or one number'),
        ({"layer": 2, "depth": 2}, r"layer=2 must be in 0\.\.1"),
        ({"variant": "port"}, "variant='port' must be one of 'paper', 'release'"),
        ({"block": 0}, "block=0"),
        ({"block": 2.5}, "block=2.5"),
        ({"backward": "fast"}, "backward='fast'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        LightningAttention2(**options)


def test_bad_calls():
    q, k, v = qkv(6, heads=4)
    with pytest.raises(ShapeError, match="decay has 2 heads; q has Hq=4"):
        LightningAttention2([0.5, 0.5])(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        LightningAttention2()(q, k, v)
