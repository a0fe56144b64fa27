"""Music Transformer: a vector for each distance, by skewing, and generalisation by distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.core.call import AttentionCall
from foveate.core.engines import chunked
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.ops.base.scored import Scored
from foveate.ops.dense.music_transformer import MusicTransformer, with_previous_block
from foveate.ops.dense.softmax import Softmax
from foveate.ops.functional.relative_position import skew
from tests.ops.plans import score_products
from tests.support.tensors import assert_near, gradients, qkv


def built(seed: int = 0, **options) -> MusicTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MusicTransformer(4, 8, **options).double()


def by_hand(op, q, k, v, scale, **grid) -> torch.Tensor:
    """Compute the direct formula pair by pair."""
    (b, h, nq, _), nk = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    out = q.new_zeros(b, h, nq, v.shape[3])
    n_rows = op.table.shape[1]
    for ib in range(b):
        for ih in range(h):
            for i in range(nq):
                place = i + nk - nq
                logits = []
                for j in range(place + 1):
                    distance = place - j
                    key = k[ib, ih, j]
                    table = op.table[ih if len(op.table) > 1 else 0]
                    if distance < n_rows:
                        key = key + table[n_rows - 1 - distance]
                    elif op.variant == "paper":
                        key = key + table[0]
                    for name, at in grid.items():
                        span = (op.grid[name].shape[1] + 1) // 2
                        difference = max(-(span - 1), min(span - 1, int(at[ib, place] - at[ib, j])))
                        key = key + op.grid[name][ih, span - 1 + difference]
                    seen = op.block is None or place // op.block - j // op.block <= 1
                    logits.append(scale * q[ib, ih, i] @ key if seen else q.new_tensor(-math.inf))
                weights = torch.stack(logits).softmax(0)
                out[ib, ih, i] = weights @ v[ib, ih, : place + 1]
    return out


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("form", ["skew", "gather"])
@pytest.mark.parametrize("options", [{}, {"shared": True}, {"block": 3}, {"block": 50}])
@pytest.mark.parametrize("lengths", [(9, 9), (4, 11), (1, 7), (1, 1)])
def test_by_hand(variant: str, form: str, options: dict, lengths: tuple[int, int]) -> None:
    q, k, v = qkv(*lengths, value_width=5)
    op = built(max_len=4, variant=variant, form=form, **options)
    assert_near(op(q, k, v, causal=True, scale=0.7), by_hand(op, q, k, v, 0.7), 1e-12)
    assert_near(op(q, k, v, causal=True), by_hand(op, q, k, v, 8**-0.5), 1e-12)


def test_places_on_a_grid() -> None:
    """Relative time and pitch add to the distance, with differences clipped at the span, on all engines and lengths."""
    q, k, v = qkv(9, 12, value_width=5, grad=True)
    random = torch.Generator().manual_seed(0)
    places = {name: torch.randint(0, 9, (2, 12), generator=random) for name in ("time", "pitch")}
    op = built(max_len=5, time=3, pitch=20)
    assert op.grid["time"].shape == (4, 5, 8)
    out = op(q, k, v, causal=True, **places)
    assert_near(out, by_hand(op, q, k, v, 8**-0.5, **places), 1e-12)
    assert_near(
        op(q, k, v, causal=True, pitch=places["pitch"]), by_hand(op, q, k, v, 8**-0.5, pitch=places["pitch"]), 1e-12
    )
    assert_near(op(q, k, v, causal=True), by_hand(op, q, k, v, 8**-0.5), 1e-12)
    assert_near(op.weights(q, k, causal=True, **places) @ v.repeat_interleave(2, 1), out, 1e-12)
    other = op(q, k, v, causal=True, engine="chunked", **places)
    for one, two in zip(*(gradients(x, [q, k, v, *op.parameters()]) for x in (out, other)), strict=True):
        assert one.any()
        assert_near(one, two, 1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_skewing_is_gathering(n: int) -> None:
    q, table = (torch.randn(2, 3, n, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    q.requires_grad_(), table.requires_grad_()
    skewed = skew(q @ table.transpose(-1, -2)).tril()
    pairs = (n - 1 - torch.arange(n)[:, None] + torch.arange(n)).clamp_max(n - 1)
    direct = torch.einsum("bhid,bhijd->bhij", q, table[:, :, pairs]).tril()
    assert_near(skewed, direct, 1e-12)
    for one, two in zip(*(gradients(x, [q, table]) for x in (skewed, direct)), strict=True):
        assert_near(one, two, 1e-12)


def test_skewing_a_rectangle() -> None:
    x = torch.arange(15.0).reshape(3, 5)
    assert torch.equal(skew(x)[:, :3], torch.stack([x[0, 2:5], x[1, 1:4], x[2, 0:3]]))


@pytest.mark.parametrize("options", [{}, {"block": 5}, {"block": 7, "variant": "release"}])
@pytest.mark.parametrize("tiles", [(4, 3), (5, 50), (1, 1)])
@pytest.mark.parametrize("lengths", [(20, 20), (13, 20)])
def test_tile_by_tile_with_every_gradient(options: dict, tiles: tuple[int, int], lengths: tuple[int, int]) -> None:
    q, k, v = qkv(*lengths, grad=True)
    op = built(max_len=6, **options)
    mask = torch.rand(2, 4, *lengths, generator=torch.Generator().manual_seed(0)) < 0.8
    ours = chunked.attend(op._prepared(AttentionCall(q, k, v, 0.4, mask, True)), *tiles)
    theirs = op(q, k, v, mask=mask, causal=True, scale=0.4, engine="reference")
    assert_near(ours, theirs, 1e-12)
    for one, two in zip(*(gradients(x, [q, k, v, op.table]) for x in (ours, theirs)), strict=True):
        assert two.any()
        assert_near(one, two, 1e-12)


def test_initial_values() -> None:
    op = built(max_len=100, time=30)
    assert op.table.shape == (4, 100, 8)
    assert built(shared=True).table.shape == (1, 2048, 8)
    for table in (op.table, op.grid["time"]):
        assert 0.97 < table.std() * 8**0.5 < 1.03


def test_no_table_is_softmax_attention() -> None:
    q, k, v = qkv(9, kv_heads=4)
    op = MusicTransformer.exact(4, 8, 9).double()
    assert_near(op(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True), 1e-12)


def test_only_offsets_count() -> None:
    """The same motif at another position behind hidden keys gives the same rows."""
    q, k, _ = qkv(6)
    before = qkv(10, seed=1)
    op = built(max_len=4)
    alone = op.weights(q, k, causal=True)
    hidden = torch.arange(16) >= 10
    moved = op.weights(
        *(torch.cat([x, y], 2) for x, y in zip(before[:2], (q, k), strict=True)), mask=hidden, causal=True
    )
    assert_near(moved[:, :, 10:, 10:], alone, 1e-12)


def test_a_block_sees_itself_and_the_one_before() -> None:
    seen = MusicTransformer.example(1, 8, 12).weights(
        *qkv(12, heads=1, kv_heads=1, dtype=torch.float32)[:2], causal=True
    )
    place = torch.arange(12)
    behind = place[:, None] // 4 - place // 4
    assert torch.equal(seen[0, 0] > 0, (behind <= 1) & (place[:, None] >= place))


@pytest.mark.parametrize("lengths", [(20, 20), (13, 20), (1, 20), (3, 4), (2, 2)])
@pytest.mark.parametrize("size", [1, 3, 5, 40])
def test_tiles_cover_the_blocks_and_no_more(lengths: tuple[int, int], size: int) -> None:
    blocks = with_previous_block(*lengths, size, torch.device("cpu"))
    query = torch.arange(lengths[0])[:, None] + lengths[1] - lengths[0]
    behind = query // size - torch.arange(lengths[1]) // size
    assert torch.equal(blocks.dense()[0, 0], (behind == 0) | (behind == 1))
    assert blocks.keys_read() <= 3 * size


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that is made inside its block, without views."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_memory(claim) -> None:
    """L = 512, D = 64."""
    q, k, v = qkv(512, batch=1, heads=1, kv_heads=1, width=64, dtype=torch.float32)

    def largest(form: str) -> int:
        op = MusicTransformer(1, 64, 512, form=form)
        with Largest() as seen, torch.no_grad():
            op(q, k, v, causal=True, engine="reference")
        return seen.numbers

    assert largest("skew") == 512 * 513
    claim(
        "skewing needs O(L²) numbers, while vectors for each pair need O(L² D): the largest tensor, L = 512 and D = 64",
        ours=largest("skew"), baseline=largest("gather") / 50, better="lower",
        baseline_name="1/50 of gathering", seed=0,
    )  # fmt: skip


def test_blocks_save_work(claim) -> None:
    q, k, v = qkv(4096, batch=1, heads=1, kv_heads=1, dtype=torch.float32)

    def computed(block: int | None) -> int:
        op, pairs = MusicTransformer(1, 8, 64, block=block), []
        score = op.score
        op.score = lambda *args, **context: (out := score(*args, **context), pairs.append(out.numel()))[0]
        op(q, k, v, causal=True)
        return sum(pairs)

    claim(
        "the local form computes only logits near the query: logits computed for 4,096 tokens, blocks of 64",
        ours=computed(64), baseline=computed(None) / 10, better="lower",
        baseline_name="1/10 of the global form", seed=0,
    )  # fmt: skip
    op = MusicTransformer(1, 8, 64, block=64)
    assert op.capabilities.growth == "N"
    assert op.plan(q, k, v, causal=True).density < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0"),
        ({"head_dim": 1.5}, r"head_dim=1\.5"),
        ({"max_len": 0}, "max_len=0"),
        ({"max_len": None}, "max_len=None"),
        ({"block": 0}, "block=0"),
        ({"time": 0}, "time=0"),
        ({"pitch": -1}, "pitch=-1"),
        ({"form": "local"}, "form='local'"),
        ({"shared": "yes"}, "shared='yes'"),
        ({"variant": "tf"}, "variant='tf'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MusicTransformer(**{"heads": 4, "head_dim": 8, **options})


def test_calls_that_do_not_fit() -> None:
    q, k, v = qkv(6, dtype=torch.float32)
    op = MusicTransformer(4, 8, pitch=5)
    with pytest.raises(UnsupportedPattern, match='does not define "self"'):
        op(q, k, v)
    with pytest.raises(UnsupportedPattern, match='does not define "cross"'):
        op(q[:, :, 2:], k, v)
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=2, D=8"):
        op(q[:, :2], k, v, causal=True)
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=4, D=4"):
        op(q[..., :4], k[..., :4], v, causal=True)
    with pytest.raises(OptionError, match="takes no input 'time'"):
        op(q, k, v, causal=True, time=torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"pitch must be int \(B, Nk\)=\(2, 6\); got torch.int64 \(2, 5\)"):
        op(q, k, v, causal=True, pitch=torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="pitch must be int"):
        op(q, k, v, causal=True, pitch=torch.zeros(2, 6))
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        op.init_state(1, 4, 2, 8, 8)


class Copier(nn.Module):
    """Two blocks of attention and MLP over tokens, with or without learned absolute positions."""

    def __init__(self, ops: list[Scored], absolute: int = 0, vocab: int = 16, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.place = nn.Parameter(0.1 * torch.randn(absolute, dim)) if absolute else None
        self.ops = nn.ModuleList(ops)
        self.qkv, self.out = (nn.ModuleList(nn.Linear(dim, n * dim) for _ in ops) for n in (3, 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in ops
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * len(ops) + 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place[: tokens.shape[1]]
        for i, (op, project, out, mlp) in enumerate(zip(self.ops, self.qkv, self.out, self.mlps, strict=True)):
            q, k, v = project(self.norms[2 * i](x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            x = x + out(op(q, k, v, causal=True).transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def motifs(count: int, length: int, random: torch.Generator) -> torch.Tensor:
    """Make repetitions of a motif of 4 to 8 random tokens."""
    motif, period = torch.randint(16, (count, 8), generator=random), torch.randint(4, 9, (count, 1), generator=random)
    return motif.gather(1, torch.arange(length) % period)


def copying_loss(model: Copier, length: int, random: torch.Generator, count: int = 16) -> torch.Tensor:
    """Return the mean loss from the second repetition on."""
    tokens = motifs(count, length, random)
    return F.cross_entropy(model(tokens[:, :-1])[:, 15:].flatten(0, 1), tokens[:, 16:].flatten())


def train_copier(make, seed: int, steps: int) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, random = make(), torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        for _ in range(steps):
            optimiser.zero_grad()
            copying_loss(model, 64, random).backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            return copying_loss(model, 128, torch.Generator().manual_seed(99), 256).item()


@pytest.mark.slow
def test_it_copies_further_than_it_was_trained(claim) -> None:
    relative = train_copier(lambda: Copier([MusicTransformer(4, 16, 64) for _ in range(2)]), 0, 300)
    absolute = train_copier(lambda: Copier([Softmax() for _ in range(2)], absolute=128), 0, 300)
    claim(
        "trained to copy periods on 64 tokens, it generalises to 128: loss per token",
        ours=relative, baseline=0.5 * absolute, better="lower",
        baseline_name="half of learned absolute positions' loss", seed=0,
    )  # fmt: skip


def test_the_cost_of_a_pair() -> None:
    """A pair costs one product with the key, one with the distance, and one with each grid distance."""
    assert score_products(MusicTransformer(2, 16)) == 2 * 16
    assert score_products(MusicTransformer(2, 16, pitch=4)) == 3 * 16
    assert score_products(MusicTransformer(2, 16, time=8, pitch=4)) == 4 * 16
