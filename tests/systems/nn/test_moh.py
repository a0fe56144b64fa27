"""MoH: the router by hand, its balance, and the heads that it chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError
from foveate.nn import MultiHeadAttention, Rotary
from foveate.nn.sequence.moh import MixtureOfHeadAttention, balance_loss, moh_gates
from tests.support.tensors import assert_near
from tests.systems.nn import digits, lags

DIM, HEADS, LENGTH = 32, 8, 11


def made(*args, seed: int = 0, **options) -> MixtureOfHeadAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtureOfHeadAttention(DIM, HEADS, *args, **options).double().eval()


def tokens(seed: int = 1, n: int = LENGTH, batch: int = 3) -> Tensor:
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(layer: MixtureOfHeadAttention, x: Tensor) -> Tensor:
    """Compute the gates of one token `(C,)` head by head, as in the release for images."""
    shared, k = layer.shared_heads, layer.routed_active
    factor = [1.0, 1.0]
    if layer.groups is not None:
        e = (layer.groups.weight @ x).exp()
        factor = [(2 if layer.rescale else 1) * (a / e.sum()).item() for a in e]
    gates = torch.zeros(HEADS, dtype=torch.float64)
    if shared == 1:
        gates[0] = factor[0]
    elif shared:
        e = (layer.shared.weight @ x).exp()
        for i in range(shared):
            gates[i] = factor[0] * e[i] / e.sum() * (shared if layer.rescale else 1)
    if layer.routed is not None:
        e = (layer.routed.weight @ x).exp()
        share = e / e.sum()
        best = sorted(range(HEADS - shared), key=lambda i: -share[i].item())[:k]
        kept = sum(share[i] for i in best)
        for i in best:
            gates[shared + i] = factor[1] * share[i] * (k / kept if layer.rescale else 1)
    return gates


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shared,active", [(4, 2), (1, 3), (0, 3), (3, 5), (8, 0), (5, 1)])
def test_gates_by_hand(shared: int, active: int, rescale: bool) -> None:
    layer, x = made(shared, active, rescale=rescale), tokens()
    gates = layer.gates(x)
    for b in range(3):
        for t in range(LENGTH):
            assert_near(gates[b, t], by_hand(layer, x[b, t]), 1e-12)
    assert ((gates > 0).sum(-1) == shared + active).all()
    if rescale:
        assert_near(gates.sum(-1).mean(), torch.tensor(1.0 * (shared + active)).double(), 0.2)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"bias": True}, {"position": Rotary()}])
def test_output_is_the_gated_sum_of_heads(options: dict) -> None:
    layer, x = made(**options), tokens()
    plain = MultiHeadAttention(DIM, HEADS, **options).double()
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if name.split(".")[0] in "q k v out"})
    expected = torch.zeros(3, LENGTH, DIM, dtype=torch.float64) + (layer.out.bias if "bias" in options else 0)
    gates = layer.gates(x)
    for h in range(HEADS):
        alone = MultiHeadAttention(DIM, HEADS, **options).double()
        alone.load_state_dict(plain.state_dict())
        with torch.no_grad():
            mine = torch.arange(DIM) // 4 == h
            alone.out.weight[:, ~mine] = 0
            if alone.out.bias is not None:
                alone.out.bias.zero_()
            expected += gates[..., h, None] * alone(x)
    assert_near(layer(x), expected, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_zero_router_with_all_heads_on_is_multi_head_attention(causal: bool) -> None:
    layer, x = made(4, 4), tokens()
    plain = nn.MultiheadAttention(DIM, HEADS, bias=False, batch_first=True).double()
    with torch.no_grad():
        for router in (layer.routed, layer.shared, layer.groups):
            router.weight.zero_()
        plain.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
        plain.out_proj.weight.copy_(layer.out.weight)
        assert_near(layer.gates(x), torch.ones(3, LENGTH, HEADS).double(), 1e-12)
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
        assert_near(layer(x, causal=causal), plain(x, x, x, attn_mask=hidden, need_weights=False)[0], 1e-10)


@pytest.mark.parametrize("norm", [True, "rms", "layer"])
def test_a_width_of_heads_and_a_norm_of_queries_and_keys(norm: bool | str) -> None:
    """With a zero router and all heads on, it is multi-head attention with the same options."""
    layer, x = made(4, 4, head_dim=6, qk_norm=norm, position=Rotary()), tokens()
    nn.init.normal_(layer.q_norm.weight)
    for router in (layer.routed, layer.shared, layer.groups):
        nn.init.zeros_(router.weight)
    twin = MultiHeadAttention(DIM, HEADS, head_dim=6, qk_norm=norm, position=Rotary()).double()
    assert not twin.load_state_dict(layer.state_dict(), strict=False).missing_keys
    assert_near(layer(x, causal=True), twin(x, causal=True), 1e-12)
    assert layer.q.out_features == HEADS * 6
    assert layer.q_norm.weight.shape == (6,)


def test_the_router_compares_queries_as_they_are_before_the_norm() -> None:
    """The router compares queries before the norm; after it all have nearly equal length."""
    layer, x = made(4, 2, router="query_norm", qk_norm="layer"), tokens()
    plain = made(4, 2, router="query_norm")
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert_near(layer.gates(x), plain.gates(x), 0.0)
    q, k, v = layer.project(x, x, None)
    out = layer.op(q, k, v) * plain.gates(x).mT[..., None]
    assert_near(layer(x), layer.out(out.transpose(1, 2).flatten(2)), 1e-12)


def test_gates_depend_only_on_their_token() -> None:
    layer, x = made(), tokens()
    changed = x.clone()
    changed[:, 5] = tokens(seed=2)[:, 5]
    before, after = layer.gates(x), layer.gates(changed)
    rest = [t for t in range(LENGTH) if t != 5]
    assert_near(after[:, rest], before[:, rest], 0)
    assert (after[:, 5] - before[:, 5]).abs().max() > 1e-3
    assert ((before > 0).sum(-1) == 6).all()


def test_gates_are_a_function_of_logits() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert_near(moh_gates(logits, None, None, 1), torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 1e-6)
    ratio = moh_gates(logits, None, None, 2)[0]
    assert_near(ratio[0] / ratio[2], torch.tensor(1.0).exp(), 1e-6)
    assert_near(ratio.sum(), torch.tensor(2.0), 1e-6)
    lost = torch.tensor([[-200.0, 0.0]])
    assert moh_gates(lost, None, None, 1).isfinite().all()


# -- the router without parameters -------------------------------------------------------------------------------------


def longest(layer: MixtureOfHeadAttention, x: Tensor) -> Tensor:
    """Return the shares of routed heads of one token `(C,)`, from the norms of their queries."""
    d = DIM // HEADS
    q = layer.q(x)
    lengths = [q[h * d : (h + 1) * d].pow(2).sum().sqrt() for h in range(layer.shared_heads, HEADS)]
    mean = sum(lengths) / len(lengths)
    spread = (sum((n - mean) ** 2 for n in lengths) / (len(lengths) - 1)).sqrt()
    return torch.softmax(torch.stack(lengths) / spread, 0)


@pytest.mark.parametrize("position", [None, Rotary()])
def test_query_norm_by_hand(position: Rotary | None) -> None:
    layer, x = made(3, 2, router="query_norm", position=position), tokens()
    assert not {name.split(".")[0] for name in layer.state_dict()} & {"routed", "shared", "groups"}
    gates = layer.gates(x)
    for t in range(LENGTH):
        share = longest(layer, x[0, t])
        expected = torch.cat([torch.ones(3), torch.zeros(5)]).double()
        expected[3 + share.topk(2).indices] = 1
        assert_near(gates[0, t], expected, 0)
    assert_near(layer.train().gates(x), gates, 1e-12)


def test_the_choice_passes_its_gradient_to_the_shares() -> None:
    layer, x = made(3, 2, router="query_norm"), tokens(batch=1, n=1)
    toward = torch.randn(HEADS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (straight,) = torch.autograd.grad((layer.train().gates(x)[0, 0] * toward).sum(), layer.q.weight)
    share = longest(layer, x[0, 0])
    chosen = share.topk(2).indices
    (expected,) = torch.autograd.grad((share[chosen] * toward[3 + chosen]).sum(), layer.q.weight)
    assert expected.abs().max() > 1e-4
    assert_near(straight, expected, 1e-10)
    assert not layer.eval().gates(x).requires_grad


def test_queries_of_equal_norms_are_allowed() -> None:
    layer = made(4, 2, router="query_norm")
    gates = layer.gates(torch.zeros(1, 2, DIM, dtype=torch.float64))
    assert ((gates == 1).sum(-1) == 6).all()
    assert_near(layer.train().gates(torch.zeros(1, 2, DIM, dtype=torch.float64)), gates, 1e-12)


# -- balance -----------------------------------------------------------------------------------------------------------


def test_balance_by_hand() -> None:
    share = torch.rand(7, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    total = 0.0
    for i in range(4):
        held = sum(i in token.topk(2).indices.tolist() for token in share.reshape(-1, 4)) / 35
        total += held * share[..., i].mean().item() / 4
    assert_near(balance_loss(share, 2), torch.tensor(4 * 4 * total, dtype=torch.float64), 1e-12)
    for layer in (made(3, 2), made(3, 2, router="query_norm")):
        x = tokens()
        own = layer.routed(x).softmax(-1) if layer.routed else torch.stack([longest(layer, t) for t in x.flatten(0, 1)])
        assert_near(layer.balance_loss(x), balance_loss(own, 2), 1e-12)
    assert made(8, 0).balance_loss(tokens()) == 0


def test_the_loss_spreads_the_tokens(claim) -> None:
    layer = MixtureOfHeadAttention(DIM, HEADS, 4, 1)
    x = tokens(n=128, batch=2).float() + 1.0

    def crowding() -> float:
        load = (layer.gates(x)[..., 4:] > 0).float().mean((0, 1))
        return (load.max() / load.mean()).item()

    with torch.no_grad():
        layer.routed.weight.copy_(0.05 * torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)))
        layer.routed.weight[0] += 0.15
    before = crowding()
    assert before > 3.2, "one head takes most of the tokens"
    optimiser = torch.optim.Adam([layer.routed.weight], lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        layer.balance_loss(x).backward()
        optimiser.step()
    claim(
        "the balance loss alone spreads tokens over heads: largest load over the mean load after 300 steps",
        ours=crowding(), baseline=before, better="lower", margin=before - 1.3, baseline_name="before training", seed=0,
    )  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(shared_heads=-1), "shared_heads=-1"),
        (dict(shared_heads=9), "routed_active=2 must be in 1..-1"),
        (dict(shared_heads=8), "routed_active=2 must be in 1..0"),
        (dict(routed_active=5), "routed_active=5 must be in 1..4"),
        (dict(routed_active=0), "routed_active=0 must be in 1..4"),
        (dict(routed_active=1.5), "routed_active=1.5"),
        (dict(router="top"), "router='top' must be one of"),
        (dict(router="query_norm", shared_heads=7, routed_active=1), "at least 2 routed heads"),
        (dict(heads=7, shared_heads=3), "heads=7 must divide dim=32"),
        (dict(kv_heads=3), "kv_heads=3 must divide heads=8"),
        (dict(position="rotary"), "position='rotary'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MixtureOfHeadAttention(DIM, **options)


# -- the paper's claims, on digits ----------------------------------------------------------------------------------


class DropsHeads(nn.Module):
    """Replaces W_o and drops `count` random heads of each token."""

    def __init__(self, out: nn.Linear, heads: int, count: int, seed: int) -> None:
        super().__init__()
        self.out, self.heads, self.count = out, heads, count
        self.random = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand(*x.shape[:-1], self.heads, generator=self.random).argsort(-1)
        kept = (order >= self.count).to(x.dtype).repeat_interleave(x.shape[-1] // self.heads, -1)
        return self.out(x * kept)


@pytest.mark.slow
def test_a_router_finds_the_heads_that_a_token_needs(claim) -> None:
    """A router picks useful heads in copying; on digits, dropping random heads costs nothing."""
    where = (1, 3, 5, 8)
    moh, mha, dropped = 0.0, 0.0, 0.0
    for seed in (0, 1):
        moh += lags.loss(lags.fitted(MixtureOfHeadAttention, where, seed=seed), where) / 2
        plain = lags.fitted(MultiHeadAttention, where, seed=seed)
        mha += lags.loss(plain, where) / 2
        plain.blocks[0].mixer.out = DropsHeads(plain.blocks[0].mixer.out, 8, 2, seed)
        dropped += lags.loss(plain, where) / 2
    claim(
        "6 of 8 heads, picked by the router for each token, copy from 4 lags as well as all 8: loss over 2 seeds",
        ours=moh, baseline=mha + 0.05, better="lower", baseline_name="multi-head attention plus 0.05", seed=0,
    )  # fmt: skip
    claim(
        "6 of 8 heads, picked by the router for each token, copy from 4 lags better than 6 random ones: loss",
        ours=moh, baseline=dropped, better="lower", margin=0.3, seed=0,
        baseline_name="multi-head attention with 2 random heads of each token dropped",
    )  # fmt: skip


@pytest.mark.slow
def test_three_quarters_of_the_heads_are_enough(claim) -> None:
    def balanced(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        given: list[Tensor] = []
        hooks = [b.mixer.register_forward_pre_hook(lambda _, args: given.append(args[0])) for b in net.blocks]
        loss = F.cross_entropy(net(images), labels)
        for hook in hooks:
            hook.remove()
        return loss + 0.01 * sum(b.mixer.balance_loss(x) for b, x in zip(net.blocks, given, strict=True))

    moh = digits.fit(digits.vit(MixtureOfHeadAttention, heads=8), 0, 12, loss=balanced)
    mha = digits.fit(digits.vit(MultiHeadAttention, heads=8), 0, 12)
    claim(
        "6 of 8 heads, picked by the router for each token, classify digits as well as all heads: accuracy",
        ours=digits.accuracy(moh), baseline=digits.accuracy(mha) - 0.015, better="higher",
        baseline_name="multi-head attention less 1.5 points", seed=0,
    )  # fmt: skip
