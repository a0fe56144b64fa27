"""Efficient attention: the product from the right equals the product from the left, without the N x N matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.bench.parts.memory import peak_bytes
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn.vision.efficient_attention_2d import EfficientAttention2d
from foveate.ops import Operator, create
from foveate.ops.dense.softmax import Softmax
from foveate.ops.linear.efficient_attention import EfficientAttention
from foveate.ops.linear.lightning_attention import LightningAttention
from tests.support.tensors import assert_near, gradients, qkv
from tests.systems.nn import digits


def softmax(x: Tensor, dim: int) -> Tensor:
    return torch.exp(x) / torch.exp(x).sum(dim, keepdim=True)


def left(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the output with the matrix first."""
    return (softmax(scale * q, -1) @ softmax(k, -2).mT) @ v


@pytest.mark.parametrize("engine", ["chunked", "recurrent", "reference"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_from_the_right_it_is_the_same_as_from_the_left(engine: str, scale: float | None) -> None:
    q, k, v = qkv(9, 14, kv_heads=4, value_width=5, grad=True)
    out, exact = EfficientAttention()(q, k, v, engine=engine, scale=scale), left(q, k, v, scale or 1.0)
    assert_near(out, exact, 1e-12)
    for ours, theirs in zip(gradients(out, [q, k, v]), gradients(exact, [q, k, v]), strict=True):
        assert_near(ours, theirs, 1e-11)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(20, 20), (6, 20)])
def test_scaling_is_dot_product_attention_over_n(n_queries: int, n_keys: int) -> None:
    q, k, v = qkv(n_queries, n_keys, kv_heads=4, dtype=torch.float32)
    op = EfficientAttention("scaling")
    assert_near(op(q, k, v), (q @ k.mT / n_keys) @ v, 1e-5)
    assert_near(op(q, k, v, scale=2.0), 2 * (q @ k.mT / n_keys) @ v, 1e-5)


@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_masked_keys_are_not_among_the_n(normalizer: str) -> None:
    q, k, v = qkv(6, 10, kv_heads=4)
    seen = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    seen[0, ..., 7:] = False
    op = EfficientAttention(normalizer)
    out = op(q, k, v, mask=seen)
    assert_near(out[:1], op(q[:1], k[:1, :, :7], v[:1, :, :7]), 1e-12)
    assert_near(out[1:], op(q[1:], k[1:], v[1:]), 1e-12)


def test_implied_weights_are_a_distribution_over_the_keys() -> None:
    q, k, _ = qkv(9, 14, dtype=torch.float32)
    weights = EfficientAttention().weights(q, k)
    assert (weights >= 0).all()
    assert_near(weights.sum(-1), torch.ones(2, 4, 9), 1e-5)
    assert (weights - Softmax().weights(q, k)).abs().max() > 0.05  # it is not the softmax over keys


def test_it_is_equivariant_to_permutations() -> None:
    q, k, v = qkv(25, dtype=torch.float32)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    op = EfficientAttention()
    assert_near(op(q[:, :, order], k[:, :, order], v[:, :, order]), op(q, k, v)[:, :, order], 1e-5)


def test_memory_and_work_are_linear(claim) -> None:
    def peak(op: Operator, engine: str) -> float:
        q, k, v = qkv(4096, batch=1, heads=1, kv_heads=1, width=16, dtype=torch.float32)
        return peak_bytes(lambda: op(q, k, v, engine=engine), torch.device("cpu"))

    claim(
        "it needs less memory than dot-product attention: peak memory at 4,096 positions of 16 channels, as a ratio",
        ours=peak(EfficientAttention(), "auto") / peak(Softmax(), "reference"), baseline=1.0, better="lower",
        margin=0.98, baseline_name="dot-product attention with its matrix", seed=0,
    )  # fmt: skip

    def flops(op: Operator, n: int) -> float:
        q = torch.empty(1, 1, n, 16, device="meta")
        return op.plan(q, q, q).flops

    assert flops(EfficientAttention(), 16384) == 4 * flops(EfficientAttention(), 4096)
    assert flops(Softmax(), 16384) == 16 * flops(Softmax(), 4096)
    assert flops(EfficientAttention(), 16384) < flops(Softmax(), 16384) / 200


def test_refusals() -> None:
    q, k, v = qkv(6)
    op = EfficientAttention()
    with pytest.raises(UnsupportedPattern, match='does not define "causal self"'):
        op(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        op.prefill(q, k, v)
    with pytest.raises(OptionError, match="normalizer='sum'"):
        create("efficient_attention", normalizer="sum")


# -- the block for feature maps ----------------------------------------------------------------------------------------


def test_the_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = EfficientAttention2d(5, 6, heads=2, value_channels=8).double()
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def pixels(conv: nn.Conv2d) -> Tensor:
        y = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
        return y.flatten(2).transpose(1, 2)

    q, k, v = pixels(block.queries), pixels(block.keys), pixels(block.values)
    heads = [left(q[..., 3 * h : 3 * h + 3], k[..., 3 * h : 3 * h + 3], v[..., 4 * h : 4 * h + 4]) for h in range(2)]
    mixed = torch.cat(heads, -1) @ block.reprojection.weight[:, :, 0, 0].T + block.reprojection.bias
    assert_near(block(x), x + mixed.transpose(1, 2).unflatten(2, (3, 4)), 1e-12)
    templates = block.templates(x)
    assert templates.shape == (2, 2, 3, 3, 4)
    assert_near(templates[:, 1, 0].flatten(1), softmax(k[..., 3], -1), 1e-12)


def test_the_block_refuses() -> None:
    with pytest.raises(OptionError, match="heads=3 must divide key_channels=8"):
        EfficientAttention2d(4, 8, 3)
    with pytest.raises(OptionError, match="heads=2 must divide value_channels=5"):
        EfficientAttention2d(4, 8, 2, 5)
    with pytest.raises(OptionError, match="in_channels=0"):
        EfficientAttention2d(0, 8)
    with pytest.raises(UnsupportedPattern, match='op must define "self" attention; LightningAttention does'):
        EfficientAttention2d(4, 8, op=LightningAttention())
    with pytest.raises(ShapeError, match=r"x must be \(B, C=4, H, W\); got \(1, 5, 2, 2\)"):
        EfficientAttention2d(4, 8)(torch.zeros(1, 5, 2, 2))


class SmallCNN(nn.Module):
    """Two convolutions with a block between them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(1, 16, 3, padding=1), block
        self.second, self.head = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Linear(32 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(torch.relu(self.first(images[:, None])))
        return self.head(torch.relu(self.second(x)).flatten(1))


def read_right(kind: str, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = {
            "none": nn.Identity,
            "efficient": lambda: EfficientAttention2d(16, 16, 2),
            "dot product": lambda: EfficientAttention2d(16, 16, 2, op=Softmax()),
        }[kind]()
        net = SmallCNN(block)
    return digits.accuracy(digits.fit(net, seed=seed, epochs=10))


@pytest.mark.slow
def test_in_a_small_cnn_it_is_as_good_as_a_non_local_block(claim) -> None:
    found = {kind: sum(read_right(kind, seed) for seed in (0, 1)) / 2 for kind in ("none", "efficient", "dot product")}
    claim(
        "a CNN with one inserted block classifies as well as with a non-local block: accuracy on 450 digits, 2 seeds",
        ours=found["efficient"], baseline=found["dot product"] - 0.01, better="higher",
        baseline_name="one point under a dot-product non-local block", seed=0,
    )  # fmt: skip
    claim(
        "a CNN with one inserted block classifies better than one without: accuracy on 450 digits, 2 seeds",
        ours=found["efficient"], baseline=found["none"] - 0.003, better="higher",
        baseline_name="0.3 points under the CNN without a block", seed=0,
    )  # fmt: skip
