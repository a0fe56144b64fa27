"""Alignment functions equal their formulas pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.core.errors import OptionError, ShapeError
from foveate.core.scoring import Tile
from foveate.ops.dense.attention_taxonomy import SurveyAttention
from foveate.ops.functional.additive_score import pair_score
from foveate.ops.functional.alignment import ACTIVATIONS, ALIGNMENTS, Alignment, make_alignment
from tests.support.tensors import assert_near, qkv

HEADS, WIDTH, HIDDEN = 3, 4, 5


def built(name: str, **options) -> Alignment:
    """Make the alignment with random weights."""
    sizes = {"heads": HEADS, "head_dim": WIDTH}
    if name in ("concat", "additive", "deep", "feature"):
        options = {"hidden": HIDDEN, **options}
    if name == "location":
        options = {"positions": 9, **options}
    found = make_alignment(name, **sizes, **options).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return found


def tensors() -> tuple[Tensor, Tensor]:
    q, k, _ = qkv(6, 7, batch=2, heads=HEADS, kv_heads=HEADS, width=WIDTH)
    return q, k


def logits(align: Alignment, q: Tensor, k: Tensor) -> Tensor:
    at = Tile(torch.arange(1, 7), torch.arange(7), 7, 6, False)
    return align.score(*align.prepare(q, k), at)


def by_pairs(name: str, p: dict[str, Tensor], h: int, q: Tensor, k: Tensor, j: int) -> Tensor:
    """Score one query and one key in head h by the survey's formula."""
    p = {key: value[h] for key, value in p.items()}
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    if name == "similarity":
        return torch.dot(q, k) / math.sqrt((q**2).sum() * (k**2).sum())
    if name in ("dot", "scaled_dot"):
        return torch.dot(q, k)
    if name == "general":
        return torch.einsum("i,ij,j", q, p["w"], k)
    if name == "biased_general":
        return torch.dot(k, p["w"] @ q + p["b"])
    if name == "activated_general":
        return torch.tanh(torch.einsum("i,ij,j", q, p["w"], k) + p["b"])
    if name == "kernel":
        return torch.dot(phi(q), phi(k))
    if name == "concat":
        return torch.dot(p["w"], torch.tanh(p["w_both"] @ torch.cat([q, k]) + p["b"]))
    if name == "additive":
        return torch.dot(p["w"], torch.tanh(p["w_q"] @ q + p["w_k"] @ k + p["b"]))
    if name == "deep":
        first = torch.tanh(p["w_q"] @ q + p["w_k"] @ k + p["b"])
        second = torch.tanh(p["layers.0"] @ first + p["biases.0"])
        third = torch.tanh(p["layers.1"] @ second + p["biases.1"])
        return torch.dot(p["w"], third) + p["b_out"]
    if name == "location":
        return torch.dot(p["w"][j], q)
    assert name == "feature"
    return torch.dot(p["w"], torch.tanh(p["w_k"] @ k + p["b"]))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_each_pair_by_its_formula(name: str) -> None:
    align, (q, k) = built(name, **({"depth": 3} if name == "deep" else {})), tensors()
    ours, weights = logits(align, q, k), dict(align.named_parameters())
    expected = torch.empty(2, HEADS, 6, 7, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in expected.shape)).tolist():
        expected[b, h, i, j] = by_pairs(name, weights, h, q[b, h, i], k[b, h, j], j)
    assert_near(ours, expected.detach(), 1e-12)


def test_scales() -> None:
    assert {name for name in ALIGNMENTS if built(name).default_scale is None} == {"scaled_dot"}
    assert {built(name).default_scale for name in ALIGNMENTS} == {None, 1.0}


def test_inner_products_are_marked() -> None:
    inner = {"similarity", "dot", "scaled_dot", "general", "biased_general", "kernel"}
    assert {name for name in ALIGNMENTS if built(name).is_inner_product} == inner


def test_limits() -> None:
    """Some forms are special cases of others."""
    q, k = tensors()
    general, biased = built("general"), built("biased_general")
    with torch.no_grad():
        general.w.copy_(torch.eye(WIDTH))
        assert_near(logits(general, q, k), logits(built("dot"), q, k), 1e-12)
        general.w.normal_(generator=torch.Generator().manual_seed(2))
        biased.w.copy_(general.w.mT)
        biased.b.zero_()
        assert_near(logits(biased, q, k), logits(general, q, k), 1e-12)
        concat, additive, deep = built("concat"), built("additive"), built("deep", depth=1)
        for part in ("w", "b"):
            getattr(concat, part).copy_(getattr(additive, part))
        concat.w_both.copy_(torch.cat([additive.w_q, additive.w_k], -1))
        assert_near(logits(concat, q, k), logits(additive, q, k), 1e-12)
        deep.b_out.zero_()
        for part in ("w", "b", "w_q", "w_k"):
            getattr(deep, part).copy_(getattr(additive, part))
        assert_near(logits(deep, q, k), logits(additive, q, k), 1e-12)


def test_activations() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    by_hand = {
        "tanh": (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "relu": x.clamp(min=0),
        "sigmoid": 1 / (1 + (-x).exp()),
        "gelu": x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "elu+1": torch.where(x > 0, x + 1, x.exp()),
    }
    assert by_hand.keys() == ACTIVATIONS.keys()
    for name, expected in by_hand.items():
        assert_near(ACTIVATIONS[name](x), expected, 1e-12, name)
    q, k = tensors()
    for name in ("activated_general", "additive", "deep", "concat", "feature", "kernel"):
        assert not torch.allclose(logits(built(name, activation="relu"), q, k), logits(built(name), q, k)), name


def test_pair_scores_without_heads() -> None:
    random = torch.Generator().manual_seed(0)
    left, right, v = (torch.randn(*shape, generator=random) for shape in ((2, 3, 5), (2, 4, 5), (5,)))
    ours = pair_score(left, right, v)
    assert ours.shape == (2, 3, 4)
    assert torch.allclose(ours[1, 2, 3], (v * torch.tanh(left[1, 2] + right[1, 3])).sum())
    assert torch.allclose(
        pair_score(left, right, v, torch.relu)[0, 1, 2], (v * (left[0, 1] + right[0, 2]).relu()).sum()
    )


def test_weights_start_small_and_biases_at_zero() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        align = make_alignment("additive", heads=4, head_dim=64, hidden=25)
    for weight, width in ((align.w_q, 64), (align.w_k, 64), (align.w, 25)):
        assert weight.abs().max() <= width**-0.5
        assert 0.9 < weight.std().item() / (width**-0.5 / math.sqrt(3)) < 1.1
    assert not align.b.any()
    assert make_alignment("additive", heads=1, head_dim=6).hidden == 6
    assert len(make_alignment("deep", heads=1, head_dim=6).layers) == 1, (
        "two layers, the first of which is the additive one"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aditive", {}, 'unknown alignment "aditive"; did you mean "additive"'),
        ("general", {}, 'alignment="general" needs heads and head_dim'),
        ("location", {"heads": 1, "head_dim": 2}, 'alignment="location" needs positions'),
        ("dot", {"hidden": 3}, 'alignment="dot" takes no hidden'),
        ("general", {"heads": 0, "head_dim": 2}, "heads=0"),
        ("general", {"heads": 1, "head_dim": 0}, "head_dim=0"),
        ("additive", {"heads": 1, "head_dim": 2, "hidden": 0}, "hidden=0"),
        ("deep", {"heads": 1, "head_dim": 2, "depth": 0}, "depth=0"),
        ("location", {"heads": 1, "head_dim": 2, "positions": 0}, "positions=0"),
        ("feature", {"heads": 1, "head_dim": 2, "activation": "swish"}, "activation='swish'"),
        ("kernel", {"activation": "exp"}, "activation='exp'"),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_alignment(name, **options)


def test_only_learned_alignments_get_sizes() -> None:
    assert not list(make_alignment("dot", heads=2, head_dim=3).parameters())


def test_a_call_of_another_size_is_refused() -> None:
    q, k = tensors()
    for name in ("general", "biased_general", "activated_general", "additive", "concat", "deep", "location", "feature"):
        with pytest.raises(ShapeError, match="built for 3 heads of width 4; got H=2, D=4"):
            built(name).check(q[:, :2], 7)
        with pytest.raises(ShapeError, match="built for 3 heads of width 4; got H=3, D=3"):
            built(name).check(q[..., :3], 7)
    with pytest.raises(ShapeError, match="positions=9; got Nk=10"):
        built("location").check(q, 10)
    built("location").check(q, 9)
    built("dot").check(q[:, :1, :, :2], 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_a_call_may_have_another_dtype_than_the_weights(name: str, dtype: torch.dtype) -> None:
    align, (q, k, v) = built(name), qkv(6, heads=HEADS, kv_heads=HEADS, width=WIDTH)
    expected = SurveyAttention(align)(q, k, v)
    op = SurveyAttention(align.float())
    out = op(*(x.to(dtype) for x in (q, k, v)))
    assert out.dtype == dtype
    assert_near(out, expected.detach(), 1e-6 if dtype == torch.float64 else 0.1)
