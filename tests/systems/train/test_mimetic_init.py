"""Mimetic initialisation: its weight products, and its effect on a vision transformer's first epochs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention
from foveate.train.init.mimetic_init import mimetic_init, mimetic_products
from tests.conftest import ClaimFixture
from tests.support.tensors import assert_near
from tests.systems.nn import digits

DIM, HEADS = 64, 4


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Timm(nn.Module):
    """An attention module with timm's attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)


LAYERS = {
    "ours": lambda: MultiHeadAttention(DIM, HEADS, bias=True),
    "torch": lambda: nn.MultiheadAttention(DIM, HEADS),
    "timm": Timm,
}


def targets(seed: int = 0, **weights: float) -> tuple[list[Tensor], Tensor]:
    """Return the target products, drawn in the initialiser's order: each head, then the values."""
    given = {"alpha_qk": 0.7, "beta_qk": 0.7, "alpha_vo": 0.4, "beta_vo": 0.4, **weights}
    random = draw(seed)

    def target(alpha: float, beta: float) -> Tensor:
        noise = torch.randn(DIM, DIM, generator=random, dtype=torch.float64) / math.sqrt(DIM)
        return alpha * noise + beta * torch.eye(DIM, dtype=torch.float64)

    heads = [target(given["alpha_qk"], given["beta_qk"]) for _ in range(HEADS)]
    return heads, target(given["alpha_vo"], -given["beta_vo"])


def of_rank(matrix: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of this rank."""
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weights", [{}, dict(alpha_qk=0.2, beta_qk=0.9, alpha_vo=0.1, beta_vo=0.6)])
def test_the_products_approximate_the_targets(kind: str, weights: dict) -> None:
    layer = LAYERS[kind]()
    assert mimetic_init(layer, generator=draw(), **weights) == 1
    heads, values = targets(**weights)
    qk, vo = mimetic_products(layer)
    for ours, target in zip(qk, heads, strict=True):
        assert_near(ours, of_rank(target, DIM // HEADS), 1e-5)
    assert_near(vo, values, 1e-5)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            assert not parameter.any()


def test_torchs_layer_and_ours_agree() -> None:
    """The initialiser reads both layouts correctly."""
    ours, theirs = LAYERS["ours"](), nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    for layer in (ours, theirs):
        mimetic_init(layer, generator=draw())
    x = torch.randn(2, 9, DIM, generator=draw(1))
    assert_near(ours(x), theirs(x, x, x, need_weights=False)[0], 1e-5)


def test_one_head_without_noise_is_the_identity() -> None:
    layer = MultiHeadAttention(16, 1)
    mimetic_init(layer, alpha_qk=0, beta_qk=1, alpha_vo=0, beta_vo=1)
    qk, vo = mimetic_products(layer)
    assert_near(qk[0], torch.eye(16), 1e-5)
    assert_near(vo, -torch.eye(16), 1e-5)


def test_diagonals_are_near_their_weights() -> None:
    layer = LAYERS["ours"]()
    torch.manual_seed(0)
    plain = LAYERS["ours"]()
    mimetic_init(layer, generator=draw())
    (qk, vo), (plain_qk, plain_vo) = mimetic_products(layer), mimetic_products(plain)
    assert 0.25 < qk.diagonal(dim1=1, dim2=2).mean() < 0.4  # rank 16 of 64 captures part of 0.7
    assert abs(vo.diagonal().mean() + 0.4) < 0.05
    assert abs(plain_qk.diagonal(dim1=1, dim2=2).mean()) < 0.05
    assert abs(plain_vo.diagonal().mean()) < 0.05


def sinusoids(length: int) -> Tensor:
    place, channel = torch.arange(length)[:, None], torch.arange(0, DIM, 2)
    angle = place * 10_000 ** (-channel / DIM)
    return torch.nn.functional.layer_norm(torch.stack([angle.sin(), angle.cos()], -1).flatten(1), (DIM,))[None]


def test_tokens_start_by_attending_to_themselves(claim: ClaimFixture) -> None:
    x = sinusoids(16)
    torch.manual_seed(0)
    plain, ours = LAYERS["ours"](), LAYERS["ours"]()
    mimetic_init(ours, generator=draw())

    def own(layer: MultiHeadAttention) -> float:
        q, k, _ = layer.projected(x, torch.arange(16))
        return layer.op.weights(q, k).diagonal(dim1=-2, dim2=-1).mean().item()

    assert 0.8 / 16 < own(plain) < 1.2 / 16
    claim(
        "attention of a token to itself before training, on sinusoidal positions",
        ours=own(ours), baseline=2 * own(plain), better="higher", baseline_name="twice the default's", seed=0,
    )  # fmt: skip


def test_only_the_projections_of_each_layer_change() -> None:
    net = digits.vit(MultiHeadAttention, depth=3)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    assert mimetic_init(net, generator=draw()) == 3
    changed = {name for name, x in net.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {f"blocks.{i}.mixer.{part}.weight" for i in range(3) for part in ("q", "k", "v", "out")}
    assert not torch.equal(net.blocks[0].mixer.q.weight, net.blocks[1].mixer.q.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), "module=Linear must hold a known self-attention layer"),
        (lambda: MultiHeadAttention(8, 4, kv_heads=2), r"module's projections must be C x C with C=8; got"),
        (lambda: MultiHeadAttention(8, 2, head_dim=8), r"module's projections must be C x C with C=8; got"),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4), "kdim=4 and vdim=8 must equal embed_dim=8"),
    ],
)
def test_unsuitable_layers_are_refused(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        mimetic_init(make())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="beta_vo=-1 must be at least 0"):
        mimetic_init(LAYERS["ours"](), beta_vo=-1)
    with pytest.raises(OptionError, match="module=Linear must hold"):
        mimetic_products(nn.Linear(2, 2))


@pytest.mark.slow
def test_a_small_vit_learns_digits_faster(claim: ClaimFixture) -> None:
    """The mean accuracy over the first epochs is higher (four layers, 512 images, three seeds)."""

    def curve(mimetic: bool, seed: int) -> float:
        net = digits.vit(lambda dim, heads: MultiHeadAttention(dim, heads, bias=True), depth=4, seed=seed)
        if mimetic:
            mimetic_init(net, generator=draw(seed))
        return sum(digits.accuracy(digits.fit(net, seed, 2, lr=5e-4, examples=512)) for _ in range(4)) / 4

    seeds = (0, 1, 2)
    ours, plain = ([curve(mimetic, seed) for seed in seeds] for mimetic in (True, False))
    claim(
        "digits, mean accuracy along 8 epochs of a 4-layer transformer, 3 seeds",
        ours=sum(ours) / 3, baseline=sum(plain) / 3, better="higher", margin=0.005,
        baseline_name="torch's default initialisation", seed=0,
    )  # fmt: skip
