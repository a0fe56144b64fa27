"""Efficient probing: the maps and slices by hand, its cost beside multi-head cross-attention, and what it reads."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import OptionError
from foveate.nn import CrossAttentionPool, EfficientProbe, MeanPool, MultiHeadAttention, Pool, ProbeHead
from tests.support.tensors import assert_near
from tests.systems.nn import digits

DIM, N = 24, 7


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(queries: int = 4, d_out: int = 1, dim: int = DIM) -> EfficientProbe:
    """Make a probe whose queries are large, so that its maps are not flat."""
    pool = EfficientProbe(dim, queries, d_out).double()
    with torch.no_grad():
        pool.queries.copy_(randn(queries, dim, seed=1))
        pool.v.weight.copy_(randn(dim // d_out, dim, seed=2))
    return pool


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- the mechanism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "d_out"), [(1, 1), (4, 1), (3, 2), (2, 4), (24, 1)])
def test_one_query_at_a_time(queries: int, d_out: int) -> None:
    """As in the paper: project every token, cut the values into slices, and read one slice with each query's map."""
    pool, x = made(queries, d_out), randn(2, N, DIM)
    vectors, weights = pool.read(x)
    width = DIM // (d_out * queries)
    assert vectors.shape == (2, 1, DIM // d_out)
    for b in range(2):
        values = x[b] @ pool.v.weight.mT
        for m in range(queries):
            scores = torch.stack([(pool.queries[m] * token).sum() / DIM**0.5 for token in x[b]])
            shares = scores.exp() / scores.exp().sum()
            own = slice(m * width, (m + 1) * width)
            assert_near(weights[b, m], shares, 1e-12)
            assert_near(vectors[b, 0, own], sum(s * v[own] for s, v in zip(shares, values, strict=True)), 1e-12)


def test_queries_of_zero_pool_the_mean() -> None:
    pool, x = made(), randn(2, N, DIM)
    with torch.no_grad():
        pool.queries.zero_()
    assert_near(pool(x)[:, 0], x.mean(1) @ pool.v.weight.mT, 1e-12)
    assert_near(pool(x)[:, 0], MeanPool(DIM)(x)[:, 0] @ pool.v.weight.mT, 1e-12)


def test_it_is_cross_attention_whose_heads_see_all_channels() -> None:
    """Heads with the identity for W_k, a query each and C channels to score with; torch's scale is C^-0.5 then."""
    pool, x = made(3), randn(2, N, DIM)
    q = pool.queries[:, None].expand(2, -1, -1, -1)
    k = x[:, None].expand(-1, 3, -1, -1)
    v = (x @ pool.v.weight.mT).unflatten(-1, (3, -1)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v)[:, :, 0].flatten(1)
    assert_near(pool(x)[:, 0], expected, 1e-12)


def test_a_query_has_its_own_map_and_slice() -> None:
    pool, x = made(3), randn(2, N, DIM)
    vectors, weights = pool.read(x)
    with torch.no_grad():
        pool.queries[1].neg_()
    changed = pool.read(x)
    same = [0, 2]
    assert_near(changed.weights[:, same], weights[:, same], 0)
    assert (changed.weights[:, 1] - weights[:, 1]).abs().max() > 0.1
    moved = (changed.vectors - vectors)[:, 0].unflatten(-1, (3, -1)).abs().amax((0, 2))
    assert not moved[same].any()
    assert moved[1] > 0.1


def test_sizes_and_first_values() -> None:
    pool = EfficientProbe(768)
    assert (pool.maps, pool.slots, pool.out_dim) == (32, 1, 768)
    assert parameters(pool) == 32 * 768 + 768 * 768
    assert 0.018 < pool.queries.std() < 0.022
    assert parameters(EfficientProbe(768, 16, 4)) == 16 * 768 + 768 * 768 // 4
    assert parameters(CrossAttentionPool(768)) == 3 * 768 * 768 + 768
    head = ProbeHead(pool, 10)
    assert (head.norm.affine, head.norm.eps) == (False, 1e-6)
    assert parameters(head) == parameters(pool) + 768 * 10 + 10


def test_multi_head_cross_attention_is_torch_s() -> None:
    """The baseline of the claims below."""
    pool, x = CrossAttentionPool(DIM, 3).double(), randn(2, N, DIM)
    with torch.no_grad():
        pool.query.mul_(100)
    theirs = nn.MultiheadAttention(DIM, 3, bias=False, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.k.weight, pool.v.weight]))
        theirs.out_proj.weight.copy_(torch.eye(DIM))
    expected, weights = theirs(pool.query.expand(2, 1, -1), x, x, average_attn_weights=False)
    vectors, ours = pool.read(x)
    assert ours.std(-1).min() > 1e-3
    assert_near(vectors, expected, 1e-12)
    assert_near(ours, weights[:, :, 0], 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EfficientProbe(24, 5), r"num_queries \* d_out = 5 must divide dim=24"),
        (lambda: EfficientProbe(24, 8, 2), r"num_queries \* d_out = 16 must divide dim=24"),
        (lambda: EfficientProbe(24, 0), "num_queries=0"),
        (lambda: EfficientProbe(24, 4, 0), "d_out=0"),
        (lambda: EfficientProbe(24, 2.5), "num_queries=2.5 must be a whole number"),
        (lambda: CrossAttentionPool(24, 5), "heads=5 must divide dim=24"),
        (lambda: CrossAttentionPool(24, 0), "heads=0"),
    ],
)
def test_bad_options(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def macs(pool: Pool, tokens: int) -> float:
    """Count the multiply-adds of pooling the tokens of one image."""
    counter = FlopCounterMode(display=False)
    with counter:
        pool(torch.zeros(1, tokens, pool.dim))
    return counter.get_total_flops() / 2


def test_it_skips_the_projections_of_tokens(claim) -> None:
    """With maps of raw tokens, and W_v behind the pooling, nothing of C² is paid per token."""
    ours = macs(EfficientProbe(768), 196)
    assert ours == 2 * 32 * 196 * 768 + 768 * 768
    claim(
        "pooling 196 tokens of 768 channels with 32 queries takes a tenth of the multiply-adds: millions",
        ours=ours / 1e6, baseline=macs(CrossAttentionPool(768, 12), 196) / 1e7, better="lower",
        baseline_name="a tenth of multi-head cross-attention's", seed=0,
    )  # fmt: skip


# -- tokens that all look alike ----------------------------------------------------------------------------------------


class Scattered(NamedTuple):
    """Tokens of 64 channels and labels; in each example a few tokens, marked by a key, hold the label's code."""

    tokens: Tensor
    labels: Tensor


def scattered(count: int, random: torch.Generator, codes: Tensor, keys: Tensor) -> Scattered:
    """Every token holds a random class's code and noise; with each key come two tokens, which hold the label's."""
    labels = torch.randint(10, (count,), generator=random)
    held = torch.randint(10, (count, 25), generator=random)
    places = torch.rand(count, 25, generator=random).argsort(-1)[:, : 2 * len(keys)]
    held.scatter_(1, places, labels[:, None].expand_as(places).contiguous())
    x = codes[held] + 0.3 * torch.randn(count, 25, 64, generator=random)
    for i, key in enumerate(keys):
        own = places[:, 2 * i : 2 * i + 2]
        x.scatter_add_(1, own[..., None].expand(-1, -1, 64), key.expand(count, 2, 64).contiguous())
    return Scattered(x, labels)


@cache
def data(kinds: int = 1) -> tuple[Scattered, Scattered]:
    random = torch.Generator().manual_seed(0)
    codes, keys = torch.randn(10, 64, generator=random), torch.randn(kinds, 64, generator=random)
    return scattered(1000, random, codes, keys), scattered(500, random, codes, keys)


def fitted(make, kinds: int = 1, seed: int = 0, steps: int = 300) -> ProbeHead:
    """Train a probe on scattered tokens: Adam at 3e-3, batches of 64."""
    train, _ = data(kinds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = ProbeHead(make(), 10).train()
    return fit(probe, train.tokens, train.labels, seed, steps)


def fit(probe: ProbeHead, tokens: Tensor, labels: Tensor, seed: int, steps: int, lr: float = 3e-3) -> ProbeHead:
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(probe.parameters(), lr)
    for _ in range(steps):
        chosen = torch.randint(len(tokens), (64,), generator=order)
        optimiser.zero_grad()
        F.cross_entropy(probe(tokens[chosen]), labels[chosen]).backward()
        optimiser.step()
    return probe.eval()


@torch.no_grad()
def accuracy(probe: ProbeHead, tokens: Tensor, labels: Tensor) -> float:
    return (probe(tokens).argmax(-1) == labels).float().mean().item()


def score(make, kinds: int = 1) -> float:
    return accuracy(fitted(make, kinds), *data(kinds)[1])


def test_it_finds_the_tokens_that_tell(claim) -> None:
    claim(
        "where few tokens hold the class, EP with 4 queries reads it off frozen tokens: accuracy after 300 steps",
        ours=score(lambda: EfficientProbe(64, 4)), baseline=score(lambda: MeanPool(64)), better="higher", margin=0.3,
        baseline_name="linear probing of the mean token", seed=0,
    )  # fmt: skip


def test_it_is_as_good_as_cross_attention_with_less_than_half_of_its_parameters(claim) -> None:
    assert parameters(EfficientProbe(64, 4)) < parameters(CrossAttentionPool(64, 4)) / 2
    claim(
        "with less than half of the parameters EP reads scattered tokens as well as cross-attention: accuracy",
        ours=score(lambda: EfficientProbe(64, 4)), baseline=score(lambda: CrossAttentionPool(64, 4)) - 0.02,
        better="higher", baseline_name="multi-head cross-attention with 4 heads, less two points", seed=0,
    )  # fmt: skip


def overlap(weights: Tensor) -> float:
    """Return the mean cosine of the maps of two queries."""
    unit = F.normalize(weights, dim=-1)
    first, second = torch.triu_indices(weights.shape[1], weights.shape[1], 1)
    return (unit @ unit.mT)[:, first, second].mean().item()


# -- real tokens -------------------------------------------------------------------------------------------------------


def patches(images: Tensor, side: int = 2) -> Tensor:
    """Cut images `(B, 8, 8)` into the pixels of patches, `(B, N, side²)`, row by row."""
    cut = images.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return cut.flatten(3).flatten(1, 2)


class MaskedEncoder(nn.Module):
    """A small vision transformer that learns digits without labels: it paints hidden patches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits.vit(MultiHeadAttention)
        self.blank = nn.Parameter(torch.zeros(64))
        self.paint = nn.Linear(64, 4)

    def encode(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.net.tokens(images)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.blank + self.net.place, x)
        for block in self.net.blocks:
            x = block(x)
        return x

    def loss(self, images: Tensor, random: torch.Generator) -> Tensor:
        hidden = torch.rand(len(images), 16, generator=random) < 0.5
        painted = self.paint(self.net.norm(self.encode(images, hidden)))
        return (painted - patches(images))[hidden].square().mean()


@cache
def frozen_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return patch tokens and labels of digits, to train and to test on, from an encoder that never saw a label."""
    images, labels, test_images, test_labels = digits.data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = MaskedEncoder()
    random = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(encoder.parameters(), 3e-3)
    for _ in range(300):
        chosen = torch.randint(len(images), (64,), generator=random)
        optimiser.zero_grad()
        encoder.loss(images[chosen], random).backward()
        optimiser.step()
    with torch.no_grad():
        return encoder.encode(images), labels, encoder.encode(test_images), test_labels


def digits_read(make) -> float:
    tokens, labels, test_tokens, test_labels = frozen_tokens()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = ProbeHead(make(), 10).train()
    return accuracy(fit(probe, tokens, labels, 0, 400), test_tokens, test_labels)


@pytest.mark.slow
def test_it_reads_the_patches_of_a_masked_image_model(claim) -> None:
    ours = digits_read(lambda: EfficientProbe(64, 16))
    claim(
        "EP reads more than linear probing off the frozen patches of a masked image model: accuracy on digits",
        ours=ours, baseline=digits_read(lambda: MeanPool(64)), better="higher", margin=0.03,
        baseline_name="linear probing of the mean token", seed=0,
    )  # fmt: skip
