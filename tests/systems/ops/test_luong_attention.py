"""Luong attention: four scores, windows by position, and a decoder with input feeding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.core.call import AttentionCall
from foveate.core.engines import chunked
from foveate.core.errors import OptionError, ShapeError, UnsupportedPattern
from foveate.nn.seq2seq.luong_decoder import LuongDecoder
from foveate.ops.dense.luong_attention import LuongAttention, alignment_error_rate
from foveate.ops.operator import Capabilities
from tests.ops.plans import score_products
from tests.support.tensors import assert_near, gradients, qkv

SCORES, MODES = ("dot", "general", "concat", "location"), ("global", "local_m", "local_p")
PAIRS = [(score, mode) for score in SCORES for mode in MODES if score != "location" or mode == "global"]


def built(score: str = "dot", mode: str = "global", *, heads: int = 4, spread: float = 1.0, **options):
    """Make an operator with random weights."""
    if score == "location":
        options = {"max_keys": 8, **options}
    op = LuongAttention(8, score, mode, heads=heads, **options).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.normal_(0, spread, generator=random)
    return op


def logit_by_hand(op, head: int, state, key, place: int):
    """Return a logit by its formula; None if a location score does not cover the position."""
    if op.kind == "dot":
        return state @ key
    if op.kind == "general":
        return state @ op.w_score[head] @ key
    if op.kind == "concat":
        both = torch.cat([op.w_query[head], op.w_key[head]]).T @ torch.cat([state, key])
        return op.v_score[head] @ both.tanh()
    return state @ op.w_score[head, :, place] if place < op.w_score.shape[2] else None


@torch.no_grad()
def by_hand(op, q, k, v, scale: float, seen, t=None):
    """Compute the formulas word by word; `seen (B, Nk)`."""
    (b, h, nq, _), nk = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    out = q.new_zeros(b, h, nq, v.shape[3])
    for ib in range(b):
        keys = [j for j in range(nk) if seen[ib, j]]
        for ih in range(h):
            for i in range(nq):
                state, weights = q[ib, ih, i], {}
                centre = i if t is None else int(t[i])
                if op.mode == "local_p":
                    up = torch.tanh(op.w_place[ih].T @ state) @ op.v_place[ih]
                    centre = len(keys) / (1 + math.exp(-up))
                for place, j in enumerate(keys):
                    if op.mode == "global" or abs(place - centre) <= op.window:
                        logit = logit_by_hand(op, ih, state, k[ib, ih, j], place)
                        weights[j] = math.exp(scale * logit) if logit is not None else 0.0
                total = sum(weights.values())
                for j, weight in weights.items():
                    bell = 1.0
                    if op.mode == "local_p" and op.gaussian:
                        bell = math.exp(-((keys.index(j) - centre) ** 2) / (2 * (op.window / 2) ** 2))
                    out[ib, ih, i] += weight / total * bell * v[ib, ih, j]
    return out


PADDING = {
    "none": torch.ones(2, 11, dtype=torch.bool),
    "right": torch.arange(11) < torch.tensor([[11], [7]]),
    "left": torch.arange(11) >= torch.tensor([[3], [0]]),
}


@pytest.mark.parametrize(("score", "mode"), PAIRS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("n_queries", [5, 11])
def test_by_hand(score: str, mode: str, padding: str, n_queries: int) -> None:
    q, k, v = qkv(n_queries, 11, value_width=5)
    op = built(score, mode, window=3, spread=0.5, **({"hidden": 6} if score != "location" else {}))
    seen = PADDING[padding]
    mask = None if padding == "none" else seen[:, None, None]
    for scale in (None, 0.6):
        expected = by_hand(op, q, k, v, 1.0 if scale is None else scale, seen)
        assert_near(op(q, k, v, mask=mask, scale=scale), expected, 1e-12)
    weights = op.weights(q, k, mask=mask)
    assert not weights[~seen[:, None, None].expand(weights.shape)].any()


@pytest.mark.parametrize(("score", "mode"), PAIRS)
def test_chunks_agree_with_every_gradient(score: str, mode: str) -> None:
    q, k, v = qkv(9, 11, grad=True)
    op = built(score, mode, window=3, spread=0.5)
    mask = PADDING["right"][:, None, None]
    ours = chunked.attend(op._prepared(AttentionCall(q, k, v, 1.0, mask)), 4, 3)
    theirs = op(q, k, v, mask=mask, engine="reference")
    assert_near(ours, theirs, 1e-12)
    wanted = [q, v, *op.parameters()]
    for one, two in zip(*(gradients(x, wanted) for x in (ours, theirs)), strict=True):
        assert two.any()
        assert_near(one, two, 1e-12)


@pytest.mark.parametrize("score", ["dot", "general"])
def test_inner_products_are_fused(score: str) -> None:
    q, k, v = qkv(9, 11)
    op = built(score)
    assert op.plan(q, k, v).engine == "fused"
    assert built(score, "local_p").plan(q, k, v).engine == "reference"


def test_special_cases() -> None:
    q, k, v = qkv(9, 11, kv_heads=4)
    dot = built()
    assert_near(dot(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=1.0), 1e-12)
    general = built("general")
    with torch.no_grad():
        general.w_score.copy_(torch.eye(8))
    assert_near(general(q, k, v), dot(q, k, v), 1e-12)
    for mode in ("local_m", "local_p"):
        assert_near(built("dot", mode, window=11, gaussian=False)(q, k, v), dot(q, k, v), 1e-12)


def test_the_query_knows_its_position() -> None:
    """Queries know their positions, step by step in a decoder and for any positions."""
    q, k, v = qkv(6, 11)
    op = built("dot", "local_m", window=2)
    whole = op(q, k, v)
    for i in range(6):
        assert_near(op(q[:, :, i : i + 1], k, v, t=torch.tensor([i])), whole[:, :, i : i + 1], 1e-12)
    t = torch.tensor([3, 1, 4, 1, 5, 9])
    assert_near(op(q, k, v, t=t), by_hand(op, q, k, v, 1.0, PADDING["none"], t), 1e-12)
    assert_near(op(q, k, v, t=t, engine="chunked"), op(q, k, v, t=t), 1e-12)


def test_the_window_follows_the_prediction() -> None:
    """The formula and its gradients, also of the Gaussian's centre, agree."""
    q, k, v = qkv(40, 30, heads=1, kv_heads=1, grad=True)
    op = built("general", "local_p", heads=1, window=4, spread=0.7)
    centre = 30 * torch.sigmoid(torch.tanh(q @ op.w_place) @ op.v_place[0])
    assert centre.max() - centre.min() > 10
    away = torch.arange(30) - centre[..., None]
    inside = (q @ op.w_score @ k.mT).masked_fill(away.abs() > 4, -math.inf).softmax(-1)
    expected = inside * torch.exp(-(away**2) / 8)
    weights, out = op.weights(q, k), op(q, k, v)
    assert_near(weights, expected, 1e-12)
    assert not weights[away.abs() > 4].any()
    assert (weights[away.abs() < 4] > 0).all()
    assert ((weights / inside).nan_to_num(0).argmax(-1) == away.abs().argmin(-1)).all(), "highest at the centre"
    wanted = [op.v_place, op.w_place, op.w_score, q, k, v]
    for one, other in zip(gradients(out, wanted), gradients(expected @ v, wanted), strict=True):
        assert other.any()
        assert_near(one, other, 1e-12)


@pytest.mark.parametrize("mode", ["local_m", "local_p"])
def test_keys_outside_the_window_have_no_effect(mode: str) -> None:
    q, k, v = qkv(6, 30)
    op = built("general", mode, window=2, spread=0.3)
    seen = op.weights(q, k) > 0
    grouped = seen.unflatten(1, (2, 2)).any(2).any(2)  # for any query, by key head
    assert 0 < grouped.sum() < grouped.numel()
    k2, v2 = (torch.where(grouped[..., None], x, 7 * x.flip(0)) for x in (k, v))
    assert torch.equal(op(q, k2, v2), op(q, k, v))


def test_a_location_score_ignores_keys_beyond_its_table() -> None:
    q, k, v = qkv(4, 11)
    op = built("location", max_keys=5)
    weights = op.weights(q, k)
    assert not weights[..., 5:].any()
    assert_near(weights.sum(-1), torch.ones(2, 4, 4), 1e-12)
    assert torch.equal(op(q, 3 * k, v), op(q, k, v)), "keys do not matter"


def test_initial_values() -> None:
    op = LuongAttention(8, "concat", "local_p", hidden=5, heads=2)
    assert all(0.05 < parameter.abs().max() <= 0.1 for parameter in op.parameters())
    assert op.window == 10
    decoder = LuongDecoder(8, 9, layers=2)
    assert all(0.05 < parameter.abs().max() <= 0.1 for parameter in decoder.parameters())
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 8 * 9 * 2 + 128 + 32 * (16 + 8 + 8 + 8 + 4)


def test_alignment_error_rate() -> None:
    weights = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]])
    sure = torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]).bool()
    possible = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]).bool()
    # three links, two sure ones; one of the three is sure, and two are possible
    assert alignment_error_rate(weights, sure, possible) == pytest.approx(1 - (1 + 2) / (3 + 2))
    assert alignment_error_rate(weights, sure) == pytest.approx(1 - (1 + 1) / (3 + 2))
    assert alignment_error_rate(sure.double(), sure) == 0
    assert alignment_error_rate(sure.double(), sure.roll(1, 1)) == 1
    # two sentences: all their links together
    two, links = torch.stack([weights, weights.flip(0)]), torch.stack([sure, sure.flip(0)])
    assert alignment_error_rate(two, links) == alignment_error_rate(weights, sure)
    assert alignment_error_rate(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)) == 1
    with pytest.raises(ShapeError, match=r"links must be of the weights' shape \(4, 3\); got \(3, 3\)"):
        alignment_error_rate(weights, sure[:3])
    with pytest.raises(ShapeError, match="links must be"):
        alignment_error_rate(weights, sure, possible[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 0}, "head_dim=0"),
        ({"score": "mlp"}, "score='mlp'"),
        ({"mode": "local"}, "mode='local'"),
        ({"window": 0}, "window=0"),
        ({"heads": 2.0}, r"heads=2\.0"),
        ({"hidden": -1}, "hidden=-1"),
        ({"gaussian": None}, "gaussian=None"),
        ({"max_keys": 5}, 'max_keys=5 must come with score="location"'),
        ({"score": "location"}, 'max_keys=None must come with score="location"'),
        ({"score": "location", "max_keys": 0}, "max_keys=0"),
        ({"score": "location", "max_keys": 5, "mode": "local_p"}, "must come with mode=\"global\"; got mode='local_p'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LuongAttention(**{"head_dim": 8, **options})


def test_calls_that_do_not_fit() -> None:
    q, k, v = qkv(6, 11)
    op = built("dot", "local_m")
    for bad in (torch.arange(5), torch.arange(7), torch.zeros(6)):
        with pytest.raises(ShapeError, match=r"t must be int \(Nq,\)=\(6,\); got"):
            op(q, k, v, t=bad)
    with pytest.raises(OptionError, match="takes no input 't'"):
        built()(q, k, v, t=torch.arange(6))
    with pytest.raises(UnsupportedPattern, match='does not define "causal cross"'):
        op(q, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not define "causal self"'):
        op(k, k, v, causal=True)
    with pytest.raises(UnsupportedPattern, match='does not take a mask of kind "pairs"'):
        op(q, k, v, mask=torch.ones(6, 11, dtype=torch.bool))
    with pytest.raises(UnsupportedPattern, match="cannot go one token at a time"):
        op.init_state(1, 4, 2, 8, 8)
    with pytest.raises(ShapeError, match="built for 4 heads of width 8; got H=2, D=8"):
        op(q[:, :2], k, v)


# -- the decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("input_feeding", [True, False])
def test_the_decoder_by_hand(mode: str, input_feeding: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = LuongDecoder(6, 9, "general", mode, window=2, input_feeding=input_feeding, layers=2).double()
    random = torch.Generator().manual_seed(0)
    source, tokens = torch.randn(2, 7, 6, generator=random).double(), torch.randint(9, (2, 4), generator=random)
    state = tuple(torch.randn(2, 2, 6, generator=random).double() for _ in range(2))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2]).bool()
    expected, rows, inner, fed = [], [], state, torch.zeros(2, 6).double()
    for t in range(4):
        x = decoder.embed(tokens[:, t])
        out, inner = decoder.lstm((torch.cat([x, fed], -1) if input_feeding else x)[:, None], inner)
        given = {"t": torch.tensor([t])} if mode == "local_m" else {}
        keys = source[:, None]
        weights = decoder.attention.weights(
            F.pad(out[:, None], (0, 0, 0, 6)),
            keys,
            mask=mask[:, None, None],
            **{name: torch.full((7,), t) for name in given},
        )[:, 0, 0]
        context = (weights[..., None] * source).sum(1)
        fed = torch.tanh(decoder.combine(torch.cat([context, out[:, 0]], -1)))
        expected.append(decoder.out(fed))
        rows.append(weights)
    found = decoder(source, tokens, mask, state)
    assert_near(found.logits, torch.stack(expected, 1), 1e-12)
    assert_near(found.weights, torch.stack(rows, 1), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("input_feeding", [True, False])
def test_generated_tokens_are_the_most_probable(mode: str, input_feeding: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = LuongDecoder(6, 9, mode=mode, window=1, input_feeding=input_feeding)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(10)
    source = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([1, 2, 3])
    generated = decoder.generate(source, start, 5).tokens
    given = torch.cat([start[:, None], generated[:, :-1]], 1)
    assert torch.equal(decoder(source, given).logits.argmax(-1), generated)
    assert len(generated.unique()) > 2


def test_bad_decoders() -> None:
    for options, message in (
        ({"dim": 0}, "dim=0"), ({"vocab": 0}, "vocab=0"), ({"layers": 0}, "layers=0"), ({"dropout": 2.0}, "dropout=2"),
        ({"input_feeding": 2}, "input_feeding=2"), ({"score": "x"}, "score='x'"), ({"window": 0}, "window=0"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            LuongDecoder(**{"dim": 6, "vocab": 9, **options})
    decoder = LuongDecoder(6, 9)
    tokens = torch.zeros(2, 4, dtype=torch.long)
    for source in (torch.zeros(2, 7, 5), torch.zeros(2, 7), torch.zeros(2, 0, 6)):
        with pytest.raises(ShapeError, match=r"memory must be \(B, S, D=6\) with S > 0; got"):
            decoder(source, tokens)
    with pytest.raises(ShapeError, match=r"tokens must be whole numbers \(B=3, T\) with T > 0; got"):
        decoder(torch.zeros(3, 7, 6), tokens)
    for state in (torch.zeros(1, 2, 6), (torch.zeros(1, 2, 6),), (torch.zeros(2, 1, 6),) * 2):
        with pytest.raises(ShapeError, match=r"state must be \(h, c\), each \(layers, B, D\)=\(1, 2, 6\); got"):
            decoder(torch.zeros(2, 7, 6), tokens, state=state)
    with pytest.raises(OptionError, match="steps=0"):
        decoder.generate(torch.zeros(2, 7, 6), torch.zeros(2, dtype=torch.long), 0)


class Translator(nn.Module):
    """An LSTM encoder and Luong's decoder; `blind` removes attention."""

    vocab = 22  # padding, the start, and twenty words

    def __init__(self, blind: bool, **options) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(self.vocab, 64), nn.LSTM(64, 64, batch_first=True)
        self.decoder = LuongDecoder(64, self.vocab, **options)
        if blind:
            self.decoder.attention = Nothing()

    def read(self, source: torch.Tensor, length: torch.Tensor):
        """Return the source's states, the decoder's first state, and the mask."""
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(source), length, batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        return states, last, torch.arange(source.shape[1]) < length[:, None]

    def loss(self, source: torch.Tensor, target: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        states, last, mask = self.read(source, length)
        given = torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], 1)
        logits = self.decoder(states, given, mask, last).logits
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)

    def accuracy(self, source: torch.Tensor, target: torch.Tensor, length: torch.Tensor) -> float:
        """Return the share of sentences that are right as a whole."""
        states, last, mask = self.read(source, length)
        start = torch.ones_like(length)
        generated = self.decoder.generate(states, start, target.shape[1], mask=mask, state=last).tokens
        return ((generated == target) | (target == 0)).all(1).double().mean().item()


class Nothing(nn.Module):
    capabilities = Capabilities()

    def weights(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return q.new_zeros(*q.shape[:3], k.shape[2])


def reversals(count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make sentences of 8 to 12 words, their reversals, and their lengths."""
    length, place = torch.randint(8, 13, (count,), generator=random), torch.arange(12)
    real = place < length[:, None]
    source = torch.randint(2, 22, (count, 12), generator=random) * real
    return source, source.gather(1, (length[:, None] - 1 - place).clamp_min(0)) * real, length


def trained(blind: bool = False, steps: int = 500, lr: float = 5e-3, **options) -> Translator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, random = Translator(blind, **options), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        model.loss(*reversals(32, random)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return model


@pytest.fixture(scope="module")
def seeing() -> Translator:
    """Train a translator with global dot attention."""
    return trained()


@pytest.mark.slow
def test_attention_reverses_sentences(claim, seeing: Translator) -> None:
    tests, blind = reversals(200, torch.Generator().manual_seed(99)), trained(blind=True)
    ours = seeing.accuracy(*tests)
    claim(
        "global dot attention with input feeding reverses sentences of 8 to 12 words: share of sentences right",
        ours=ours, baseline=blind.accuracy(*tests), better="higher", margin=0.3,
        baseline_name="the same without attention", seed=0,
    )  # fmt: skip
    assert ours >= 0.8
    states, last, mask = seeing.read(*tests[::2])
    given = torch.cat([torch.ones_like(tests[1][:, :1]), tests[1][:, :-1]], 1)
    weights = seeing.decoder(states, given, mask, last).weights * (tests[1] > 0)[..., None]
    truth = (torch.arange(12) == tests[2][:, None, None] - 1 - torch.arange(12)[:, None]).expand_as(weights)
    assert alignment_error_rate(weights, truth) < alignment_error_rate(weights.flip(-1) * mask[:, None], truth)


@pytest.mark.slow
def test_a_predicted_window_is_as_good(claim, seeing: Translator) -> None:
    """A predicted window is as good as global attention, up to ten points."""
    tests = reversals(200, torch.Generator().manual_seed(99))
    local = trained(score="general", mode="local_p", window=3).accuracy(*tests)
    claim(
        "a window of 7 words with a predicted centre does as well as the whole sentence: share of sentences right",
        ours=local, baseline=seeing.accuracy(*tests) - 0.1, better="higher",
        baseline_name="global attention less ten points", seed=0,
    )  # fmt: skip


def test_the_cost_of_a_pair() -> None:
    assert score_products(LuongAttention(16, "concat", heads=2, hidden=5)) == 5
    assert score_products(LuongAttention(16, "general", heads=2)) == 16
    assert score_products(LuongAttention(16, "dot", "local_m", heads=2)) == 16
