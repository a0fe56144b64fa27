"""MAFormer: its block token by token, its limits, what global tokens see, the network, and what two streams learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError
from foveate.models import MAFormer
from foveate.nn import GlobalDownsampling, MAFBlock, WindowAttention
from foveate.nn.parts.blocks import Block, gelu_mlp
from tests.support.tensors import assert_near, gradients

DIM, HEADS = 12, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module: Any, seed: int = 0) -> Any:
    """Return the module in eval mode with parameters, and means of batches, of which all have an effect."""
    draw, module = torch.Generator().manual_seed(seed), module.double().eval()
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if x.is_floating_point():
                x += 0.2 * torch.randn(x.shape, generator=draw, dtype=torch.float64).abs() * (1 if "var" in name else 0)
                x += 0.2 * torch.randn(x.shape, generator=draw, dtype=torch.float64) * (0 if "var" in name else 1)
    return module


def make(**options: Any) -> MAFBlock:
    torch.manual_seed(0)
    return shaken(MAFBlock(DIM, HEADS, 2, **{"base_grid": (4, 6), "mlp_ratio": 2.0, **options}))


def norm(x: Tensor, by: nn.LayerNorm) -> Tensor:
    spread = (x.var(-1, unbiased=False, keepdim=True) + by.eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * by.weight + by.bias


def linear(x: Tensor, by: nn.Linear) -> Tensor:
    return x @ by.weight.mT + by.bias


def mlp(x: Tensor, by: nn.Sequential) -> Tensor:
    hidden = linear(x, by[0])
    return linear(hidden * torch.special.ndtr(hidden), by[2])


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attend head by head, for tokens without a batch; the bias is `(H, N, M)`."""
    out, width = [], DIM // HEADS
    for head in range(HEADS):
        at = slice(head * width, (head + 1) * width)
        logits = q[:, at] @ k[:, at].mT / width**0.5 + (bias[head] if isinstance(bias, Tensor) else bias)
        out.append(logits.softmax(-1) @ v[:, at])
    return torch.cat(out, -1)


def windowed(layer: WindowAttention, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Attend in windows of `w`, one after the other, without what would fill them up; x is `(N, C)`."""
    (w, _), part = layer.window, layer.attention
    cells = torch.cartesian_prod(*(torch.arange(side) for side in size))
    out = torch.zeros_like(x)
    for row in range(0, size[0], w):
        for column in range(0, size[1], w):
            inside = ((cells // w) == torch.tensor([row // w, column // w])).all(1)
            apart = cells[inside][:, None] - cells[inside] + w - 1
            bias = layer.bias.table[apart[..., 0] * (2 * w - 1) + apart[..., 1]].movedim(-1, 0)
            own = x[inside]
            heads = attended(linear(own, part.q), linear(own, part.k), linear(own, part.v), bias)
            out[inside] = linear(heads, part.out)
    return out


def pooled(x: Tensor, size: tuple[int, int], base: tuple[int, int]) -> Tensor:
    """Return the means of the cells that overlap each cell of the base grid."""
    grid, out = x.unflatten(0, size), []
    for i in range(base[0]):
        for j in range(base[1]):
            rows = slice(i * size[0] // base[0], -(-(i + 1) * size[0] // base[0]))
            columns = slice(j * size[1] // base[1], -(-(j + 1) * size[1] // base[1]))
            out.append(grid[rows, columns].mean((0, 1)))
    return torch.stack(out)


def by_hand(block: MAFBlock, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the block for one image, `(N, C)`."""
    normed = norm(x, block.norm)
    local = x + windowed(block.local, normed, size)
    local = local + mlp(norm(local, block.mlp_norm), block.mlp)
    mix = block.down.mix
    coarse = mix.weight @ pooled(normed, size, block.down.base_grid) + mix.bias[:, None] + block.down.places
    coarse, part = norm(coarse, block.global_norm), block.fusion.attention
    q = linear(norm(local, block.fusion.norm), part.q)
    return local + linear(attended(q, linear(coarse, part.k), linear(coarse, part.v)), part.out)


SIZES = [(4, 6), (5, 7), (8, 12), (1, 3), (2, 2)]


@pytest.mark.parametrize("size", SIZES)
def test_the_block_token_by_token(size: tuple[int, int]) -> None:
    """On its own grid, on larger and smaller ones, and where windows do not divide the grid."""
    block, x = make(), randn(2, size[0] * size[1], DIM)
    expected = torch.stack([by_hand(block, each, size) for each in x])
    assert_near(block(x, size=size), expected, 1e-11)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_the_gate_by_hand(size: tuple[int, int]) -> None:
    block, x = make(fusion="gate"), randn(2, size[0] * size[1], DIM)
    fine = x + block.local(block.norm(x), size=size)
    fine = fine + block.mlp(block.mlp_norm(fine))
    coarse = norm(block.down(block.norm(x), size), block.global_norm)
    spread = (block.fusion.spread.weight @ coarse + block.fusion.spread.bias[:, None]).mT.unflatten(2, (4, 6))
    if size != (4, 6):
        spread = F.interpolate(spread, size, mode="bilinear", align_corners=False)
    assert_near(block(x, size=size), fine + block.fusion.weight * spread.flatten(2).mT, 1e-11)
    assert all(grad.any() for grad in gradients(block(x, size=size), list(block.parameters())))


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_fusion_of_zeros_is_a_window_attention_block(size: tuple[int, int]) -> None:
    block, x = make(), randn(2, size[0] * size[1], DIM)
    for parameter in block.fusion.attention.out.parameters():
        nn.init.zeros_(parameter)
    plain = Block(WindowAttention(DIM, HEADS, 2, padding="hidden", relative=True), gelu_mlp(DIM, 2.0), nn.LayerNorm)
    ours = {name.replace("local.", "mixer."): value for name, value in block.state_dict().items()}
    plain.double().load_state_dict({name: ours[name] for name in plain.state_dict()})
    assert_near(block(x, size=size), plain(x, size=size), 1e-12)


def identity(down: GlobalDownsampling) -> None:
    nn.init.eye_(down.mix.weight)
    nn.init.zeros_(down.mix.bias)
    nn.init.zeros_(down.places)


def test_an_identity_returns_the_tokens() -> None:
    down = GlobalDownsampling(DIM, (4, 6), 1).double()
    identity(down)
    x = randn(2, 24, DIM)
    assert torch.equal(down(x, (4, 6)), x)
    nn.init.normal_(down.places)
    assert_near(down(x, (4, 6)), x + down.places, 1e-12)


def test_with_the_identity_every_token_attends_to_all() -> None:
    block, size = make(reduction=1), (4, 6)
    identity(block.down)
    (x,) = randn(1, 24, DIM)
    fine = x + block.local(block.norm(x)[None], size=size)[0]
    fine = fine + block.mlp(block.mlp_norm(fine))
    part, keys = block.fusion.attention, block.global_norm(block.norm(x))
    q, k, v = (y.unflatten(1, (HEADS, -1)).movedim(1, 0) for y in (
        part.q(block.fusion.norm(fine)), part.k(keys), part.v(keys),
    ))  # fmt: skip
    read = F.scaled_dot_product_attention(q, k, v).movedim(0, 1).flatten(1)
    assert_near(block(x[None], size=size)[0], fine + part.out(read), 1e-11)


# -- what global tokens see --------------------------------------------------------------------------------------------


def seen_by(block: MAFBlock, token: int, size: tuple[int, int]) -> Tensor:
    """Return a mask of the positions that a token's output depends on."""
    x = randn(1, size[0] * size[1], DIM).requires_grad_()
    (grad,) = torch.autograd.grad(block(x, size=size)[0, token].sum(), x)
    return grad[0].abs().sum(-1).reshape(size) > 0


def test_global_tokens_reach_every_position() -> None:
    size, block = (4, 6), make()
    assert seen_by(block, 8, size).all()
    for parameter in block.fusion.attention.out.parameters():
        nn.init.zeros_(parameter)
    window = torch.zeros(4, 6, dtype=torch.bool)
    window[0:2, 2:4] = True
    assert torch.equal(seen_by(block, 8, size), window)


def test_global_tokens_know_places() -> None:
    """Two tokens of one window that change places change all outputs; means over windows would be as before."""
    block, size = make(), (4, 6)
    x = randn(1, 24, DIM)
    changed = x.clone()
    changed[:, [0, 7]] = x[:, [7, 0]]  # both in the first window
    outside = torch.ones(24, dtype=torch.bool)
    outside[[0, 1, 6, 7]] = False
    moved = (block(changed, size=size) - block(x, size=size)).abs().amax(-1)[0]
    assert (moved[outside] > 1e-6).all()
    means = [F.avg_pool2d(y.mT.unflatten(2, size), 2) for y in (x, changed)]
    assert_near(means[0], means[1], 1e-12)


def test_sizes_of_parameters() -> None:
    block = MAFBlock(16, 2)
    assert block.local.window == (7, 7) and block.local.padding == "hidden"
    assert block.down.mix.weight.shape == (98, 196) and block.down.places.shape == (98, 16)
    assert block.mlp[0].weight.shape == (64, 16)
    assert GlobalDownsampling(8, (3, 5), 4).mix.weight.shape == (3, 15)
    assert GlobalDownsampling(8, 2, 9).mix.weight.shape == (1, 4)
    assert 0.01 < GlobalDownsampling(64).places.std().item() < 0.03


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_network_by_hand() -> None:
    net, images = shaken(MAFormer.example()), randn(2, 2, 21, 27)
    x = images
    for level, (down, stage) in enumerate(zip(net.downs, net.stages, strict=True)):
        for part in down:
            if isinstance(part, nn.BatchNorm2d):
                shape = (-1, 1, 1)
                x = (x - part.running_mean.view(shape)) / (part.running_var.view(shape) + part.eps).sqrt()
                x = x * part.weight.view(shape) + part.bias.view(shape)
            elif isinstance(part, nn.Conv2d):
                x = F.conv2d(x, part.weight, part.bias, 2, 1)
            else:
                x = x * torch.special.ndtr(x)
        size = x.shape[2:]
        y = x.flatten(2).mT
        for block in stage:
            if level < 2:
                assert block.down.base_grid == ((6, 6), (3, 3))[level]
                y = block(y, size=tuple(size))
            else:
                y = y + block.mixer(norm(y, block.norm), size=tuple(size))
                y = y + mlp(norm(y, block.mlp_norm), block.mlp)
        x = y.mT.unflatten(2, size)
    expected = linear(norm(y, net.norm).mean(1), net.head)
    assert_near(net(images), expected, 1e-10)


def test_options_of_the_network() -> None:
    with torch.device("meta"):
        net = MAFormer()
    kinds = [[isinstance(block, MAFBlock) for block in stage] for stage in net.stages]
    assert kinds == [[True] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert [net.stages[i][0].down.mix.weight.shape for i in (0, 1)] == [(1568, 3136), (392, 784)]
    assert [block.mixer.attention.heads for block in (net.stages[2][0], net.stages[3][0])] == [8, 8]
    net = MAFormer(
        (1, 1), (8, 8), (2, 2), side=30, fused=1, window=3, reduction=4, fusion="gate", mlp_ratio=1.0, classes=3
    )  # fmt: skip
    block = net.stages[0][0]
    assert block.down.base_grid == (8, 8) and block.down.mix.out_features == 16 and block.local.window == (3, 3)
    assert block.mlp[0].out_features == 8 and hasattr(block.fusion, "spread") and net.head.out_features == 3
    assert not any(isinstance(block, MAFBlock) for block in MAFormer((1,), (8,), (2,), side=8, fused=0).stages[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dims": (8,)}, "depths, dims and heads must be as long as each other; got 4, 1, 4"), ({"fused": -1}, "fused=-1"),
     ({"side": 0}, "side=0"), ({"classes": 0}, "classes=0"), ({"channels": 0}, "channels=0"),
     ({"depths": (1, 0, 1, 1)}, "depths=0"), ({"dims": (0, 8, 8, 8)}, "dims=0"), ({"fusion": "sum"}, "fusion='sum'"),
     ({"window": 0}, "window=0"), ({"reduction": 0}, "reduction=0")],
)  # fmt: skip
def test_bad_networks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        MAFormer(**{"side": 32, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads=5"), ({"window": 0}, "window=0"), ({"base_grid": (0, 2)}, "base_grid=0"),
     ({"base_grid": (1, 2, 3)}, r"base_grid=\(1, 2, 3\) must be a whole number, or two"),
     ({"reduction": 0}, "reduction=0"), ({"fusion": "sum"}, "fusion='sum'"), ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
     ({"padding": "cut"}, "padding='cut'")],
)  # fmt: skip
def test_bad_blocks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        MAFBlock(**{"dim": DIM, "heads": HEADS, **options})
    assert "\n" not in str(caught.value)


def test_bad_maps() -> None:
    with pytest.raises(ShapeError, match=r"size=\(4, 5\) must be"):
        make()(randn(1, 24, DIM), size=(4, 5))


# -- what the paper claims ---------------------------------------------------------------------------------------------


def scenes(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Make images of 16 x 16: squares of 4 x 4 pixels of one shade or of mixed shades, and 0 to 3 blobs.

    The label says which of the two textures it is, and whether the number of blobs is odd.
    """
    kind = torch.randint(0, 2, (count,), generator=random)
    fine, coarse = (torch.randint(0, 2, (count, side, side), generator=random) for side in (8, 4))
    shade = 2 * torch.where(kind[:, None, None] == 0, fine, coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)) - 1
    blobs = torch.randint(0, 4, (count,), generator=random)
    places = torch.rand(count, 64, generator=random).argsort(1)[:, :3]
    marks = torch.zeros(count, 64).scatter_add(1, places, (torch.arange(3) < blobs[:, None]).float())
    images = torch.stack([shade.float(), marks.unflatten(1, (8, 8))], 1)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    images[:, 0] += 0.3 * torch.randn(images[:, 0].shape, generator=random)
    return images, 2 * kind + blobs % 2


class Reader(nn.Module):
    """Patches of 2 x 2 pixels, two blocks, the mean over tokens, a linear head."""

    def __init__(self, block: Callable[[], nn.Module], dim: int = 24) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(2, dim, 2, 2), nn.LayerNorm(dim), nn.Linear(dim, 4)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        for block in self.blocks:
            x = block(x, size=(8, 8))
        return self.head(self.norm(x).mean(1))


class LocalOnly(nn.Module):
    """Two window attentions, of which the second takes the fusion's place, and a wider MLP."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.first = Block(WindowAttention(dim, 2, 2, relative=True), gelu_mlp(dim, 4.5), nn.LayerNorm)
        self.second = Block(WindowAttention(dim, 2, 2, relative=True), None, nn.LayerNorm)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.second(self.first(x, size=size), size=size)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "both": lambda: MAFBlock(24, 2, 2, (8, 8), mlp_ratio=2.0),
    "gate": lambda: MAFBlock(24, 2, 2, (8, 8), fusion="gate", mlp_ratio=2.25),
    "global": lambda: MAFBlock(24, 2, 1, (8, 8), mlp_ratio=2.0),
    "local": LocalOnly,
}


@cache
def error(kind: str, seeds: int = 3, steps: int = 400) -> float:
    """Return the mean share of new images that are classified wrong."""
    wrong = 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        net, random = Reader(BLOCKS[kind]), torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
        for _ in range(steps):
            images, label = scenes(32, random)
            optimiser.zero_grad()
            F.cross_entropy(net(images), label).backward()
            optimiser.step()
            schedule.step()
        images, label = scenes(1000, torch.Generator().manual_seed(99))
        with torch.no_grad():
            wrong += (net.eval()(images).argmax(1) != label).float().mean().item()
    return wrong / seeds


def test_the_readers_are_of_one_size() -> None:
    sizes = {kind: sum(p.numel() for p in Reader(make).parameters()) for kind, make in BLOCKS.items()}
    assert max(sizes.values()) <= 1.03 * min(sizes.values()), sizes


NAMES = {
    "local": "windows alone, as many parameters", "global": "global tokens alone: windows of one token",
    "gate": "a gated sum in place of the attention",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("baseline", NAMES)
def test_two_streams_see_texture_and_number(claim, baseline: str) -> None:
    claim(
        "two streams that attention joins tell texture and parity of blobs in 16 x 16 pixels: share of errors, 3 seeds",
        ours=error("both"), baseline=error(baseline), better="lower", margin=0.03, baseline_name=NAMES[baseline],
        seed=0,
    )  # fmt: skip
