"""Linear operators and memories against the plain references of `fla` (fla-core, flash-linear-attention).

Most of those are in float32, whatever comes in: hence the tolerances. `import fla` asks for Triton; the references do
not, and are run from their files, or taken out of them where the file's other parts ask for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.nn import MultiHeadAttention
from foveate.ops.functional.fast_weights import shares
from foveate.ops.linear.based import TaylorAttention
from foveate.ops.linear.dsf import NormalizedAttention
from foveate.ops.linear.hedgehog import FeatureMap, Hedgehog
from foveate.ops.linear.lightnet import LightNetAttention
from foveate.ops.linear.lightning_attention import LightningAttention
from foveate.ops.linear.lightning_attention_2 import LightningAttention2
from foveate.ops.memory.miras import Miras
from foveate.ops.memory.titans import Titans
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.parity import peers
from tests.support.tensors import assert_near, qkv

peers.source("fla", "")  # skips where it is missing

N, H, D, E = 19, 3, 6, 5
LOOSE = 2e-6


def tokens(grad: bool = True, n: int = N) -> list[Tensor]:
    return list(qkv(n, heads=H, kv_heads=H, width=D, value_width=E, grad=grad))


def naive(operator: str) -> Any:
    return peers.load("fla", f"ops/{operator}/naive.py")


def time_first(*xs: Tensor) -> tuple[Tensor, ...]:
    """Between `(B, H, N, ·)` and their `(B, N, H, ·)`."""
    return tuple(x.transpose(1, 2) for x in xs)


# -- fixed decays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [LightningAttention, LightningAttention2])
@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunk"])
def test_fixed_decays_are_simple_gla(op: type[LightningAttention], form: str) -> None:
    decay, leaves = torch.tensor([1.0, 0.9, 0.3], dtype=torch.float64), tokens()
    more = {"chunk_size": 8} if form == "chunk" else {}
    function = getattr(naive("simple_gla"), f"naive_{form}_simple_gla")

    def theirs() -> Tensor:
        g = decay.log().expand(2, N, H)
        out, _ = function(*time_first(*leaves), g, scale=0.7, **more)
        return out.transpose(1, 2).double()

    peers.agree(lambda: op(decay, block=4)(*leaves, causal=True, scale=0.7), theirs, leaves, LOOSE)


def test_a_stream_ends_in_the_state_of_simple_gla() -> None:
    decay, (q, k, v) = torch.tensor([1.0, 0.9, 0.3], dtype=torch.float64), tokens(grad=False)
    _, expected = naive("simple_gla").naive_recurrent_simple_gla(*time_first(q, k, v), decay.log().expand(2, N, H))
    _, state = LightningAttention(decay).prefill(q, k, v)
    assert_near(state.S, expected, LOOSE)


def test_decays_of_retention() -> None:
    leaves, theirs = tokens(), naive("retention").naive_retention
    op = LightningAttention2(1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64)), block=8)
    peers.agree(lambda: op(*leaves, causal=True, scale=D**-0.5), lambda: theirs(*leaves), leaves, LOOSE)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_papers_decays_are_those_of_their_lightning_attention(layer: int) -> None:
    """Their function works the decays out, and hands them on: here to their plain reference, not to a kernel."""

    def chunk_simple_gla(
        q: Tensor, k: Tensor, v: Tensor, g_gamma: Tensor, scale: float, **_: Any
    ) -> tuple[Tensor, None]:
        g = g_gamma.expand(*q.shape[:3])
        return naive("simple_gla").naive_recurrent_simple_gla(q, k, v, g, scale, None, False)

    made = peers.pick("fla", "ops/lightning_attn/chunk.py", "chunk_lightning_attn", chunk_simple_gla=chunk_simple_gla)
    leaves, op = tokens(), LightningAttention(layer=layer, depth=4, variant="paper", block=5)

    def theirs() -> Tensor:
        return made.chunk_lightning_attn(*time_first(*leaves), layer_idx=layer, num_layers=4, scale=1.0)[0].transpose(
            1, 2
        )

    peers.agree(lambda: op(*leaves, causal=True), theirs, leaves, LOOSE)


# -- features ----------------------------------------------------------------------------------------------------------


def test_no_decay_no_normalizer_is_linear_attention() -> None:
    leaves = tokens()
    eta = torch.full((2, H, N), 2.0, dtype=torch.float64)

    def theirs() -> Tensor:
        out, _ = naive("linear_attn").naive_recurrent_linear_attn(*time_first(*leaves), scale=1.0)
        return out.transpose(1, 2) / 2

    peers.agree(lambda: NormalizedAttention()(*leaves, causal=True, eta=eta), theirs, leaves, LOOSE)


def feature_maps() -> Any:
    wanted = "HedgehogFeatureMap", "TaylorFeatureMap", "flatten_diag_outer_product_off1", "_triu_indices"
    return peers.pick("fla", "modules/feature_map.py", *wanted)


def test_hedgehog_features() -> None:
    """Theirs: one map for all heads, a softmax over both halves, and a gain of 2."""
    ours = FeatureMap(H, D, "softmax", gain=2.0, bias="vector", shared=True).double()
    theirs, w, x = feature_maps().HedgehogFeatureMap(D).double(), peers.weights(ours), peers.leaf(2, H, N, D, seed=1)

    def other() -> Tensor:
        return peers.call(theirs, {"layer.weight": w["weight"][0], "layer.bias": w["bias"][0, 0]}, x)

    peers.agree(lambda: peers.call(ours, w, x), other, {"x": x, **w}, 1e-12)


@pytest.mark.parametrize("scale", [1.0, D**-0.5])
def test_hedgehog_attention(scale: float) -> None:
    """Their layer's causal reference. A scale is there for queries alone; ours goes to both sides before the maps."""
    ours = Hedgehog(H, D, "softmax", gain=2.0, shared=True).double()
    w, leaves = peers.weights(ours), tokens()
    maps = [feature_maps().HedgehogFeatureMap(D).double() for _ in range(2)]

    def theirs() -> Tensor:
        q, k, v = leaves
        made = (
            peers.call(
                module, {"layer.weight": w[f"{name}.weight"][0], "layer.bias": w[f"{name}.bias"][0, 0]}, x * scale**0.5
            )
            for module, name, x in zip(maps, ("query_map", "key_map"), (q, k), strict=True)
        )
        out, _ = naive("linear_attn").naive_recurrent_linear_attn(*time_first(*made, v), scale=1.0, normalize=True)
        return out.transpose(1, 2)

    def mine() -> Tensor:
        return peers.call(ours, w, *leaves, causal=True, scale=scale)

    peers.agree(mine, theirs, {**w, **dict(zip("qkv", leaves, strict=True))}, LOOSE)


@pytest.mark.parametrize("symmetric", [False, True])
def test_taylor_features_have_the_same_products(symmetric: bool) -> None:
    """Theirs put the scale `D ** -0.5` half on each side; ours puts it on the queries."""
    q, k, _ = leaves = tokens()
    theirs, ours = feature_maps().TaylorFeatureMap(D), TaylorAttention(symmetric=symmetric)

    def mine() -> Tensor:
        return ours.query_features(q, D**-0.5) @ ours.key_features(k, D**-0.5).mT

    peers.agree(mine, lambda: theirs(q) @ theirs(k).mT, leaves[:2], 1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_based_by_its_weights(symmetric: bool) -> None:
    """The eps in their kernels is 1e-6, of a sum that is at least half the number of keys."""
    leaves, op = tokens(), TaylorAttention(symmetric=symmetric)
    peers.agree(lambda: op(*leaves, causal=True), lambda: naive("based").naive_parallel_based(*leaves), leaves, 5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_of_based(causal: bool) -> None:
    """Queries and keys narrower than values, one eps of 1e-12 on both sides, in float64."""
    dim, heads, width = 20, 4, 3
    layer = peers.pick(
        "fla", "layers/based.py", "BasedLinearAttention", rearrange=rearrange,
        TaylorFeatureMap=feature_maps().TaylorFeatureMap,
    ).BasedLinearAttention  # fmt: skip
    theirs = layer(dim, width, heads, heads, causal=causal).double()
    ours = MultiHeadAttention(dim, heads, head_dim=width, value_dim=dim // heads, op=TaylorAttention()).double()
    w, x = peers.weights(ours), peers.leaf(2, N, dim, seed=1)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    theirs.forward = theirs.forward_reference  # the plain twin of its kernels

    def other() -> Tensor:
        given = {f"{names[name.partition('.')[0]]}.weight": value for name, value in w.items()}
        return peers.call(theirs, given, x)

    peers.agree(lambda: peers.call(ours, w, x, causal=causal), other, {"x": x, **w}, 1e-11)


def test_lightnet_is_gated_linear_attention_with_its_own_gates() -> None:
    """The gates, here from running sums as the paper writes them, go to their reference of gated linear attention."""
    leaves = tokens()

    def theirs() -> Tensor:
        q, k, v = leaves
        total = k.exp().cumsum(2)
        before = F.pad(total[:, :, :-1], (0, 0, 1, 0), value=1e-30)
        q, *rest = time_first(F.silu(q), k.exp() / total, v, (before / total).log())
        out, _ = naive("gla").naive_recurrent_gla(q, *rest)
        return out.transpose(1, 2)

    op = LightNetAttention()
    peers.agree(lambda: op(*leaves, causal=True, scale=D**-0.5), theirs, leaves, LOOSE)


# -- memories ----------------------------------------------------------------------------------------------------------


def unit(*xs: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.normalize(x, dim=-1) for x in xs)


def delta_rules() -> list[Any]:
    """A linear learner by two names; the loss `|M k - v|²` of Titans has the slope `2 (M k - v)`: beta is 2 theta."""
    titans = Titans(H, D, E, depth=1, alpha=0.0, eta=0.0, chunk=1)
    nn.init.zeros_(titans.first[0])
    return [(titans, 0.5), (Miras("l2", "none", chunk=1), 1.0)]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("form", ["recurrence", "chunkwise"])
def test_linear_memories_are_the_delta_rule(index: int, form: str) -> None:
    op, factor = delta_rules()[index]
    op, n = op.double(), 16
    leaves, beta = tokens(n=n), torch.rand(2, H, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    beta.requires_grad_()
    function = getattr(naive("delta_rule"), f"delta_rule_{form}")
    more = {"chunk_size": 4} if form == "chunkwise" else {}

    def theirs() -> Tensor:
        q, k, v = leaves
        q, k = unit(q, k)
        return function(q * D**0.5, k, v, beta, **more)[0]  # they scale queries by D ** -0.5

    peers.agree(lambda: op(*leaves, causal=True, theta=factor * beta), theirs, [*leaves, beta], LOOSE)


@pytest.mark.parametrize("index", [0, 1])
def test_momentum_and_forgetting_are_the_momentum_delta_rule(index: int) -> None:
    """All three rates from the token. Theirs keep 1 - alpha and eta as logs, and `p` apart from `k`."""
    op, factor = Titans(H, D, E, depth=1, chunk=1), 0.5
    nn.init.zeros_(op.first[0])
    if index:
        op, factor = Miras("l2", "l2", chunk=1), 1.0
    leaves, random = tokens(), torch.Generator().manual_seed(3)
    rates = {name: torch.rand(2, H, N, generator=random, dtype=torch.float64) for name in ("alpha", "eta", "theta")}
    rates = {name: (rate * 0.5).requires_grad_() for name, rate in rates.items()}

    def theirs() -> Tensor:
        q, k, v = leaves
        q, k, v = time_first(*unit(q, k), v)
        alpha, eta, theta = (rates[name].transpose(1, 2) for name in ("alpha", "eta", "theta"))
        out, _ = naive("momentum_delta_rule").recurrent_momentum_delta_rule_ref(
            q, k, v, (1 - alpha).log(), eta.log(), p=k, beta=torch.ones_like(alpha), eta=theta, scale=1.0
        )
        return out.transpose(1, 2)

    given = {**rates, "theta": factor * rates["theta"]}
    peers.agree(lambda: op.double()(*leaves, causal=True, **given), theirs, [*leaves, *rates.values()], LOOSE)


def test_shares_of_a_chunk_are_those_of_their_titans() -> None:
    """What memory and momentum are made of inside a chunk: their closed forms, in products and quotients of decays.

    Their loop over tokens for Titans is no oracle: in its gradient through the norm a pair of brackets is missing, so
    that only the terms of the means are divided by D and by the deviation.
    """
    random = torch.Generator().manual_seed(0)
    rates = {name: torch.rand(2, H, 7, generator=random, dtype=torch.float64) for name in ("alpha", "eta", "theta")}
    parts = "cal_n", "cal_f", "cal_G"
    made = peers.pick("fla", "ops/titans/naive.py", *parts, "combine_params")
    theta, alpha, eta = (rates[name][..., None] for name in ("theta", "alpha", "eta"))
    beta, _, f, _, _, G, m_end, n_end = made.combine_params(theta, alpha, eta, 7)
    ours = shares({**rates, "write": torch.ones(2, H, 7, dtype=torch.float64)})
    assert_near(ours.memory[..., 0], beta, LOOSE)
    assert_near(ours.memory[..., 1], f, LOOSE)
    assert_near(ours.memory[..., 2:], G, LOOSE)
    assert_near(ours.momentum[..., -1, 1], m_end, LOOSE)
    assert_near(ours.momentum[..., -1, 2:], n_end, LOOSE)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 4, N])
def test_sliding_windows_of_grouped_heads(window: int) -> None:
    leaves = list(qkv(N, heads=4, kv_heads=2, width=D, value_width=E, grad=True))

    def theirs() -> Tensor:
        out, _ = naive("attn").naive_parallel_attn(*time_first(*leaves), window_size=window)
        return out.transpose(1, 2)

    peers.agree(lambda: SlidingWindow(window, 0)(*leaves, causal=True), theirs, leaves, LOOSE)
