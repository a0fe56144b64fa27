"""The Set Transformer: its blocks by hand, invariance to order and padding, and learned pooling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.sequence.set_transformer import ISAB, MAB, PMA, SAB, SetTransformer
from tests.support.tensors import assert_near


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module: nn.Module) -> nn.Module:
    """Randomise every parameter, in float64."""
    module = module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * randn(*parameter.shape, seed=index))
    return module


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.mT + layer.bias


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def released(block: MAB, x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """Compute the released block element by element and head by head."""
    q, k, v = linear(block.q, x), linear(block.k, y), linear(block.v, y)
    width, out = q.shape[-1] // block.heads, torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(block.heads):
            own = slice(h * width, (h + 1) * width)
            for i in range(x.shape[1]):
                scores = torch.stack([(q[b, i, own] * k[b, j, own]).sum() / divisor for j in range(y.shape[1])])
                shares = scores.exp() / scores.exp().sum()
                mixed = sum(share * v[b, j, own] for j, share in enumerate(shares))
                out[b, i, own] = q[b, i, own] + mixed
    out = normed(block.norm, out)
    return normed(block.feed_norm, out + linear(block.feed, out).clamp_min(0))


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ln", [False, True])
@pytest.mark.parametrize(("scale", "divisor"), [("full", 12**0.5), ("head", 4**0.5)])
def test_the_block_by_hand(ln: bool, scale: str, divisor: float) -> None:
    block = shaken(MAB(5, 7, 12, 3, ln=ln, scale=scale))
    x, y = randn(2, 4, 5), randn(2, 6, 7, seed=1)
    assert_near(block(x, y), released(block, x, y, divisor), 1e-12)
    assert MAB(5, 7, 12, 3).scale == pytest.approx(12**-0.5), "the release's"


def test_hidden_elements_of_a_block() -> None:
    block = shaken(MAB(5, 7, 12, 3))
    x, y = randn(2, 4, 5), randn(2, 6, 7, seed=1)
    seen = torch.tensor([True, True, False, True, False, True])
    y[:, ~seen] = float("nan")
    out = block(x, y, seen[None, None, None])
    assert_near(out, released(block, x, y[:, seen], 12**0.5), 1e-12)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("ln", [False, True])
@pytest.mark.parametrize(("scale", "divisor"), [("full", 12**0.5), ("head", 4**0.5)])
def test_encoders_and_pooling_by_hand(ln: bool, scale: str, divisor: float) -> None:
    options = {"ln": ln, "scale": scale}
    x = randn(2, 6, 5)
    set_block = shaken(SAB(12, 3, dim_in=5, **options))
    assert_near(set_block(x), released(set_block.block, x, x, divisor), 1e-12)
    induced = shaken(ISAB(12, 3, 2, dim_in=5, **options))
    points = induced.points.expand(2, -1, -1)
    assert points.shape == (2, 2, 12)
    expected = released(induced.spread, x, released(induced.gather, points, x, divisor), divisor)
    assert_near(induced(x), expected, 1e-12)
    z = randn(2, 6, 12)
    for variant in ("paper", "release"):
        pool = shaken(PMA(12, 3, 4, variant=variant, **options))
        fed = linear(pool.before, z).clamp_min(0) if variant == "paper" else z
        assert_near(pool(z), released(pool.block, pool.seeds.expand(2, -1, -1), fed, divisor), 1e-12)


@pytest.mark.parametrize(("scale", "divisor"), [("full", 12**0.5), ("head", 4**0.5)])
def test_maps_of_pooling_by_hand(scale: str, divisor: float) -> None:
    pool, z = shaken(PMA(12, 3, 2, variant="release", scale=scale)), randn(2, 6, 12)
    vectors, weights = pool.read(z)
    assert_near(vectors, pool(z), 1e-12)
    q, k = linear(pool.block.q, pool.seeds)[0], linear(pool.block.k, z)
    for seed in range(2):
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            expected = torch.softmax(k[..., own] @ q[seed, own] / divisor, -1)
            assert_near(weights[:, 3 * seed + head], expected, 1e-12)


def test_learned_points_are_projected_once_for_all_sets() -> None:
    induced, pool = ISAB(12, 3, 2), PMA(12, 3, 4)
    shapes: list[tuple[int, ...]] = []
    for block in (induced.gather, pool.block):
        block.q.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0))
    assert induced(x).shape == x.shape
    assert pool(x).shape == (5, 4, 12)
    assert shapes == [(1, 2, 12), (1, 4, 12)]


def test_a_set_block_is_torch_s_attention_beside_the_projected_query() -> None:
    block = shaken(SAB(12, 3, scale="head"))
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    parts = block.block.q, block.block.k, block.block.v
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.weight.copy_(torch.eye(12))
        theirs.out_proj.bias.zero_()
    x = randn(2, 6, 12)
    mixed = block.block.q(x) + theirs(x, x, x)[0]
    assert_near(block(x), mixed + F.relu(block.block.feed(mixed)), 1e-12)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_seeds_with_zero_queries_pool_the_mean(variant: str) -> None:
    pool = shaken(PMA(12, 3, 2, variant=variant))
    with torch.no_grad():
        for parameter in (*pool.block.q.parameters(), *pool.block.feed.parameters()):
            parameter.zero_()  # no query, and neither a weight nor a bias of the layer behind the attention
    z = randn(2, 6, 12)
    fed = linear(pool.before, z).clamp_min(0) if variant == "paper" else z
    mean = linear(pool.block.v, fed).mean(1, keepdim=True).expand(-1, 2, -1)
    assert_near(pool(z), mean, 1e-12)


def test_defaults() -> None:
    net = SetTransformer(3, 2)
    assert [type(block) for block in net.encode] == [ISAB, ISAB]
    assert net.encode[0].points.shape == (1, 32, 128)
    assert net.encode[0].heads == 4
    assert net.pool.seeds.shape == (1, 1, 128)
    assert net.pool.before is not None, "the paper's"
    assert PMA(4, 2).seeds.shape == (1, 1, 4)
    assert isinstance(net.pool.block.norm, nn.Identity)
    assert [type(block) for block in SetTransformer(3, 2, inducing=None).encode] == [SAB, SAB]
    bound = math.sqrt(6 / (128 + 32 * 128))  # Xavier's, as torch counts the fans of a (1, 32, 128) tensor
    assert 0.9 * bound < net.encode[0].points.abs().max() <= bound


# -- order and padding -------------------------------------------------------------------------------------------------

MODELS = {
    "induced": {"inducing": 4}, "full": {"inducing": None}, "release": {"inducing": 4, "variant": "release"},
    "normed": {"inducing": 4, "ln": True, "scale": "head", "outputs": 3},
}  # fmt: skip


def model(name: str) -> SetTransformer:
    torch.manual_seed(0)
    return SetTransformer(3, 2, dim=12, heads=3, **MODELS[name]).double()


@pytest.mark.parametrize("name", MODELS)
def test_order_and_padding_have_no_effect(name: str) -> None:
    net, x = model(name), randn(2, 7, 3)
    out = net(x)
    assert out.shape == (2, MODELS[name].get("outputs", 1), 2)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    assert_near(net(x[:, order]), out, 1e-12)
    padded = torch.cat([x, torch.full((2, 4, 3), float("nan"), dtype=torch.float64)], 1)
    there = masks.padding(torch.tensor([7, 7]), 11)
    padded_out = net(padded, there)
    assert_near(padded_out, out, 1e-12)
    padded_out.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    uneven = net(x, masks.padding(torch.tensor([7, 4]), 7))
    assert_near(uneven[:1], out[:1], 1e-12)
    assert_near(uneven[1:], net(x[1:, :4]), 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_its_blocks(name: str) -> None:
    net, x = model(name), randn(2, 7, 3)
    options = MODELS[name]
    for block in [*net.encode, net.pool, *net.decode[:2]]:
        inside = [part for part in block.modules() if isinstance(part, MAB)]
        assert all(part.scale == (4 if options.get("scale") == "head" else 12) ** -0.5 for part in inside)
        assert all(isinstance(part.norm, nn.LayerNorm) == bool(options.get("ln")) for part in inside)
    encoded = net.encode[1](net.encode[0](x))
    first, second, last = net.decode
    assert isinstance(first, SAB)
    assert isinstance(second, SAB)
    assert_near(net(x), linear(last, second(first(net.pool(encoded)))), 1e-12)
    assert (net.pool.before is None) == (options.get("variant") == "release")


@pytest.mark.parametrize("make", [lambda: SAB(12, 3), lambda: ISAB(12, 3, 4)])
def test_encoders_follow_the_order(make) -> None:
    layer, x = make().double(), randn(2, 7, 12)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    assert_near(layer(x[:, order]), layer(x)[:, order], 1e-12)
    seen = masks.padding(torch.tensor([7, 4]), 7)
    assert_near(layer(x, mask=seen)[1, :4], layer(x[1:, :4])[0], 1e-12)


def scores(layer: nn.Module, n: int) -> int:
    """Count the scores of a call on n elements, as queries times keys in every block."""
    counts = []
    hooks = [
        part.op.register_forward_hook(lambda _, given, __: counts.append(given[0].shape[2] * given[1].shape[2]))
        for part in layer.modules()
        if isinstance(part, MAB)
    ]
    layer(torch.zeros(1, n, 8))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def test_induced_points_make_cost_linear(claim) -> None:
    induced, full = ISAB(8, 2, 16), SAB(8, 2)
    assert scores(induced, 1000) == 2 * 16 * 1000
    claim(
        "four times the elements take four times the scores: scores for 4000 elements over those for 1000",
        ours=scores(induced, 4000) / scores(induced, 1000), baseline=scores(full, 4000) / scores(full, 1000),
        better="lower", margin=12.0, baseline_name="the full block (SAB)", seed=0,
    )  # fmt: skip
    assert (ISAB.capabilities.growth, SAB.capabilities.growth) == ("N", "N²")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAB(5, 7, 12, 5), "heads=5 must divide dim=12"),
        (lambda: MAB(0, 7, 12, 3), "dim_q=0"),
        (lambda: MAB(5, 0, 12, 3), "dim_kv=0"),
        (lambda: MAB(5, 7, 0, 3), "dim=0"),
        (lambda: MAB(5, 7, 12, 0), "heads=0"),
        (lambda: MAB(5, 7, 12, 3, scale="root"), "scale='root'"),
        (lambda: SAB(12, 5), "heads=5 must divide dim=12"),
        (lambda: ISAB(12, 3, 0), "inducing=0"),
        (lambda: PMA(12, 3, 0), "seeds=0"),
        (lambda: PMA(12, 3, variant="port"), "variant='port'"),
        (lambda: SetTransformer(3, 0), "dim_out=0"),
    ],
)
def test_bad_options(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 7, 7, dtype=torch.bool), torch.zeros(2, 1, 1, 7)])
def test_bad_masks(mask: Tensor) -> None:
    x, block = torch.zeros(2, 7, 12), MAB(12, 12, 12, 3)
    for call in (lambda: block(x, x, mask), lambda: block.read(x, x, mask)):
        with pytest.raises(ShapeError, match=r"mask must be bool \(B, 1, 1, Nk\)=\(2, 1, 1, 7\).*; got"):
            call()
    with pytest.raises(ShapeError, match=r"mask must be bool \(B, N\)=\(2, 7\).*; got"):
        PMA(12, 3)(x, mask)


# -- the paper's claims ---------------------------------------------------------------------------------------------


class MeanPooling(nn.Module):
    """The baseline (Deep Sets): layers on each element, the mean, and layers on it."""

    def __init__(self, dim_in: int, dim_out: int, outputs: int = 1, dim: int = 64) -> None:
        super().__init__()
        self.outputs = outputs
        steps = [layer for _ in range(3) for layer in (nn.ReLU(), nn.Linear(dim, dim))]
        self.encode = nn.Sequential(nn.Linear(dim_in, dim), *steps)
        self.decode = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, outputs * dim_out)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        there = x.new_ones(x.shape[:2]) if mask is None else mask[:, 0, 0].to(x.dtype)
        mean = (self.encode(x) * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return self.decode(mean).unflatten(1, (self.outputs, -1))


def trained(make, loss, steps: int) -> nn.Module:
    torch.manual_seed(0)
    net, random = make(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(net, random).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return net.requires_grad_(False)


def maximum_error(net: nn.Module, random: torch.Generator, sets: int = 64) -> Tensor:
    """Return the mean error of the predicted maximum of one to ten numbers in 0..1."""
    numbers = torch.rand(sets, 10, 1, generator=random)
    there = masks.padding(torch.randint(1, 11, (sets,), generator=random), 10)
    largest = numbers[..., 0].masked_fill(~there[:, 0, 0], 0).amax(1)
    return (net(numbers, there)[:, 0, 0] - largest).abs().mean()


@pytest.mark.slow
def test_it_finds_the_maximum(claim) -> None:
    def error(make) -> float:
        return 100 * maximum_error(trained(make, maximum_error, 500), torch.Generator().manual_seed(99), 2000).item()

    ours, baseline = error(lambda: SetTransformer(1, 1, dim=64, inducing=None)), error(lambda: MeanPooling(1, 1))
    claim(
        "attention finds the maximum of a set of numbers in 0..100: mean absolute error after 500 steps",
        ours=ours, baseline=baseline / 2, better="lower", margin=2.0,
        baseline_name="half the error of row-wise layers and mean pooling", seed=0,
    )  # fmt: skip


def mixture_loss(net: nn.Module, random: torch.Generator, sets: int = 16) -> Tensor:
    """Return minus the mean log likelihood of 100 points of 4 Gaussians in the plane under the predicted mixture."""
    centres = 8 * torch.rand(sets, 4, 2, generator=random) - 4
    shares = torch._sample_dirichlet(torch.ones(sets, 4), generator=random)
    which = torch.multinomial(shares, 100, True, generator=random)
    points = centres.gather(1, which[..., None].expand(-1, -1, 2))
    points = points + 0.3 * torch.randn(points.shape, generator=random)
    out = net(points)
    spread = F.softplus(out[..., 3:]) + 0.01
    gap = (points[:, :, None] - out[:, None, :, 1:3]) / spread[:, None]
    each = -(gap.square() / 2 + spread.log()[:, None]).sum(-1) - math.log(2 * math.pi)
    return -(each + out[..., 0].log_softmax(-1)[:, None]).logsumexp(-1).mean()


@pytest.mark.slow
def test_it_clusters(claim) -> None:
    def likelihood(make) -> float:
        return -mixture_loss(trained(make, mixture_loss, 400), torch.Generator().manual_seed(99), 300).item()

    claim(
        "induced attention and pooling with a seed for each cluster: log likelihood of points of 4 Gaussians",
        ours=likelihood(lambda: SetTransformer(2, 5, 4, dim=64, inducing=16)),
        baseline=likelihood(lambda: MeanPooling(2, 5, 4)), better="higher", margin=0.2,
        baseline_name="row-wise layers and mean pooling", seed=0,
    )  # fmt: skip
