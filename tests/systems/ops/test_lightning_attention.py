"""Lightning attention and TransNormerLLM: three forms of one sum, and constant work per token at every length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.models.base.decoder import Decoder
from foveate.models.language.transnormer import LRPE, GatedLightning, SimpleRMSNorm, TransNormerLLM
from foveate.nn import MultiHeadAttention, Rotary
from foveate.ops import create
from foveate.ops.base.fixed_decay import transnormer_decay
from foveate.ops.linear.lightning_attention import LightningAttention
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from tests.support.tensors import assert_near, gradients, qkv
from tests.systems.ops import markov

DECAY = [1.0, 0.9, 0.4, 0.05]


def by_hand(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Compute the output token by token from a state, as in the paper's inference."""
    state, out = torch.zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[2]):
        state = decay[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2)


@pytest.mark.parametrize("engine", ["reference", "recurrent", 1, 7, 64, 130])
def test_parallel_blocks_and_recurrence_agree(engine: str | int) -> None:
    q, k, v = qkv(130, kv_heads=4, width=6, value_width=5, grad=True)
    op = LightningAttention(DECAY, block=engine if isinstance(engine, int) else 64)
    out = op(q, k, v, causal=True, engine="chunked" if isinstance(engine, int) else engine)
    exact = by_hand(q, k, v, torch.tensor(DECAY, dtype=torch.float64))
    assert_near(out, exact, 1e-11)
    for ours, theirs in zip(gradients(out, [q, k, v]), gradients(exact, [q, k, v]), strict=True):
        assert_near(ours, theirs, 1e-10)


def test_without_decay_it_is_plain_causal_linear_attention() -> None:
    q, k, v = qkv(70, kv_heads=4)
    assert_near(LightningAttention([1.0] * 4, block=16)(q, k, v, causal=True), (q @ k.mT).tril() @ v, 1e-12)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_it_is_the_operator_of_lightning_attention_2(variant: str) -> None:
    q, k, v = qkv(50, kv_heads=2)
    options = dict(layer=2, depth=5, variant=variant, block=16)
    one, other = LightningAttention(**options), LightningAttention2(**options)
    assert torch.equal(one(q, k, v, causal=True), other(q, k, v, causal=True))
    decay = transnormer_decay(4, 2, 5, variant)
    wide = (x.repeat_interleave(2, 1) for x in (k, v))
    assert_near(one(q, k, v, causal=True, scale=0.5), 0.5 * by_hand(q, *wide, decay), 1e-11)


def test_decays_by_head_and_layer() -> None:
    for heads, depth in ((4, 3), (6, 2)):
        table = torch.stack([transnormer_decay(heads, layer, depth) for layer in range(depth)])
        expected = [[math.exp(-8 * h / heads * (1 - layer / depth)) for h in range(heads)] for layer in range(depth)]
        assert_near(table, torch.tensor(expected, dtype=torch.float64), 1e-12)
        assert (table[:, 0] == 1).all()
        assert (table.diff(dim=1) < 0).all()
        assert (table[:, 1:].diff(dim=0) > 0).all()


def test_the_same_work_per_token_at_every_length(claim) -> None:
    def flops(n: int, engine: str) -> float:
        q = torch.empty(1, 2, n, 32, device="meta")
        return LightningAttention(block=64).plan(q, q, q, causal=True, engine=engine).flops / n

    claim(
        "work per token does not grow with the length: the plan's work per token at 8,192 tokens over that at 512",
        ours=flops(8192, "auto") / flops(512, "auto"), baseline=flops(8192, "reference") / flops(512, "reference"),
        better="lower", margin=14.0, baseline_name="the parallel form",
    )  # fmt: skip
    assert flops(8192, "auto") == flops(512, "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": [0.0]}, r"decay must be \(H,\) numbers in \(0, 1\]"),
        ({"decay": "fast"}, 'must be "transnormer"'),
        ({"layer": 3, "depth": 3}, "layer=3"),
        ({"variant": "port"}, "variant='port'"),
        ({"block": 0}, "block=0"),
        ({"backward": "autograd"}, "backward"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        create("lightning_attention", **options)


def test_bad_calls() -> None:
    q, k, v = qkv(6)
    with pytest.raises(ShapeError, match="decay has 2 heads; q has Hq=4"):
        LightningAttention([0.5, 0.5])(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        LightningAttention()(q, k, v)


# -- TransNormerLLM ----------------------------------------------------------------------------------------------------


def test_the_norm_has_no_parameters() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_near(SimpleRMSNorm(8)(x), x / (x.norm(dim=-1, keepdim=True) / 8**0.5), 1e-5)
    assert not list(SimpleRMSNorm(8).parameters())
    assert not SimpleRMSNorm(8)(torch.zeros(1, 8)).any()


def test_lrpe_makes_products_depend_on_the_distance_alone() -> None:
    rotation = LRPE(2, 6).double()
    nn.init.uniform_(rotation.theta)
    q, k, _ = qkv(9, heads=2, kv_heads=2, width=6)
    near, far = (rotation(q, first) @ rotation(k, first).mT for first in (0, 40))
    assert_near(near, far, 1e-11)
    gap = torch.arange(9)[:, None] - torch.arange(9)
    by_definition = torch.einsum("bhid,bhjd,hijd->bhij", q, k, torch.cos(gap[..., None] * rotation.theta[:, :, None]))
    assert_near(near, by_definition, 1e-12)
    first = LRPE(2, 4).theta.flatten()
    assert_near(first, 10_000 ** (-torch.arange(8) / 4), 1e-6)


def test_places_in_half_precision() -> None:
    rotation, x = LRPE(2, 6).bfloat16(), torch.ones(1, 2, 500, 6, dtype=torch.bfloat16)
    exact = LRPE(2, 6).double()
    exact.theta.data = rotation.theta.double()
    assert_near(rotation(x), exact(x.double()), 1e-2)


def test_the_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = GatedLightning(12, 3, LightningAttention([0.9, 0.5, 1.0], block=4)).double()
    x = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v, u = (x @ w.mT for w in layer.inward.weight.split(12))
    q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in (q * q.sigmoid(), k * k.sigmoid(), v))
    mixed = by_hand(q, k, v, torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)).transpose(1, 2).flatten(2)
    expected = (mixed / mixed.square().mean(-1, keepdim=True).add(1e-6).sqrt() * u) @ layer.out.weight.mT
    assert_near(layer(x, causal=True), expected, 1e-10)


def test_padding_before_a_text_has_no_effect() -> None:
    torch.manual_seed(0)
    layer = GatedLightning.example(12, 3, 10).double()
    x = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.arange(10) >= 3
    padded = layer(x.masked_fill(~seen[:, None], float("nan")), causal=True, mask=seen[None, None, None])
    assert_near(padded[:, 3:], layer(x[:, 3:], causal=True), 1e-11)


def model(**options) -> TransNormerLLM:
    torch.manual_seed(0)
    return TransNormerLLM(11, 16, 3, 4, block=4, **options).double()


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_model_goes_token_by_token(variant: str) -> None:
    net = model(variant=variant)
    ids = torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(0))
    state, out = net.init_state(2), []
    for t in range(13):
        logits, state = net.step(ids[:, t : t + 1], state)
        out.append(logits)
    assert_near(torch.cat(out, 1), net(ids), 1e-10)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    assert_near(net(changed)[:, :7], net(ids)[:, :7], 1e-12)


def test_layers_of_the_model() -> None:
    net = model()
    assert [block.mixer.lrpe is not None for block in net.blocks] == [True, False, False]
    decays = [torch.exp(block.mixer.op.log_decay(torch.zeros(1, 4, 1, 1))) for block in net.blocks]
    for layer, decay in enumerate(decays):
        assert_near(decay, transnormer_decay(4, layer, 3), 1e-6)
    x = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mlp = net.blocks[0].mlp
    assert_near(mlp(x), (mlp.gate(x) * mlp.up(x)) @ mlp.down.weight.mT, 1e-12)
    block = net.blocks[1]
    half = x + block.mixer(SimpleRMSNorm(16)(x), causal=True)
    assert_near(block(x, causal=True), half + mlp_of(block, SimpleRMSNorm(16)(half)), 1e-12)
    names = [name for name, _ in net.named_parameters()]
    assert not [name for name in names if "norm" in name or "bias" in name]
    with pytest.raises(OptionError, match="vocabulary=0"):
        TransNormerLLM(0, 8, 1, 2)
    with pytest.raises(OptionError, match="heads=3 must divide dim=8"):
        TransNormerLLM(5, 8, 1, 3)


def mlp_of(block: nn.Module, x: Tensor) -> Tensor:
    return block.mlp(x)


@pytest.mark.slow
def test_a_decay_by_layer_and_head_learns_better(claim) -> None:
    def transnormer(**options) -> TransNormerLLM:
        return TransNormerLLM(markov.SYMBOLS, 32, 2, 4, **options)

    def softmax() -> Decoder:
        return Decoder(markov.SYMBOLS, [MultiHeadAttention(32, 4, position=Rotary()) for _ in range(2)])

    ours = markov.loss_after(transnormer, seed=0)
    claim(
        "decay by layer and head lowers the loss, in nats a symbol, on a Markov chain whose end repeats its beginning",
        ours=ours, baseline=markov.loss_after(lambda: transnormer(decay=[1.0] * 4), seed=0), better="lower",
        margin=0.05, baseline_name="the same model without decay", seed=0,
    )  # fmt: skip
    claim(
        "the loss on this chain is within 10 % of a softmax decoder's",
        ours=ours, baseline=1.1 * markov.loss_after(softmax, seed=0), better="lower",
        baseline_name="1.1 times that of a softmax decoder of the same size", seed=0,
    )  # fmt: skip
