"""DependencyViT: reversed attention, messages, the tree, and pruning."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.models.vision import dependency_vit
from foveate.models.vision.dependency_vit import DependencyViT
from foveate.nn import MultiHeadAttention
from foveate.nn.vision.dependency_vit import DependencyAttention, dependency_tree, prune
from foveate.ops.dense.reversed_attention import ReversedAttention
from foveate.ops.dense.softmax import Softmax
from tests.support.tensors import assert_near, gradients, qkv
from tests.systems.nn.digits import accuracy, fit, vit


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.3])
def test_it_is_softmax_attention_transposed(scale: float | None) -> None:
    receivers, senders, v = qkv(7, 11, kv_heads=4, width=5, value_width=3)
    forward = Softmax().weights(senders, receivers, scale=scale)  # each sender's shares among the receivers
    op = ReversedAttention(4)
    assert_near(op.weights(receivers, senders, scale=scale), forward.mT, 1e-12)
    for engine in ("auto", "chunked", "reference"):
        assert_near(op(receivers, senders, v, scale=scale, engine=engine), forward.mT @ v, 1e-12)


def test_columns_sum_to_one_and_values_are_conserved() -> None:
    q, k, v = qkv(7, 11, kv_heads=4)
    op = ReversedAttention()
    columns, rows = (op.weights(q, k).sum(axis) for axis in (-2, -1))
    assert_near(columns, torch.ones_like(columns), 1e-12)
    assert (rows - 1).abs().max() > 0.1
    assert_near(Softmax().weights(q, k).sum(-1), torch.ones_like(rows), 1e-12)
    assert_near(op(q, k, v).sum(2), v.sum(2), 1e-12)


def test_symmetric_weights_give_ordinary_attention() -> None:
    angle = torch.arange(9, dtype=torch.float64) * 2 * math.pi / 9
    q = torch.stack([angle.cos(), angle.sin()], -1)[None, None] * 2
    v = randn(1, 1, 9, 3)
    assert_near(ReversedAttention()(q, q, v), Softmax()(q, q, v), 1e-12)


def test_masks_of_senders() -> None:
    q, k, v = qkv(7, 11, kv_heads=4)
    pairs = torch.rand(2, 4, 7, 11, generator=torch.Generator().manual_seed(0)) > 0.4
    pairs[:, :, :, 3] = False  # sends to nobody
    pairs[:, :, 2] = False  # receives nothing
    shares = (q @ k.mT * 8**-0.5).exp() * pairs
    expected = shares / shares.sum(-2, keepdim=True).clamp_min(1e-300)
    for block in (1, 4, 50):
        op = ReversedAttention(block)
        assert_near(op.weights(q, k, mask=pairs), expected, 1e-12)
        assert_near(op(q, k, v, mask=pairs), expected @ v, 1e-12)
    bias = randn(4, 7, 11)
    expected = Softmax().weights(k, q, mask=bias.mT).mT
    assert_near(ReversedAttention(4)(q, k, v, mask=bias), expected @ v, 1e-12)


def test_chunks_keep_no_matrix() -> None:
    q, k, v = qkv(300, kv_heads=4, grad=True)
    kept = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = ReversedAttention(32)(q, k, v)
    assert max(kept) <= q.numel()
    expected = ReversedAttention()(q, k, v, engine="reference")
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert_near(ours, theirs, 1e-12)
    assert ReversedAttention().block == 256


def test_the_operator_s_plan() -> None:
    q, k, v = qkv(7, 11, kv_heads=4, width=5, value_width=3)
    plan = ReversedAttention().plan(q, k, v)
    assert plan.flops == 2 * (2 * 4) * 7 * 11 * (5 + 3)
    assert plan.bytes == 8 * (2 * 4) * (7 * 5 + 11 * 5 + 11 * 3 + 7 * 3)
    assert "named by the caller" in str(ReversedAttention().plan(q, k, v, engine="reference"))
    assert "all queries at once" in str(plan)


def test_calls_that_the_operator_does_not_define() -> None:
    with pytest.raises(OptionError, match="block=0"):
        ReversedAttention(0)
    with pytest.raises(UnsupportedPattern, match='ReversedAttention does not define "causal self"'):
        ReversedAttention()(*qkv(4), causal=True)


# -- the layer ---------------------------------------------------------------------------------------------------------


def layer(dim: int = 12, heads: int = 3, **options) -> DependencyAttention:
    torch.manual_seed(0)
    return DependencyAttention(dim, heads, **options).double()


def matrices(attention: DependencyAttention, x: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return reversed weights `(B, H, N, N)`, values, and messages, child by child and head by head."""
    q, k, v = (x @ part.mT for part in attention.qkv.weight.chunk(3))
    batch, n, dim = x.shape
    width, heads = dim // attention.heads, attention.heads
    hidden = x @ attention.controller[0].weight.mT
    hidden = hidden * torch.special.ndtr(hidden)  # GELU
    passed = 1 / (1 + (-hidden @ attention.controller[2].weight.mT)[..., 0].exp())
    passed = passed if message is None else passed * message
    chosen = (x @ attention.selector.weight.mT / attention.temperature).exp()
    weights = torch.zeros(batch, heads, n, n, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            for child in range(n):
                scores = (k[b, :, own] @ q[b, child, own] / width**0.5).exp()
                factor = chosen[b, child, h] / chosen[b, child].sum() * passed[b, child]
                weights[b, h, :, child] = scores / scores.sum() * factor
    return weights, v.unflatten(2, (heads, width)).transpose(1, 2), passed


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_the_layer_by_hand(temperature: float) -> None:
    attention, x = layer(temperature=temperature), randn(2, 6, 12)
    for message in (None, torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))):
        weights, v, passed = matrices(attention, x, message)
        sent = attention.send(x, message)
        expected = (weights @ v).transpose(1, 2).flatten(2) @ attention.out.weight.mT + attention.out.bias
        assert_near(sent.out, expected, 1e-12)
        assert_near(attention(x) if message is None else attention(x, message=message), expected, 1e-12)
        assert_near(sent.message, passed, 1e-12)
        assert_near(sent.received, weights.sum((1, 3)), 1e-12)
        assert_near(attention.dependency(x, message), weights.sum(1), 1e-12)
        assert_near(attention.dependency(x, message).sum(1), passed, 1e-12, "a child sends its message, no more")
        assert_near(sent.received.sum(1), passed.sum(1), 1e-12)


def test_defaults() -> None:
    attention = DependencyAttention(24)
    assert (attention.heads, attention.temperature) == (12, 0.1)
    assert attention.controller[0].out_features == 12
    biased = {name for name, _ in attention.named_parameters() if name.endswith("bias")}
    assert biased == {"out.bias"}


def test_a_token_with_message_zero_never_sends() -> None:
    attention, x = layer(), randn(2, 6, 12)
    message = torch.ones(2, 6, dtype=torch.float64)
    message[:, 2] = 0
    before, heads = attention.send(x, message), attention._heads

    def changed(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads(x)
        return q, k, v + 100 * (torch.arange(6) == 2)[:, None]

    attention._heads = changed
    after = attention.send(x, message)
    assert torch.equal(after.out, before.out)
    assert not torch.equal(attention.send(x).out, layer().send(x).out), "a token that sends reaches others"
    assert not after.message[:, 2].any()
    assert (after.message <= message).all()
    assert not attention.send(x, after.message).message[:, 2].any()


def test_hidden_tokens_neither_send_nor_receive() -> None:
    attention, x = layer(), randn(2, 6, 12)
    seen = torch.tensor([True, False, True, True, False, True])
    x[:, ~seen] = float("nan")
    mask = seen[None, None, None]
    sent, alone = attention.send(x, mask=mask), attention.send(x[:, seen])
    assert_near(sent.out[:, seen], alone.out, 1e-12)
    assert_near(sent.received[:, seen], alone.received, 1e-12)
    assert not sent.received[:, ~seen].any()
    assert_near(attention.dependency(x, mask=mask)[:, seen][:, :, seen], attention.dependency(x[:, seen]), 1e-12)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="heads=5 must divide dim=12"):
        DependencyAttention(12, 5)
    with pytest.raises(OptionError, match="temperature=0"):
        DependencyAttention(12, 3, temperature=0)
    with pytest.raises(ShapeError, match=r"message must be \(B, N\)=\(2, 6\); got \(2, 5\)"):
        layer().send(randn(2, 6, 12), randn(2, 5))
    with pytest.raises(UnsupportedPattern, match='mask of kind "pairs"'):
        layer().send(randn(2, 6, 12), mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(ShapeError, match="x must be"):
        layer().dependency(randn(2, 6, 11))


# -- the tree ----------------------------------------------------------------------------------------------------------


def sending(*parents: int, n: int = 6, kept: float = 0.0) -> Tensor:
    """Make a mask in which each child sends most to one parent and spreads the rest evenly."""
    mask = torch.full((n, n), kept / n, dtype=torch.float64)
    mask[list(parents), torch.arange(n)] += 1 - kept
    return mask[None]


def test_the_tree_of_clear_parents() -> None:
    tree = dependency_tree([sending(0, 0, 0, 1, 1, 2, kept=0.05)])
    assert tree.root.tolist() == [0]
    assert tree.parent.tolist() == [[0, 0, 0, 1, 1, 2]]


def test_layers_follow_each_other() -> None:
    """The product of column-normalized masks with a residual is right for two tokens, later layers on the left."""
    first, second = torch.tensor([[[0.1, 0.9], [0.3, 0.1]]]), torch.tensor([[[0.0, 0.2], [0.8, 0.5]]])
    flows = []
    for mask in (first[0], second[0]):
        flow = mask + torch.eye(2)
        flows.append(flow / flow.sum(0))
    received = (flows[1] @ flows[0]).sum(1)
    tree = dependency_tree([first, second])
    assert tree.root.item() == received.argmax()
    assert tree.root.item() != (flows[0] @ flows[1]).sum(1).argmax(), "the order of layers matters here"
    assert tree.parent.tolist() == [[1, 1]]


def test_the_tree_by_hand() -> None:
    found = [torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(seed)) ** 6 for seed in range(3)]
    tree = dependency_tree(found)
    for b in range(2):
        passed = torch.eye(6)
        for mask in found:
            flow = mask[b] + torch.eye(6)
            passed = torch.stack([flow[:, i] / flow[:, i].sum() for i in range(6)], 1) @ passed
        received = [sum(row).item() for row in passed]
        assert tree.root[b] == max(range(6), key=received.__getitem__)
        for child in range(6):
            above = [j for j in range(6) if received[j] > received[child]] or [child]
            assert tree.parent[b, child] == max(above, key=lambda j, i=child, p=passed: p[j, i].item())


@pytest.mark.parametrize("seed", range(4))
def test_it_is_a_tree(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    parent, root = dependency_tree([torch.rand(3, 9, 9, generator=random) ** 4 for _ in range(3)])
    for b in range(3):
        for token in range(9):
            path = [token]
            while path[-1] != root[b]:
                path.append(parent[b, path[-1]].item())
                assert len(path) <= 9, "a cycle"
        assert (parent[b] == torch.arange(9)).nonzero().flatten().tolist() == [root[b].item()]


def test_no_layers_no_tree() -> None:
    with pytest.raises(OptionError, match="dependencies must hold at least one layer's mask"):
        dependency_tree([])


def test_pruned_tokens() -> None:
    received = torch.tensor([[0.5, 3.0, 0.1, 2.0, 0.4, 1.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert prune(received, 0.5).tolist() == [[1, 3, 5], [0, 1, 2]]
    assert prune(received, 0.25, 3).tolist() == [[1, 3, 5], [0, 1, 2]], "(1 - 0.75) / (1 - 0.5) stay"
    assert prune(received.flip(1), 0.5).tolist() == [[0, 2, 4], [3, 4, 5]], "in their order"
    assert prune(torch.rand(1, 10), 0.1, 2).shape == (1, 8), "0.8 / 0.9 of 10, rounded down"
    assert prune(torch.rand(1, 100), 0.2, 2).shape == (1, 75), "which floating point puts a little lower"
    assert prune(received, 1 / 3).shape == (2, 4)
    assert prune(received).shape == (2, 5), "0.84 of 6, rounded down"
    assert prune(received[:, :1], 0.9).shape == (2, 1)
    assert prune(received, 0.0).shape == (2, 6)
    tokens = 196
    for time in (1, 2, 3, 4):
        tokens = prune(torch.rand(1, tokens), 0.16, time).shape[1]
    assert tokens == pytest.approx(196 * 0.36, abs=3), "each time as many as the first"
    for options, message in (
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"time": 0}, "time=0"),
        ({"ratio": 0.5, "time": 2}, "time=2"),
    ):
        with pytest.raises(OptionError, match=message):
            prune(received, **options)


# -- the network -------------------------------------------------------------------------------------------------------


def network(**options) -> DependencyViT:
    torch.manual_seed(0)
    sizes = {"side": 6, "patch": 2, "channels": 2, "classes": 5, "dim": 12, "depth": 3, "heads": 3, "layer_scale": 0.7}
    return DependencyViT(**{**sizes, **options}).double()


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias)


@pytest.mark.parametrize(("prune_after", "score"), [((), "message"), ((3, 1), "message"), ((3, 1), "received")])
def test_the_network_by_hand(prune_after: tuple[int, ...], score: str) -> None:
    net, images = network(prune_after=prune_after, ratio=0.3, score=score), randn(2, 2, 6, 6, seed=1)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ net.embed.weight.flatten(1).mT + net.embed.bias + net.places
    messages = torch.ones(2, 9, dtype=torch.float64)
    for place, block in enumerate(net.blocks, start=1):
        sent = block.attention.send(norm(block.norm, x), messages)
        x, messages = x + block.scale * sent.out, sent.message
        if place in prune_after:
            share = {1: 0.7, 3: 0.4 / 0.7}[place]
            scores = getattr(sent, score)
            rows = [sorted(r.argsort(descending=True)[: int(share * len(r) + 1e-9)].tolist()) for r in scores]
            x = torch.stack([one[row] for one, row in zip(x, rows, strict=True)])
            messages = torch.stack([one[row] for one, row in zip(messages, rows, strict=True)])
        x = x + block.mlp_scale * block.mlp(norm(block.mlp_norm, x))
    assert x.shape[1] == (3 if prune_after else 9)
    pooled = (norm(net.norm, x) * messages[..., None]).mean(1)
    assert_near(net(images), pooled @ net.head.weight.mT + net.head.bias, 1e-12)
    assert net.blocks[0].mlp[0].out_features == 48


def test_the_tree_of_a_network() -> None:
    net, images = network(), randn(2, 2, 6, 6, seed=1)
    x, message, found = net._embedded(images), None, []
    for block in net.blocks:
        found.append(block.attention.dependency(block.norm(x), message))
        x, message, _ = block.send(x, message)
        x = block.channels(x)
    tree, expected = net.tree(images), dependency_tree(found)
    assert torch.equal(tree.parent, expected.parent)
    assert torch.equal(tree.root, expected.root)
    assert torch.equal(network(prune_after=(1,)).tree(images).parent, expected.parent), "nothing is pruned for it"


def test_the_paper_s_sizes() -> None:
    with torch.device("meta"):
        net = DependencyViT()
    assert len(net.blocks) == 12
    assert net.places.shape == (196, 192)
    assert net.blocks[0].attention.heads == 12
    assert net.ratio == 0.16
    assert not net.prune_after
    assert net.score == "message"
    assert network(layer_scale=1e-6).blocks[0].scale.unique().tolist() == pytest.approx([1e-6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 4}, "patch=4 must divide side=6"), ({"side": 0}, "side=0"), ({"patch": 0}, "patch=0"),
        ({"channels": 0}, "channels=0"), ({"classes": 0}, "classes=0"), ({"depth": 0}, "depth=0"),
        ({"heads": 5}, "heads=5 must divide dim=12"), ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"layer_scale": -1}, "layer_scale=-1"), ({"score": "loud"}, "score='loud'"),
        ({"prune_after": (4,)}, "prune_after"),
        ({"prune_after": (0,)}, "prune_after"), ({"prune_after": (1, 2), "ratio": 0.5}, "prune_after"),
    ],
)  # fmt: skip
def test_bad_networks(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        network(**options)


def test_bad_images() -> None:
    with pytest.raises(ShapeError, match=r"images must be \(B, 2, 6, 6\); got \(1, 2, 6, 4\)"):
        network()(randn(1, 2, 6, 4))


# -- the paper's claims ---------------------------------------------------------------------------------------------


class Digits(nn.Module):
    """Sixteen tokens of two by two pixels, three blocks."""

    def __init__(self, **options) -> None:
        super().__init__()
        sizes = {"dim": 48, "depth": 3, "heads": 4, "mlp_ratio": 2.0, "layer_scale": 1.0}
        self.net = DependencyViT(8, 2, channels=1, classes=10, **sizes, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images[:, None])


def read(epochs: int, seed: int = 0, **options) -> float:
    torch.manual_seed(seed)
    return accuracy(fit(Digits(**options), seed, epochs))


@pytest.mark.slow
def test_it_learns_as_attention_that_gathers(claim) -> None:
    gather = accuracy(fit(vit(MultiHeadAttention, depth=3, dim=48), epochs=16))
    claim(
        "reversed attention learns as well as ordinary attention: accuracy on held-out digits",
        ours=read(16), baseline=gather - 0.03, better="higher",
        baseline_name="a ViT of the same width and depth, less three points", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_tokens_that_send_little_can_be_dropped(claim, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_four() -> float:
        return sum(read(14, seed, prune_after=(1,), ratio=0.5) for seed in range(4)) / 4

    ours, random = mean_of_four(), torch.Generator().manual_seed(0)

    def at_random(scores: Tensor, *how: float) -> Tensor:
        return prune(torch.rand(scores.shape, generator=random), *how)

    monkeypatch.setattr(dependency_vit, "prune", at_random)
    claim(
        "dropping the half of tokens that send least beats dropping at random: accuracy on digits, mean of four seeds",
        ours=ours, baseline=mean_of_four(), better="higher", margin=0.02, baseline_name="tokens dropped at random",
        seed=0,
    )  # fmt: skip
