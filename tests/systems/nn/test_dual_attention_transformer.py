"""Dual attention: relations by hand, symbols, and comparison of unseen objects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn import Alibi, MultiHeadAttention, Rotary
from foveate.nn.parts.symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention
from foveate.nn.sequence.dual_attention_transformer import DualAttention
from foveate.nn.sequence.relational_attention import ACTIVATIONS, RelationalAttention
from tests.support.tensors import assert_near, gradients

DIM, LENGTH = 24, 7


def seeded(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def dual(
    sensory: int = 2, relational: int = 4, symbols=lambda: SymbolicAttention(DIM, 3, 5), **options
) -> DualAttention:
    return seeded(lambda: DualAttention(DIM, sensory, relational, symbols(), **options))


def tokens(n: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(layer: RelationalAttention, x: Tensor, source: Tensor, symbol, causal: bool = False) -> Tensor:
    """Compute the paper's formula pair by pair; `symbol(j)` or `symbol(j - i)` is `(B, C)`, and W_r acts first."""
    d, group = layer.head_dim, layer.heads // layer.kv_heads
    width = layer.inner // layer.relations
    weights = layer.from_symbols.weight
    q, k, rq, rk = layer.q(x), layer.k(source), layer.rel_q(x), layer.rel_k(source)
    if layer.position is not None:
        q, k = (
            torch.cat([layer.position.rotate(p[:, None], torch.arange(p.shape[1]))[:, 0] for p in t.split(d, -1)], -1)
            for t in (q, k)
        )
    outs = []
    for h in range(layer.heads):
        mine, theirs = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        logits = q[..., mine] @ k[..., theirs].mT / d**0.5
        if causal:
            logits = logits + torch.full(logits.shape[-2:], -torch.inf).triu(1)
        a = torch.softmax(logits, -1)
        out = torch.zeros(x.shape[0], x.shape[1], d, dtype=x.dtype)
        for i in range(x.shape[1]):
            for j in range(source.shape[1]):
                r = [
                    (rq[:, i, n * width : (n + 1) * width] * rk[:, j, n * width : (n + 1) * width]).sum(-1) / width**0.5
                    for n in range(layer.relations)
                ]
                r = ACTIVATIONS[layer.rel_act](torch.stack(r, -1))
                symbolic = symbol(i, j) @ weights[theirs].T
                out[:, i] += a[:, i, j, None] * (r @ layer.from_relations[h].T + symbolic)
        outs.append(out)
    return layer.out(torch.cat(outs, -1))


OPTIONS = [
    {}, {"relations": 2}, {"relations": 8, "symmetric": True}, {"rel_act": "tanh", "relations": 1},
    {"rel_act": "relu"}, {"group": 2}, {"group": 2, "rel_act": "gelu"}, {"position": Rotary()},
    {"rel_act": "sigmoid", "position": Rotary()},
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_relational_heads_by_hand(options: dict, causal: bool) -> None:
    layer, x = dual(**options), tokens()
    symbols = layer.symbols(x)
    expected = by_hand(layer.relational, x, x, lambda _, j: symbols[:, j], causal)
    assert_near(layer(x, causal=causal)[..., 8:], expected, 1e-10)
    assert_near(layer(x, causal=causal)[..., :8], layer.sensory(x, causal=causal), 1e-12)


@pytest.mark.parametrize("rel_act", ["identity", "silu"])
def test_relations_to_a_source(rel_act: str) -> None:
    layer, x, source = dual(rel_act=rel_act), tokens(), tokens(4, seed=2)
    symbols = layer.symbols(source)
    expected = by_hand(layer.relational, x, source, lambda _, j: symbols[:, j])
    assert_near(layer(x, source)[..., 8:], expected, 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_symbols_of_places_and_of_distances(causal: bool) -> None:
    x = tokens()
    for layer in (
        dual(symbols=lambda: PositionalSymbols(DIM, 9)),
        dual(symbols=lambda: PositionalSymbols(DIM, 9), rel_act="tanh"),
    ):
        library = layer.symbols.library
        expected = by_hand(layer.relational, x, x, lambda _, j, table=library: table[j].expand(2, -1), causal)
        assert_near(layer(x, causal=causal)[..., 8:], expected, 1e-10)
    for group in (1, 2):
        layer = dual(symbols=lambda: RelativeSymbols(DIM, 3), group=group)
        table = layer.symbols.library
        assert table.shape == (7, DIM)
        expected = by_hand(
            layer.relational, x, x, lambda i, j, t=table: t[max(-3, min(3, j - i)) + 3].expand(2, -1), causal
        )  # fmt: skip
        assert_near(layer(x, causal=causal)[..., 8:], expected, 1e-10)


def test_both_orders_agree_in_gradients() -> None:
    """One call of the operator and weights times relations, which activations need, have equal gradients."""
    layer, x = dual(), tokens().requires_grad_()
    inner, symbols = layer.relational, layer.symbols(x).detach()
    at_once = inner(x, symbols, causal=True)
    q, k = inner._queries(x, 0), inner._keys(x, 0)
    apart = inner._weighed(x, inner.op.weights(q, k, causal=True), inner.rel_k(x), inner.from_symbols(symbols))
    leaves = [x, inner.from_relations, inner.rel_q.weight, inner.rel_k.weight, inner.from_symbols.weight]
    for ours, theirs in zip(gradients(at_once, leaves), gradients(apart, leaves), strict=True):
        assert theirs.abs().max() > 1e-3
        assert_near(ours, theirs, 1e-10)


def test_without_relational_heads_it_is_multi_head_attention() -> None:
    layer, x = dual(3, 0, symbols=lambda: None), tokens()
    plain = nn.MultiheadAttention(DIM, 3, bias=False, batch_first=True).double()
    own = layer.sensory
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([own.q.weight, own.k.weight, own.v.weight]))
        plain.out_proj.weight.copy_(own.out.weight)
    assert_near(layer(x), plain(x, x, x)[0], 1e-10)
    assert layer.symbols is layer.relational is None


def test_without_relations_it_is_attention_over_symbols() -> None:
    layer, x = dual(0, 3, symbols=lambda: PositionalSymbols(DIM, 9)), tokens()
    inner = layer.relational
    nn.init.zeros_(inner.from_relations)
    q, k = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (inner.q(x), inner.k(x)))
    v = inner.from_symbols(layer.symbols.library[:LENGTH]).unflatten(-1, (3, 8)).transpose(0, 1)
    expected = (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)
    assert_near(layer(x), inner.out(expected), 1e-10)


def test_symmetric_relations() -> None:
    x = tokens()
    for symmetric in (True, False):
        inner = dual(relations=2, symmetric=symmetric).relational
        r = inner.compare(x, x)
        assert r.shape == (2, 2, LENGTH, LENGTH)
        assert ((r - r.mT).abs().max() < 1e-12) == symmetric


def test_relational_heads_see_inner_products_alone() -> None:
    layer, x = dual(0, 3).relational, tokens()
    nn.init.zeros_(layer.from_symbols.weight)
    symbols = torch.zeros_like(x)
    rotation, _ = torch.linalg.qr(
        torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    )
    before = layer(x, symbols)
    for linear in (layer.q, layer.k, layer.rel_q, layer.rel_k):
        linear.weight.data = linear.weight @ rotation.T
    assert_near(layer(x @ rotation.T, symbols), before, 1e-10)
    assert (layer(x, symbols) - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "symbols",
    [lambda: SymbolicAttention(DIM, 3, 5), lambda: PositionalSymbols(DIM, 9), lambda: RelativeSymbols(DIM, 2)],
)
def test_streams(symbols, options: dict) -> None:
    layer, x = dual(symbols=symbols, **options), tokens()
    state, out = layer.init_state(2, dtype=torch.float64), []
    for t in range(LENGTH):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    assert_near(torch.cat(out, 1), layer(x, causal=True), 1e-10)


def test_one_kind_streams_too() -> None:
    x = tokens()
    for kinds in ((3, 0), (0, 3)):
        layer = dual(*kinds)
        first, state = layer.prefill(x[:, :-1])
        assert_near(torch.cat([first, layer.step(x[:, -1:], state)[0]], 1), layer(x, causal=True), 1e-10)


@pytest.mark.parametrize("rel_act", ["identity", "tanh"])
def test_each_kind_gets_its_part_of_a_mask(rel_act: str) -> None:
    layer, x = dual(rel_act=rel_act), tokens()
    mask = torch.rand(6, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.4
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    out = layer(x, mask=mask)
    assert_near(out[..., :8], layer.sensory(x, mask=mask[:2]), 1e-12)
    assert_near(out[..., 8:], layer.relational(x, layer.symbols(x), mask=mask[2:]), 1e-12)
    assert (out - layer(x)).abs().max() > 1e-3
    gone = x.clone()
    gone[:, 2] = float("nan")
    hidden = torch.arange(LENGTH) != 2
    assert_near(layer(gone, mask=hidden)[:, :2], layer(x, mask=hidden)[:, :2], 1e-12)


def test_symbolic_attention_by_hand() -> None:
    symbols, x = seeded(lambda: SymbolicAttention(DIM, 3, 5)), tokens()
    assert {name for name, _ in symbols.named_parameters()} == {"q.weight", "q.bias", "templates", "library"}
    q, out = symbols.q(x), []
    for h in range(3):
        mine = slice(8 * h, 8 * h + 8)
        out.append(torch.softmax(q[..., mine] @ symbols.templates[:, mine].T / 8**0.5, -1) @ symbols.library[:, mine])
    assert_near(symbols(x), torch.cat(out, -1), 1e-12)
    assert 0.8 < symbols.library.std() < 1.2
    assert 0.8 < symbols.templates.std() < 1.2


def test_one_retriever_serves_all_layers() -> None:
    shared = SymbolicAttention(DIM, 3, 5)
    net = nn.ModuleList(DualAttention(DIM, 2, 2, shared) for _ in range(3))
    assert sum(p is shared.library for p in net.parameters()) == 1
    assert DualAttention(DIM, 2, 2).symbols.library.shape == (64, DIM)
    assert DualAttention(DIM, 2, 2).symbols.heads == 4


def test_any_operator() -> None:
    x = tokens()
    layer = dual(op="hedgehog")
    assert layer.capabilities.growth == "N"
    first, state = layer.prefill(x[:, :-1])
    assert_near(torch.cat([first, layer.step(x[:, -1:], state)[0]], 1), layer(x, causal=True), 1e-10)
    with pytest.raises(OptionError, match="weights over keys for these relations; Hedgehog"):
        dual(op="hedgehog", rel_act="relu")
    assert dual(rel_act="relu").capabilities.growth == "N²"
    assert dual(op="sliding_window", rel_act="relu")(x, causal=True).shape == x.shape


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(rel_act="softmax"), "hidden keys"),
        (dict(rel_act="sin"), "rel_act='sin'"),
        (dict(relations=5), "relations=5 must divide H D = 16"),
        (dict(relations=0), "relations=0"),
        (dict(sensory=3), "= 7 must divide dim=24"),
        (dict(sensory=-1), "sensory_heads=-1"),
        (dict(sensory=0, relational=0), "heads=0"),
        (dict(group=0), "group=0"),
        (dict(sensory=2, relational=4, group=4), "group=4 must divide sensory_heads=2"),
        (dict(position=Alibi(6)), "heads"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dual(**options)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="position=Alibi adds a bias"):
        RelationalAttention(DIM, 3, position=Alibi(3))
    with pytest.raises(OptionError, match="kv_heads=2 must divide heads=3"):
        RelationalAttention(DIM, 3, kv_heads=2)
    with pytest.raises(OptionError, match="heads=5 must divide dim=24"):
        SymbolicAttention(DIM, 5)
    for make, message in (
        (lambda: SymbolicAttention(DIM, 0), "heads=0"), (lambda: SymbolicAttention(DIM, 3, 0), "n_symbols=0"),
        (lambda: PositionalSymbols(DIM, 0), "max_length=0"), (lambda: RelativeSymbols(DIM, 0), "reach=0"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            make()
    with pytest.raises(ShapeError, match="at most max_length=6 tokens; got 7"):
        dual(symbols=lambda: PositionalSymbols(DIM, 6))(tokens())
    with pytest.raises(UnsupportedPattern, match='"cross"'):
        dual(symbols=lambda: RelativeSymbols(DIM, 2))(tokens(), tokens())


# -- the paper's claims: comparison of unseen objects ------------------------------------------------------------------


class Same(nn.Module):
    """One layer that classifies whether two objects are the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.norm = nn.Linear(16, 32), layer, nn.LayerNorm(32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.layer(self.norm(x))).mean(1))


def pairs(objects: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pairs: half of them of one object, the others of two."""
    first = torch.randint(len(objects), (count,), generator=random)
    other = (first + torch.randint(1, len(objects), (count,), generator=random)) % len(objects)
    same = torch.rand(count, generator=random) < 0.5
    return torch.stack([objects[first], objects[torch.where(same, first, other)]], 1), same.long()


def accuracy(make, seed: int) -> float:
    """Return the accuracy on pairs of 50 new objects, after 300 steps on pairs of 8."""
    random = torch.Generator().manual_seed(seed)
    seen, new = torch.randn(8, 16, generator=random), torch.randn(50, 16, generator=random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Same(make())
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(300):
        x, same = pairs(seen, 64, random)
        optimiser.zero_grad()
        F.cross_entropy(net(x), same).backward()
        optimiser.step()
    x, same = pairs(new, 2000, random)
    with torch.no_grad():
        return (net(x).argmax(-1) == same).float().mean().item()


@pytest.mark.slow
def test_relational_heads_compare_unseen_objects(claim) -> None:
    ours, plain = (  # single seeds differ by six points, so the mean needs many seeds
        sum(accuracy(make, seed) for seed in range(30)) / 30
        for make in (lambda: DualAttention(32, 2, 2, symmetric=True), lambda: MultiHeadAttention(32, 4))
    )
    claim(
        "2 relational heads of 4 generalise same-or-different from 8 objects to 50 new ones: accuracy, 30 seeds",
        ours=ours, baseline=plain, better="higher", margin=0.02, baseline_name="4 ordinary heads", seed=0,
    )  # fmt: skip
