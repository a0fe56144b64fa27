"""Optimised, slim and super attention: identities, counts, and a matrix that aligns values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import MultiHeadAttention, Rotary
from foveate.nn.sequence.super_attention import OptimisedAttention, SlimAttention, SuperAttention
from tests.support.tensors import assert_near
from tests.systems.nn import digits

DIM, HEADS, LENGTH = 12, 3, 9


def seeded(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def tokens(n: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aligned(context: int = LENGTH, **options) -> SuperAttention:
    layer = seeded(lambda: SuperAttention(DIM, HEADS, context, **options))
    nn.init.normal_(layer.alignment, generator=torch.Generator().manual_seed(2))
    return layer


def stock(layer: OptimisedAttention | SlimAttention) -> nn.MultiheadAttention:
    """Make torch's own layer, with identities for the missing projections."""
    plain, eye = nn.MultiheadAttention(DIM, HEADS, bias=False, batch_first=True).double(), torch.eye(DIM).double()
    with torch.no_grad():
        k = layer.k.weight if isinstance(layer, OptimisedAttention) else eye
        plain.in_proj_weight.copy_(torch.cat([layer.q.weight, k, eye]))
        plain.out_proj.weight.copy_(layer.out.weight)
    return plain


@pytest.mark.parametrize("cls", [OptimisedAttention, SlimAttention])
def test_identities_in_place_of_projections(cls: type) -> None:
    layer, x, source = seeded(lambda: cls(DIM, HEADS)), tokens(), tokens(5, seed=3)
    plain = stock(layer)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert_near(layer(x), plain(x, x, x)[0], 1e-10)
    assert_near(layer(x, causal=True), plain(x, x, x, attn_mask=hidden)[0], 1e-10)
    assert_near(layer(x, source), plain(x, source, source)[0], 1e-10)
    first, state = layer.prefill(x[:, :-1])
    assert_near(torch.cat([first, layer.step(x[:, -1:], state)[0]], 1), layer(x, causal=True), 1e-10)


def test_an_identity_for_the_alignment_is_slim_attention() -> None:
    layer, x = seeded(lambda: SuperAttention(DIM, HEADS, 11)), tokens()
    assert_near(layer.alignment, torch.eye(11).double(), 0)
    for causal in (False, True):
        assert_near(layer(x, causal=causal), layer.slim(x, causal=causal), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"position": Rotary()}])
def test_super_attention_by_hand(options: dict, causal: bool) -> None:
    layer, x = aligned(11, **options), tokens()
    v = torch.zeros_like(x)
    for i in range(LENGTH):
        for j in range(LENGTH):
            if j <= i or not causal:
                v[:, i] += layer.alignment[i, j] * x[:, j]
    q, place, outs = layer.slim.q(x), torch.arange(LENGTH), []
    for h in range(HEADS):
        mine = slice(4 * h, 4 * h + 4)
        qh, kh = q[..., mine], x[..., mine]
        if "position" in options:
            qh, kh = (options["position"].rotate(t[:, None], place)[:, 0] for t in (qh, kh))
        logits = qh @ kh.mT / 2
        if causal:
            logits = logits + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        outs.append(torch.softmax(logits, -1) @ v[..., mine])
    assert_near(layer(x, causal=causal), layer.slim.out(torch.cat(outs, -1)), 1e-10)


def test_cross_attention_aligns_the_memory() -> None:
    layer, x, source = aligned(7), tokens(), tokens(5, seed=3)
    values = layer.alignment[:5, :5] @ source
    plain = stock(layer.slim)
    assert_near(layer(x, source), plain(x, source, values)[0], 1e-10)
    assert layer(x, source).shape == x.shape, "only the source has to fit the context"


def test_parameters() -> None:
    def count(layer: nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters())

    dim, length = 128, 32
    assert count(MultiHeadAttention(dim, 4)) == 4 * dim**2
    assert count(OptimisedAttention(dim, 4)) == 3 * dim**2
    assert count(SlimAttention(dim, 4)) == 2 * dim**2
    assert count(SuperAttention(dim, 4, length)) == 2 * dim**2 + length**2
    assert count(OptimisedAttention(dim, 4, bias=True)) == 3 * dim**2 + 3 * dim


def test_the_upper_triangle_is_inert() -> None:
    layer, x = aligned(), tokens()
    out = layer(x, causal=True)
    with torch.no_grad():
        layer.alignment += 100 * torch.ones_like(layer.alignment).triu(1)
    assert_near(layer(x, causal=True), out, 1e-12)
    changed = x.clone()
    changed[:, 5] += 1
    assert_near(layer(changed, causal=True)[:, :5], out[:, :5], 0)
    assert (layer(x) - out).abs().max() > 1


def test_a_hidden_token_is_in_no_value() -> None:
    layer, x = aligned(), tokens()
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[0, ..., 3] = False
    gone = x.clone()
    gone[0, 3] = float("nan")
    assert_near(layer(gone, mask=mask)[0, :3], layer(x, mask=mask)[0, :3], 1e-12)
    assert_near(layer(x, mask=mask)[1], layer(x)[1], 1e-12)
    with pytest.raises(UnsupportedPattern, match='mask of kind "pairs"'):
        layer(x, mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool))


@pytest.mark.parametrize("options", [{}, {"position": Rotary()}, {"op": "hedgehog", "causal": True}])
def test_streams(options: dict) -> None:
    layer, x = aligned(**options), tokens()
    state, out = layer.init_state(2, dtype=torch.float64), []
    for t in range(LENGTH):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    assert_near(torch.cat(out, 1), layer(x, causal=True), 1e-10)
    first, state = layer.prefill(x[:, :-2])
    assert_near(first, torch.cat(out[:-2], 1), 1e-10)
    for t in (LENGTH - 2, LENGTH - 1):
        y, state = layer.step(x[:, t : t + 1], state)
        assert_near(y, out[t], 1e-10)
    with pytest.raises(ShapeError, match="at most context_len=9 tokens; got 10"):
        layer.step(x[:, :1], state)


def test_refusals() -> None:
    for options, message in (
        (dict(context_len=0), "context_len=0"),
        (dict(context_len=9, causal=1), "causal=1"),
        (dict(context_len=9, heads=5), "heads=5 must divide dim=12"),
        (dict(context_len=9, position=1), "position=1"),
    ):
        with pytest.raises(OptionError, match=message):
            SuperAttention(DIM, **{"heads": HEADS, **options})
    with pytest.raises(ShapeError, match="at most context_len=8 tokens; got 9"):
        aligned(8)(tokens())
    with pytest.raises(UnsupportedPattern, match='"self"'):
        aligned(causal=True)(tokens())


# -- the paper's claims, on digits as 16 tokens ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def accuracies() -> dict[str, float]:
    """Return the mean accuracy over two seeds, 10 epochs each."""
    kinds = {
        "standard": MultiHeadAttention, "optimised": OptimisedAttention, "slim": SlimAttention,
        "super": lambda dim, heads: SuperAttention(dim, heads, 16),
    }  # fmt: skip

    def mean(make) -> float:
        return sum(digits.accuracy(digits.fit(digits.vit(make, seed=seed), seed, 10)) for seed in (0, 1)) / 2

    return {name: mean(make) for name, make in kinds.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind,share", [("optimised", "three quarters"), ("slim", "half")])
def test_fewer_projections_read_digits_as_well(claim, accuracies: dict[str, float], kind: str, share: str) -> None:
    claim(
        f"{kind} attention, with {share} of the parameters, classifies digits as well: accuracy, 2 seeds",
        ours=accuracies[kind], baseline=accuracies["standard"] - 0.015, better="higher",
        baseline_name="multi-head attention less 1.5 points", seed=0,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("other", ["slim", "standard"])
def test_alignment_reads_digits_better(claim, accuracies: dict[str, float], other: str) -> None:
    claim(
        "super attention classifies digits better: accuracy, 2 seeds",
        ours=accuracies["super"], baseline=accuracies[other], better="higher", margin=0.005,
        baseline_name=f"{other} attention", seed=0,
    )  # fmt: skip
