"""InLine attention: injective weights by a subtraction, and kernels predicted from the image."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import MultiHeadAttention
from foveate.nn.parts.grid import DepthwiseConv, dynamic_conv, local_mass, neighbours, to_map, to_tokens
from foveate.nn.vision.inline_attention import InLineAttention, LocalKernels, injectivity_probe
from foveate.ops.base.linear import Linear
from foveate.ops.dense.softmax import Softmax
from foveate.ops.linear.inline import FEATURE_MAPS, InLine
from tests.support.tensors import assert_near, qkv
from tests.systems.nn.digits import MakeLayer, accuracy, fit, vit


class Divided(Linear):
    """Ordinary linear attention: the same features, divided by their sum."""

    def __init__(self, phi: str = "relu") -> None:
        super().__init__()
        self.phi = FEATURE_MAPS[phi]

    def query_features(self, q: Tensor, scale: float) -> Tensor:
        return self.phi(q) * scale

    def key_features(self, k: Tensor, scale: float) -> Tensor:
        return self.phi(k)


# -- the operator ------------------------------------------------------------------------------------------------------

PHI = {
    "identity": lambda x: x,
    "relu": lambda x: x * (x > 0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "exp": lambda x: 1.2214027581601699**x,  # e ** 0.2
}


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_release_s_factors_are_the_paper_s_weights(phi: str, scale: float | None) -> None:
    """`q (K^T V) s/n + (1 - s q · mean k) mean v` equals the weights `phi(q) · phi(k) - mean + 1/n`, scaled by 1/n."""
    q, k, v = qkv(7, 11, heads=4, kv_heads=4, width=5, value_width=3)
    s = 5**-0.5 if scale is None else scale
    fq, fk = PHI[phi](q), PHI[phi](k)
    factors = (s / 11) * fq @ (fk.mT @ v) + (1 - s * fq @ fk.mean(2, keepdim=True).mT) * v.mean(2, keepdim=True)
    op = InLine(phi)
    assert_near(op(q, k, v, scale=scale), factors, 1e-12)
    products = s * fq @ fk.mT / 11
    weights = products - products.sum(-1, keepdim=True) / 11 + 1 / 11
    assert_near(op.weights(q, k, scale=scale), weights, 1e-12)
    assert_near(op.weights(q, k, scale=scale).sum(-1), torch.ones(2, 4, 7, dtype=torch.float64), 1e-12)
    assert_near(op(q, k, v, scale=scale, engine="reference"), factors, 1e-12)


def test_a_query_of_zeros_sees_the_mean() -> None:
    q, k, v = qkv(6, 9, kv_heads=4)
    assert_near(InLine()(0 * q, k, v), v.mean(2, keepdim=True).expand(-1, -1, 6, -1), 1e-12)


def test_hidden_keys_count_neither_in_the_mean_nor_in_the_number() -> None:
    q, k, v = qkv(6, 9, kv_heads=4)
    seen = torch.tensor([True] * 5 + [False, True, False, True])
    for phi in PHI:
        out = InLine(phi)(q, k, v, mask=seen[None, None, None])
        assert_near(out, InLine(phi)(q, k[:, :, seen], v[:, :, seen]), 1e-12)
        alone = InLine(phi)(q, k, v, mask=torch.arange(9)[None, None, None] == 3)
        assert_near(alone, v[:, :, 3:4].expand(-1, -1, 6, -1), 1e-12)


def test_weights_may_be_negative_and_order_follows_scores() -> None:
    q, k, _ = qkv(6, 9, kv_heads=4)
    weights = InLine().weights(4 * q, k)
    assert (weights < 0).any()
    assert torch.equal(weights.argsort(-1), (q @ k.mT).argsort(-1))


def test_undefined_calls_are_refused() -> None:
    q, k, v = qkv(6)
    with pytest.raises(UnsupportedPattern, match='InLine does not define "causal self" attention'):
        InLine()(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match="InLine cannot go one token at a time"):
        InLine().init_state(1, 4, 2, 8, 8)
    with pytest.raises(OptionError, match="phi='elu' must be one of 'identity', 'relu', 'leaky_relu', 'exp'"):
        InLine("elu")


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_tokens_and_maps() -> None:
    x = torch.arange(24.0).reshape(2, 6, 2)
    image = to_map(x, (2, 3))
    assert image.shape == (2, 2, 2, 3)
    assert image[1, 0, 1, 2] == x[1, 5, 0]
    assert torch.equal(to_tokens(image), x)


def convolved(image: Tensor, kernels: Tensor) -> Tensor:
    """Convolve `(B, C, H, W)` with kernels `(B, C, K, K)`, pixel by pixel."""
    out, reach = torch.zeros_like(image), kernels.shape[-1] // 2
    for y in range(image.shape[2]):
        for x in range(image.shape[3]):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < image.shape[2] and 0 <= x + dx < image.shape[3]:
                        out[:, :, y, x] += kernels[:, :, dy + reach, dx + reach] * image[:, :, y + dy, x + dx]
    return out


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_over_the_grid(kernel: int) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 5, generator=random, dtype=torch.float64)
    kernels = torch.randn(2, 5, kernel, kernel, generator=random, dtype=torch.float64)
    assert_near(dynamic_conv(x, kernels, (4, 3)), to_tokens(convolved(to_map(x, (4, 3)), kernels)), 1e-12)
    conv = DepthwiseConv(5, kernel).double()
    with torch.no_grad():
        conv.conv.weight.copy_(kernels[0, :, None])
    expected = convolved(to_map(x, (4, 3)), kernels[:1].expand(2, -1, -1, -1)) + conv.conv.bias[:, None, None]
    assert_near(conv(x, (4, 3)), to_tokens(expected), 1e-12)
    assert DepthwiseConv(5, kernel, bias=False).conv.bias is None


def test_bad_convolutions() -> None:
    with pytest.raises(OptionError, match="kernel=4 must be odd"):
        DepthwiseConv(8, 4)
    for options in ({"dim": 0}, {"dim": 8, "kernel": 0}):
        with pytest.raises(OptionError, match="at least 1"):
            DepthwiseConv(**options)
    with pytest.raises(ShapeError, match=r"kernels must be \(B=2, C=5, K, K\); got \(2, 4, 3, 3\)"):
        dynamic_conv(torch.zeros(2, 12, 5), torch.zeros(2, 4, 3, 3), (4, 3))


def test_neighbours_and_local_mass() -> None:
    near = neighbours((3, 4), 1)
    assert near[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert near[5].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert neighbours((3, 4), 0).equal(torch.eye(12, dtype=torch.bool))
    assert neighbours((1, 6), 2)[3].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    weights = torch.full((1, 1, 12, 12), -0.5)
    assert_near(local_mass(weights, (3, 4))[0, 0], near.sum(-1) / 12, 1e-6)
    assert not local_mass(0 * weights, (3, 4)).any()
    with pytest.raises(ShapeError, match=r"weights must be \(B, H, N, N\) with N = H \* W of size=\(3, 3\)"):
        local_mass(weights, (3, 3))
    with pytest.raises(OptionError, match="reach=-1"):
        local_mass(weights, (3, 4), -1)


# -- the layer ---------------------------------------------------------------------------------------------------------


def by_hand(layer: InLineAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the layer head by head, and its kernels channel by channel."""
    dim, heads, first = layer.dim, layer.heads, layer.prefix
    width = dim // heads
    qkv = x @ layer.qkv.weight.mT + (0 if layer.qkv.bias is None else layer.qkv.bias)
    phi = PHI[layer.op.phi]
    parts = []
    for h in range(heads):
        q, k, v = (qkv[..., i * dim + h * width : i * dim + (h + 1) * width] for i in range(3))
        products = phi(q) @ phi(k).mT * width**-0.5
        parts.append((products - products.mean(-1, keepdim=True) + 1) @ v / x.shape[1])
    out = torch.cat(parts, -1)
    if layer.local is not None:
        token, kernels = x.mean(1), []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            hidden = token[:, own] @ layer.local.hidden.weight[own, :, 0].mT + layer.local.hidden.bias[own]
            nine = slice(9 * own.start, 9 * own.stop)
            hidden = hidden * torch.special.ndtr(hidden)  # GELU
            kernels.append(hidden @ layer.local.kernels.weight[nine, :, 0].mT + layer.local.kernels.bias[nine])
        kernels = torch.cat(kernels, -1).reshape(-1, dim, 3, 3)
        image = to_map(qkv[:, first:, 2 * dim :], size)
        out = out + torch.cat([0 * out[:, :first], to_tokens(convolved(image, kernels))], 1)
    return out @ layer.out.weight.mT + layer.out.bias


@pytest.mark.parametrize(
    "options", [{}, {"phi": "exp"}, {"bias": True}, {"class_token": True}, {"local": False}], ids=str
)
def test_the_layer_by_hand(options: dict) -> None:
    torch.manual_seed(0)
    layer = InLineAttention(12, 3, **options).double()
    x = torch.randn(2, 12 + layer.prefix, 12, dtype=torch.float64)
    assert_near(layer(x, size=(3, 4)), by_hand(layer, x, (3, 4)), 1e-12)


def test_without_kernels_it_is_inline_attention_alone() -> None:
    torch.manual_seed(0)
    layer, plain = InLineAttention(12, 3).double(), InLineAttention(12, 3, local=False).double()
    plain.load_state_dict({k: t for k, t in layer.state_dict().items() if not k.startswith("local")})
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    assert (layer(x, size=(3, 4)) - plain(x, size=(3, 4))).abs().max() > 1e-3
    with torch.no_grad():
        layer.local.kernels.weight.zero_()
        layer.local.kernels.bias.zero_()
    assert_near(layer(x, size=(3, 4)), plain(x, size=(3, 4)), 1e-12)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="heads=5 must divide dim=12"):
        InLineAttention(12, 5)
    with pytest.raises(OptionError, match="phi='elu'"):
        InLineAttention(12, 3, phi="elu")
    with pytest.raises(ShapeError, match=r"size=\(3, 4\) must be \(H, W\) with H \* W = N - 1 = 11"):
        InLineAttention(12, 3, class_token=True)(torch.zeros(1, 12, 12), size=(3, 4))
    assert LocalKernels(12, 3)(torch.zeros(2, 12)).shape == (2, 12, 3, 3)


# -- the paper's claims ---------------------------------------------------------------------------------------------


def test_queries_of_different_length_get_different_weights(claim) -> None:
    q, k, _ = qkv(64, kv_heads=4, width=16)
    pairs = q, 2 * q

    def confused(op) -> float:
        return injectivity_probe(op.weights, pairs, k)

    claim(
        "queries that differ only in length get different weights: share of pairs with the same row of weights",
        ours=confused(InLine("relu")), baseline=confused(Divided("relu")), better="lower", margin=0.99,
        baseline_name="the same features, divided by their sum", seed=0,
    )  # fmt: skip
    assert confused(InLine()) == confused(Softmax()) == 0.0
    gap = (InLine().weights(q, k) - InLine().weights(2 * q, k)).abs().amax(-1)
    assert gap.min() > 1e-3


def test_the_probe() -> None:
    q, k, _ = qkv(8, kv_heads=4)
    other = q.clone()
    other[:, :, :2] *= 3
    assert injectivity_probe(Divided().weights, (q, other), k) == 1.0, "equal queries do not count"
    other[:, :, 1] = -q[:, :, 1]
    assert injectivity_probe(Divided().weights, (q, other), k) == 0.5
    assert injectivity_probe(Divided().weights, (q, other), k, tolerance=1e9) == 1.0
    assert injectivity_probe(lambda q, k: 0 * q @ k.mT, (q, other), k, tolerance=0) == 1.0
    with pytest.raises(OptionError, match="q_pairs must hold at least one pair"):
        injectivity_probe(Divided().weights, (q, q), k)
    with pytest.raises(ShapeError, match="q_pairs must be two tensors of one shape"):
        injectivity_probe(Divided().weights, (q, q[:1]), k)
    with pytest.raises(OptionError, match="tolerance=-1"):
        injectivity_probe(Divided().weights, (q, other), k, tolerance=-1)


def growth(op, first: int = 1024) -> float:
    """Return the time of four times `first` tokens over that of `first`, as interleaved minima."""
    best = {first: float("inf"), 4 * first: float("inf")}
    inputs = {n: qkv(n, batch=1, heads=1, kv_heads=1, width=32, dtype=torch.float32) for n in best}
    for _ in range(15):
        for n, given in inputs.items():
            start = time.process_time()
            op(*given)
            best[n] = min(best[n], time.process_time() - start)
    return best[4 * first] / best[first]


def test_time_grows_with_the_tokens(claim) -> None:
    claim(
        "four times the tokens take about four times as long: time at N = 4096 over time at N = 1024",
        ours=growth(InLine()), baseline=growth(Softmax()), better="lower", margin=3.0, baseline_name="softmax", seed=0,
    )  # fmt: skip


def digits_read(make_layer: MakeLayer) -> float:
    return accuracy(fit(vit(make_layer, depth=2, dim=48), epochs=4))


@pytest.mark.slow
def test_features_of_either_sign_train_with_the_subtraction(claim) -> None:
    """Sums of signed products may be near 0, where a division fails; the subtraction has no division."""
    claim(
        "signed features (the identity) train with the subtraction: accuracy on held-out digits",
        ours=digits_read(lambda dim, heads: InLineAttention(dim, heads, local=False)),
        baseline=digits_read(lambda dim, heads: MultiHeadAttention(dim, heads, op=Divided("identity"))),
        better="higher", margin=0.2, baseline_name="the same features, divided by their sum", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_with_the_local_residual_it_learns_better_than_softmax(claim) -> None:
    claim(
        "injective linear attention with local modelling beats softmax attention: accuracy on held-out digits",
        ours=digits_read(InLineAttention), baseline=digits_read(MultiHeadAttention), better="higher", margin=0.15,
        baseline_name="softmax attention", seed=0,
    )  # fmt: skip
