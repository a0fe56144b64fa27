"""L2ViT: clamped linear attention, the convolutions that concentrate it, windows, and the network."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnknownKey
from foveate.models.vision.l2vit import L2ViT
from foveate.nn import MultiHeadAttention
from foveate.nn.parts.grid import to_map, to_tokens
from foveate.nn.parts.window import WindowAttention, Windows
from foveate.nn.vision.l2vit import LinearGlobalBlock, LocalConcentration, LocalWindowBlock, concentration, influence
from foveate.ops.dense.softmax import Softmax
from foveate.ops.linear.relu_linear import ReLULinear
from tests.support.tensors import assert_near, qkv
from tests.systems.nn.digits import accuracy, fit


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


# -- ReLU linear attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [1e-6, 6.0, 100.0])
def test_keys_first_is_queries_first(clamp: float) -> None:
    q, k, v = qkv(7, 11, heads=4, kv_heads=4, width=5, value_width=3)
    op = ReLULinear(4, 5, clamp).double()
    with torch.no_grad():
        op.temperature.copy_(torch.tensor([0.5, 1.0, -2.0, 3.0]))
    products = relu(q) @ relu(k).mT
    sums = products.sum(-1, keepdim=True)
    assert clamp != 6.0 or 0.2 < (sums < 6.0).double().mean() < 0.8, "both branches are taken"
    weights = op.temperature[:, None, None] * products / torch.where(sums < clamp, clamp, sums)
    assert_near(op.weights(q, k), weights, 1e-12)
    assert_near(op(q, k, v), weights @ v, 1e-12)
    assert_near(op(q, k, v, engine="reference"), weights @ v, 1e-12)
    halved = op.temperature[:, None, None] * products / 2 / torch.where(sums / 2 < clamp, clamp, sums / 2)
    assert_near(op.weights(q, k, scale=0.5), halved, 1e-12)


def test_with_a_tiny_clamp_rows_sum_to_one() -> None:
    q, k, _ = qkv(50, kv_heads=4, width=5)
    weights = ReLULinear(4, 5, 1e-6, temperature=1.0).double().weights(q, k)
    some = (relu(q) @ relu(k).mT).sum(-1) > 0
    assert_near(weights.sum(-1)[some], torch.ones_like(weights.sum(-1)[some]), 1e-12)
    assert not weights[~some].any()
    assert (weights >= 0).all()


def test_it_starts_as_the_release_does() -> None:
    op = ReLULinear(3, 16)
    assert_near(op.temperature, torch.full((3,), 0.25), 1e-7)
    assert op.clamp == 100.0
    assert_near(ReLULinear(3, 16, temperature=2.0).temperature, torch.full((3,), 2.0), 1e-7)


def test_bad_options_of_the_operator() -> None:
    for options, message in (
        ({"heads": 0}, "heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"clamp": 0.0}, "clamp=0.0 must be in"),
        ({"temperature": "hot"}, "temperature='hot'"),
    ):
        with pytest.raises(OptionError, match=message):
            ReLULinear(**{"heads": 4, "head_dim": 8, **options})
    with pytest.raises(ShapeError, match="q must have the operator's heads=3; got Hq=4"):
        ReLULinear(3, 8)(*qkv(4, dtype=torch.float32))


def test_it_spreads_more_widely_than_softmax(claim) -> None:
    q, k, _ = qkv(196, kv_heads=4, width=32)

    def entropies(op) -> Tensor:
        return torch.special.entr(op.weights(q, k).detach()).sum(-1)

    wide, narrow = entropies(ReLULinear(4, 32, 1e-6, temperature=1.0).double()), entropies(Softmax())
    assert (wide > narrow).double().mean() > 0.95
    claim(
        "ReLU linear attention concentrates less than softmax: entropy in nats of rows over 196 keys",
        ours=wide.mean().item(), baseline=narrow.mean().item(), better="higher", margin=0.2, baseline_name="softmax",
        seed=0,
    )  # fmt: skip


def test_time_grows_with_the_tokens(claim) -> None:
    def seconds(op, n: int) -> float:
        tensors, times = qkv(n, batch=1, heads=1, kv_heads=1, width=32, dtype=torch.float32), []
        for _ in range(9):
            start = time.process_time()
            op(*tensors)
            times.append(time.process_time() - start)
        return min(times)

    ours, softmax = (seconds(op, 4096) / seconds(op, 1024) for op in (ReLULinear(1, 32), Softmax()))
    claim(
        "four times the tokens take about four times as long: time at N = 4096 over time at N = 1024",
        ours=ours, baseline=softmax, better="lower", margin=3.0, baseline_name="softmax", seed=0,
    )  # fmt: skip


# -- windows -----------------------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    windows = Windows((3, 5), (2, 3))
    assert windows.counts == (2, 2)
    assert windows.padding == (1, 1)
    x = 1 + torch.arange(30.0).reshape(2, 15, 1)
    parts = windows.partition(x)[..., 0]
    assert parts.shape == (8, 6)
    assert parts[0].tolist() == [1, 2, 3, 6, 7, 8]
    assert parts[1].tolist() == [4, 5, 0, 9, 10, 0]
    assert parts[2].tolist() == [11, 12, 13, 0, 0, 0]
    assert parts[3].tolist() == [14, 15, 0, 0, 0, 0]
    assert parts[4].tolist() == [16, 17, 18, 21, 22, 23]
    assert torch.equal(windows.real(), parts[:4] > 0)
    assert torch.equal(windows.merge(windows.partition(x)), x)


@pytest.mark.parametrize(("size", "window"), [((4, 6), (2, 3)), ((5, 4), (3, 3)), ((1, 7), (2, 4)), ((3, 2), (7, 7))])
def test_merge_undoes_partition(size: tuple[int, int], window: tuple[int, int]) -> None:
    windows, x = Windows(size, window), torch.randn(2, size[0] * size[1], 3)
    parts = windows.partition(x)
    assert parts.shape == (2 * windows.counts[0] * windows.counts[1], window[0] * window[1], 3)
    assert torch.equal(windows.merge(parts), x)
    assert windows.real().sum() == size[0] * size[1]


def attended(layer: WindowAttention, x: Tensor, size: tuple[int, int], hidden: bool) -> Tensor:
    """Compute window attention by a mask over the whole padded grid."""
    (h, w), (below, right) = layer.window, Windows(size, layer.window).padding
    tall, wide = size[0] + below, size[1] + right
    padded = F.pad(x.unflatten(1, size), (0, 0, 0, right, 0, below)).flatten(1, 2)
    at = torch.arange(tall * wide)
    window = (at // wide // h) * (wide // w) + at % wide // w
    mask = window[:, None] == window
    inside = (at // wide < size[0]) & (at % wide < size[1])
    if hidden:
        mask = mask & inside
    return layer.attention(padded, mask=mask)[:, inside]


@pytest.mark.parametrize("padding", ["seen", "hidden"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 2)])
def test_window_attention_is_attention_under_a_mask(padding: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = WindowAttention(12, 3, (2, 3), padding=padding).double()
    x = torch.randn(2, size[0] * size[1], 12, dtype=torch.float64)
    assert_near(layer(x, size=size), attended(layer, x, size, padding == "hidden"), 1e-12)


def test_a_window_over_the_whole_grid_is_global_attention() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    for layer in (WindowAttention(12, 3, (3, 4)).double(), WindowAttention(12, 3, 7, padding="hidden").double()):
        assert_near(layer(x, size=(3, 4)), layer.attention(x), 1e-12)
    seen = WindowAttention(12, 3, 7).double()
    assert (seen(x, size=(3, 4)) - seen.attention(x)).abs().max() > 1e-3, "the release's zeros have an effect"
    assert WindowAttention(12, 3).window == (7, 7)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": (2, 0)}, {"padding": "zeros"}])
def test_bad_windows(options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        WindowAttention(12, 3, **options)


# -- blocks ------------------------------------------------------------------------------------------------------------


def shaken(module: nn.Module) -> nn.Module:
    """Randomise every parameter and statistic, in float64 and eval mode."""
    random = torch.Generator().manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=random, dtype=tensor.dtype))
                if name.endswith("running_var"):
                    tensor.add_(1.0)
    return module


def conv(module: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    weight, bias = module.conv.weight, module.conv.bias
    return to_tokens(F.conv2d(to_map(x, size), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[2]))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def gelu(x: Tensor) -> Tensor:
    return x * torch.special.ndtr(x)


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    return gelu(x @ module[0].weight.mT + module[0].bias) @ module[2].weight.mT + module[2].bias


def concentrated(module: LocalConcentration, x: Tensor, size: tuple[int, int]) -> Tensor:
    x, batch = gelu(conv(module.first, x, size)), module.norm
    x = (x - batch.running_mean) / (batch.running_var + 1e-5).sqrt() * batch.weight + batch.bias
    return conv(module.second, x, size)


@pytest.mark.parametrize("kernel", [None, 3, 7])
def test_the_global_block_by_hand(kernel: int | None) -> None:
    size = 5, 3
    x = torch.randn(2, 15, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    block = shaken(LinearGlobalBlock(12, 3, kernel=kernel, clamp=2.0, mlp_ratio=1.5))
    assert block.mlp[0].out_features == 18
    y = x + conv(block.position, x, size)
    y = y + block.attention(norm(block.norm, y))
    if kernel is not None:
        y = y + concentrated(block.concentration, norm(block.concentration_norm, y), size)
    y = y + mlp(block.mlp, norm(block.mlp_norm, y))
    assert_near(block(x, size=size), y, 1e-12)


def test_parts_of_a_global_block() -> None:
    block = LinearGlobalBlock(12, 3)
    assert isinstance(block.attention, MultiHeadAttention)
    assert isinstance(block.attention.op, ReLULinear)
    assert block.attention.op.clamp == 100.0
    assert_near(block.attention.op.temperature, torch.full((3,), 0.5), 1e-6)
    assert block.attention.q.bias is not None
    assert block.concentration.first.conv.kernel_size == block.concentration.second.conv.kernel_size == (7, 7)
    assert block.position.conv.kernel_size == (3, 3)
    assert block.mlp[0].out_features == 48


def test_the_window_block_by_hand() -> None:
    size = 5, 3
    x = torch.randn(2, 15, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for padding in ("seen", "hidden"):
        block = shaken(LocalWindowBlock(12, 3, 2, mlp_ratio=1.5, padding=padding))
        assert block.mlp[0].out_features == 18
        y = x + conv(block.position, x, size)
        y = y + attended(block.attention, norm(block.norm, y), size, padding == "hidden")
        y = y + conv(block.second_position, y, size)
        y = y + mlp(block.mlp, norm(block.mlp_norm, y))
        assert_near(block(x, size=size), y, 1e-12)
    assert LocalWindowBlock(12, 3).attention.window == (7, 7)
    assert LocalWindowBlock(12, 3).attention.padding == "seen"
    assert LocalWindowBlock(12, 3).mlp[0].out_features == 48


def test_in_training_the_concentration_normalizes_over_the_batch() -> None:
    module = LocalConcentration(4, 3).double()
    x = torch.randn(5, 12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = gelu(conv(module.first, x, (3, 4)))
    spread = (inside.var((0, 1), correction=0) + 1e-5).sqrt()
    assert_near(module(x, (3, 4)), conv(module.second, (inside - inside.mean((0, 1))) / spread, (3, 4)), 1e-12)
    assert LocalConcentration(4).first.conv.kernel_size == (7, 7)


def test_refusals() -> None:
    for make in (LinearGlobalBlock, LocalWindowBlock):
        with pytest.raises(OptionError, match="heads=5 must divide dim=12"):
            make(12, 5)
        with pytest.raises(OptionError, match="mlp_ratio=0"):
            make(12, 3, mlp_ratio=0)
    with pytest.raises(OptionError, match="kernel=4 must be odd"):
        LinearGlobalBlock(12, 3, kernel=4)
    with pytest.raises(OptionError, match="clamp=0"):
        LinearGlobalBlock(12, 3, clamp=0)


# -- concentration -----------------------------------------------------------------------------------------------------


def test_concentration_by_hand() -> None:
    uniform = torch.full((2, 3, 12, 12), -7.0)
    found = concentration(uniform, (3, 4), reach=1)
    assert found.mass == pytest.approx((4 * 4 + 6 * 6 + 2 * 9) / 144)
    assert found.entropy == pytest.approx(math.log(12))
    peaked = concentration(torch.eye(12), (3, 4), reach=0)
    assert peaked.mass == pytest.approx(1)
    assert peaked.entropy == pytest.approx(0)
    assert concentration(uniform, (3, 4)).mass == pytest.approx(1), "everything is within reach 3"
    assert concentration(torch.ones(36, 36), (1, 36)).mass == pytest.approx((36 * 7 - 12) / 36**2)


def test_the_influence_of_linear_maps() -> None:
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6, 3)
    assert_near(influence(lambda x: mixing @ x, x), mixing.abs() * 3**0.5, 1e-5)


def test_the_convolutions_restore_the_local_peak(claim) -> None:
    size, x = (6, 6), torch.randn(1, 36, 12, generator=torch.Generator().manual_seed(0))

    def mass(kernel: int | None) -> float:
        torch.manual_seed(0)
        block = LinearGlobalBlock(12, 2, kernel=kernel, clamp=1.0).eval()

        def mixed(x: Tensor) -> Tensor:
            y = block.attention(block.norm(x))
            return y if kernel is None else y + block.concentration(block.concentration_norm(x + y), size)

        found = influence(mixed, x)
        return concentration(found - found.diag().diag(), size, reach=2).mass

    claim(
        "local concentration gives linear attention a local peak: share of a token's influence from the 5x5 around it",
        ours=mass(3), baseline=mass(None), better="higher", margin=0.2, baseline_name="without the convolutions",
        seed=0,
    )  # fmt: skip


# -- the network -------------------------------------------------------------------------------------------------------


def small(**options) -> L2ViT:
    torch.manual_seed(0)
    return L2ViT((1, 3), (8, 12), (2, 3), window=2, channels=2, classes=5, **options)


def test_the_network_by_hand() -> None:
    net = shaken(small(patch=2))
    images = torch.randn(2, 2, 10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = F.conv2d(images, net.stem.weight, net.stem.bias, stride=2)
    x = net.stages[0][0](norm(net.stem_norm, to_tokens(first)), size=(5, 3))
    image = F.pad(to_map(norm(net.downs[0].norm, x), (5, 3)), (0, 1, 0, 1))
    x = to_tokens(F.conv2d(image, net.downs[0].conv.weight, net.downs[0].conv.bias, stride=2))
    for block in net.stages[1]:
        x = block(x, size=(3, 2))
    expected = norm(net.norm, x).mean(1) @ net.head.weight.mT + net.head.bias
    assert_near(net(images), expected, 1e-12)
    kinds = [type(block) for stage in net.stages for block in stage]
    assert kinds == [LocalWindowBlock, LocalWindowBlock, LinearGlobalBlock, LocalWindowBlock]


@pytest.mark.parametrize("patch", [3, 4])
def test_an_image_is_filled_up_to_whole_patches(patch: int) -> None:
    """Zeros at the bottom and on the right fill up whole patches before the stem; the last pixels have an effect."""
    net = shaken(small(patch=patch))
    images = torch.randn(2, 2, 4 * patch - 1, 3 * patch - 2, generator=torch.Generator().manual_seed(1)).double()
    images.requires_grad_()
    out = net(images)
    assert_near(out, net(F.pad(images, (0, 2, 0, 1))), 0.0)
    assert (out - net(F.pad(images, (2, 0, 1, 0)))).abs().max() > 1e-4
    (grad,) = torch.autograd.grad(out.square().sum(), images)
    assert grad[:, :, -1].any() and grad[..., -1].any()
    assert net.stem(F.pad(images, (0, 2, 0, 1))).shape[2:] == (4, 3)


def test_the_mlp_s_width_reaches_the_blocks() -> None:
    def widths(net: L2ViT) -> list[list[int]]:
        return [[block.mlp[0].out_features for block in stage] for stage in net.stages]

    assert widths(small()) == [[32], [48] * 3]
    assert widths(small(mlp_ratio=2)) == [[16], [24] * 3]
    assert widths(small(mlp_ratio=(2.0, 3.5))) == [[16], [42] * 3], "one for each stage, as in the release"
    with pytest.raises(OptionError, match=r"mlp_ratio=\(1.0, 2.0, 3.0\) must be a number, or 2 numbers"):
        small(mlp_ratio=(1.0, 2.0, 3.0))


def test_the_paper_s_stem_and_sizes() -> None:
    net = shaken(small(clamp=3.0, kernel=5, padding="hidden"))
    images = torch.randn(1, 2, 13, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = images
    for index in (0, 3):
        stem, batch = net.stem[index], net.stem[index + 1]
        x = F.conv2d(x, stem.weight, stem.bias, stride=2, padding=1)
        x = F.batch_norm(x, batch.running_mean, batch.running_var, batch.weight, batch.bias)
        x = relu(x) if index == 0 else x
    assert_near(net.stem(images), x, 1e-12)
    assert x.shape == (1, 8, 4, 4)
    block = net.stages[1][1]
    assert block.attention.op.clamp == 3.0
    assert block.concentration.first.conv.kernel_size == (5, 5)
    assert net.stages[1][0].attention.padding == "hidden"
    assert net.stages[1][0].attention.window == (2, 2)
    fresh = small()
    assert abs(fresh.stages[1][2].mlp[0].weight.std().item() - 0.02) < 0.002
    assert not fresh.stem[0].bias.any()


@pytest.mark.parametrize(("name", "millions"), [("tiny", 29), ("small", 50), ("base", 89)])
def test_the_paper_s_networks(name: str, millions: int) -> None:
    with torch.device("meta"):
        net = L2ViT.of_size(name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert len(net.stages) == 4


def test_bad_networks() -> None:
    for options, message in (
        ({"depths": (1,)}, "depths, dims and heads must be as long"),
        ({"dims": (8, 0)}, "dims=0"),
        ({"depths": (1, 0)}, "depths=0"),
        ({"patch": 0}, "patch=0"),
        ({"channels": 0}, "channels=0"),
        ({"classes": 0}, "classes=0"),
    ):
        with pytest.raises(OptionError, match=message):
            L2ViT(**{"depths": (1, 1), "dims": (8, 8), "heads": (2, 2), **options})
    with pytest.raises(UnknownKey, match='unknown size of L2ViT "tinny"; did you mean "tiny"'):
        L2ViT.of_size("tinny")
    with pytest.raises(ShapeError, match=r"images must be \(B, 2, H, W\); got Tensor \(1, 3, 8, 8\) float32"):
        small()(torch.zeros(1, 3, 8, 8))


class Digits(nn.Module):
    """Four by four tokens of two by two pixels, a block of windows and a global one."""

    def __init__(self, kernel: int | None) -> None:
        super().__init__()
        self.net = L2ViT((2,), (48,), (4,), window=4, channels=1, classes=10, patch=2, kernel=kernel)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images[:, None])


@pytest.mark.slow
def test_local_concentration_helps_to_learn(claim) -> None:
    def read(kernel: int | None) -> float:
        torch.manual_seed(0)
        return accuracy(fit(Digits(kernel), epochs=4))

    claim(
        "local concentration makes linear attention learn better: accuracy on held-out digits",
        ours=read(7), baseline=read(None), better="higher", margin=0.2, baseline_name="the same net without it",
        seed=0,
    )  # fmt: skip
