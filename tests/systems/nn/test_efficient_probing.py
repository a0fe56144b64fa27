"""Efficient probing: the maps and slices by hand, its cost beside multi-head cross-attention, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import OptionError
from foveate.nn import (
    CrossAttentionPool,
    EfficientProbe,
    MeanPool,
    MultiHeadAttention,
    Pool,
    ProbeHead,
    branch_similarity,
)
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
    """Tokens `(B, 25, 64)` and labels; the tokens that tell are marked with a key."""

    tokens: Tensor
    labels: Tensor


def one_kind(count: int, random: torch.Generator) -> Scattered:
    """Every token holds a random class's code and noise; two tokens have a key beside it, and hold the label's."""
    codes, key = coded(10, 1)
    labels, x, places = noisy(count, codes, random)
    return Scattered(written(x, places[:, :2], labels, codes, key[0]), labels)


def two_kinds(count: int, random: torch.Generator) -> Scattered:
    """Two tokens have one key, and two have another; the label is the ordered pair of what they hold."""
    codes, keys = coded(3, 2)
    first, x, places = noisy(count, codes, random)
    second = torch.randint(3, (count,), generator=random)
    x = written(x, places[:, :2], first, codes, keys[0])
    return Scattered(written(x, places[:, 2:4], second, codes, keys[1]), 3 * first + second)


def coded(classes: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Draw the codes of classes and the keys of kinds, always the same."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(classes, 64, generator=random), torch.randn(kinds, 64, generator=random)


def noisy(count: int, codes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw labels, tokens with random codes, and an order of the places in each example."""
    labels, held = (torch.randint(len(codes), shape, generator=random) for shape in ((count,), (count, 25)))
    x = codes[held] + 0.3 * torch.randn(count, 25, 64, generator=random)
    return labels, x, torch.rand(count, 25, generator=random).argsort(-1)


def written(x: Tensor, places: Tensor, labels: Tensor, codes: Tensor, key: Tensor) -> Tensor:
    """Write the label's code and the key at some places of each example; the noise of the places goes."""
    at = places[..., None].expand(-1, -1, 64)
    return x.scatter(1, at, (codes[labels] + key)[:, None].expand_as(at))


@cache
def data(make: Callable[[int, torch.Generator], Scattered]) -> tuple[Scattered, Scattered]:
    random = torch.Generator().manual_seed(0)
    return make(1000, random), make(500, random)


@cache
def fitted(make: Callable[[], Pool], of: Callable[[int, torch.Generator], Scattered] = one_kind) -> ProbeHead:
    """Train a probe for 300 steps."""
    train, _ = data(of)
    return fit(make, train.tokens, train.labels, 300, 3e-3)


def fit(make: Callable[[], Pool], tokens: Tensor, labels: Tensor, steps: int, lr: float) -> ProbeHead:
    """Train a probe with Adam on batches of 64, the rate along a cosine, so that the norm's running means settle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = ProbeHead(make(), int(labels.max()) + 1).train()
    order = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(probe.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        chosen = torch.randint(len(tokens), (64,), generator=order)
        optimiser.zero_grad()
        F.cross_entropy(probe(tokens[chosen]), labels[chosen]).backward()
        optimiser.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def accuracy(probe: ProbeHead, tokens: Tensor, labels: Tensor) -> float:
    return (probe(tokens).argmax(-1) == labels).float().mean().item()


def score(make: Callable[[], Pool]) -> float:
    return accuracy(fitted(make), *data(one_kind)[1])


def probing() -> Pool:
    return EfficientProbe(64, 4)


def mean() -> Pool:
    return MeanPool(64)


def cross_attention() -> Pool:
    return CrossAttentionPool(64, 4)


def test_it_finds_the_tokens_that_tell(claim) -> None:
    ours, baseline = score(probing), score(mean)
    assert ours > 0.9
    assert baseline < 0.6
    claim(
        "where few tokens hold the class, 4 queries read it off frozen tokens: accuracy after 300 steps",
        ours=ours, baseline=baseline, better="higher", margin=0.3, baseline_name="linear probing of the mean token",
        seed=0,
    )  # fmt: skip


def test_it_is_as_good_as_cross_attention_with_less_than_half_of_its_parameters(claim) -> None:
    assert parameters(probing()) < parameters(cross_attention()) / 2
    claim(
        "with less than half of its parameters, 4 queries read scattered tokens as well as cross-attention: accuracy",
        ours=score(probing), baseline=score(cross_attention) - 0.02, better="higher",
        baseline_name="multi-head cross-attention with 4 heads, less two points", seed=0,
    )  # fmt: skip


def overlap(of: Callable[[int, torch.Generator], Scattered]) -> float:
    """Return the mean cosine of the maps of two queries, on new tokens."""
    return branch_similarity(fitted(probing, of).pool.weights(data(of)[1].tokens)).item()


def test_queries_share_the_work(claim) -> None:
    """Two kinds of tokens to tell apart need maps that differ; where one kind says all, the maps are the same."""
    assert accuracy(fitted(probing, two_kinds), *data(two_kinds)[1]) > 0.9
    claim(
        "queries that have two kinds of tokens to tell apart make maps that differ: mean cosine of two maps",
        ours=overlap(two_kinds), baseline=overlap(one_kind), better="lower", margin=0.1, seed=0,
        baseline_name="the same probe where one kind of token says all",
    )  # fmt: skip


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


def digits_read(make: Callable[[], Pool], lr: float) -> float:
    tokens, labels, test_tokens, test_labels = frozen_tokens()
    return accuracy(fit(make, tokens, labels, 400, lr), test_tokens, test_labels)


@pytest.mark.slow
def test_it_reads_the_patches_of_a_masked_image_model(claim) -> None:
    claim(
        "16 queries read more than linear probing off the patches of a masked image model: accuracy on digits",
        ours=digits_read(lambda: EfficientProbe(64, 16), 3e-2),
        baseline=max(digits_read(mean, lr) for lr in (3e-2, 1e-1)), better="higher", margin=0.04,
        baseline_name="linear probing of the mean token, the better of two rates", seed=0,
    )  # fmt: skip
