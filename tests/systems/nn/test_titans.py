"""Titans' layers: each combination of memory and attention by hand, its limits, and recall beyond the window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks
from foveate.core.errors import OptionError
from foveate.nn import Alibi, MultiHeadAttention, Rotary
from foveate.nn.base.layer import Layer
from foveate.nn.sequence.neural_memory import NeuralMemory, TitansLayer
from foveate.nn.sequence.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from foveate.ops.sparse.sliding_window import SlidingWindow
from tests.systems.ops.recall import VOCAB, accuracy, train
from tests.systems.ops.recall_layers import Stack

BATCH, LENGTH, DIM, HEADS, P = 2, 11, 8, 2, 3


def tokens(n: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(cls: type[Layer], **options: Any) -> Any:
    """Make a layer with random parameters, so that each has an effect."""
    torch.manual_seed(1)
    persistent = {} if cls is NeuralMemory else {"persistent": P}
    layer = cls(DIM, HEADS, **{"chunk": 2, "conv": 3, **persistent, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


def zero_memory(layer: TitansLayer) -> TitansLayer:
    """Make the memory of a layer answer zeros and learn nothing."""
    nn.init.zeros_(layer.memory.op.first[-1])
    nn.init.constant_(layer.memory.rates["theta"].bias, -math.inf)
    return layer


# -- the memory --------------------------------------------------------------------------------------------------------


def projected(memory: NeuralMemory, part: int, x: Tensor) -> Tensor:
    """Compute queries, keys or values by hand, with one sum over the past for each token."""
    y = (memory.q, memory.k, memory.v)[part].weight @ x.mT
    if memory.convs:
        conv = memory.convs[part].conv
        kernel = conv.weight.shape[-1]
        taps = [
            conv.weight[:, 0, kernel - 1 - lag, None] * F.pad(y, (lag, 0))[..., : x.shape[1]] for lag in range(kernel)
        ]
        y = sum(taps) + conv.bias[:, None]
    y = y * torch.sigmoid(y)
    return y.unflatten(1, (HEADS, -1)).mT


def output_of(memory: NeuralMemory, out: Tensor, x: Tensor) -> Tensor:
    """Compute the output by hand from answers: a norm per head, a gate from the token, a projection."""
    scale = (out.square().mean(-1, keepdim=True) + torch.finfo(out.dtype).eps).rsqrt()
    heads = (out * scale * memory.norm.weight).transpose(1, 2).flatten(2)
    return (heads * torch.sigmoid(x @ memory.gate.weight.mT + memory.gate.bias)) @ memory.out.weight.mT


def rates(memory: NeuralMemory, x: Tensor) -> dict[str, Tensor]:
    return {n: torch.sigmoid(x @ rate.weight.mT + rate.bias).mT for n, rate in memory.rates.items()}


@pytest.mark.parametrize("options", [{}, {"conv": 0}, {"depth": 1}])
def test_the_memory_is_the_operator_between_projections(options):
    memory, x = made(NeuralMemory, **options), tokens()
    q, k, v = (projected(memory, part, x) for part in range(3))
    out = memory.op(q, k, v, causal=True, **rates(memory, x))
    torch.testing.assert_close(memory(x, causal=True), output_of(memory, out, x))


def test_hidden_tokens_are_neither_read_nor_written():
    memory, x = made(NeuralMemory, conv=0, chunk=1), tokens()
    seen = torch.ones(1, LENGTH, dtype=torch.bool)
    seen[:, [0, 4, 5]] = False
    out = memory(x.masked_fill(~seen[..., None], math.nan), mask=seen[:, None, None], causal=True)
    torch.testing.assert_close(out[:, seen[0]], memory(x[:, seen[0]], causal=True))
    with_conv = made(NeuralMemory)  # hidden tokens leave a gap of zeros there
    out = with_conv(x.masked_fill(~seen[..., None], math.nan), mask=seen[:, None, None], causal=True)
    assert out.isfinite().all()


def test_recalling_is_reading_without_writing():
    memory, x = made(NeuralMemory), tokens()
    _, state = memory.prefill(x[:, :6])
    past = memory.no_past(BATCH, x.dtype, x.device)
    out, past = memory.recall(x[:, :6], state, past)
    q = projected(memory, 0, x[:, :6])
    torch.testing.assert_close(out, output_of(memory, memory.op.recall(q, state.learner), x[:, :6]))
    more, _ = memory.recall(x[:, 6:], state, past)  # the convolution of queries continues
    q = projected(memory, 0, x)[:, :, 6:]
    torch.testing.assert_close(more, output_of(memory, memory.op.recall(q, state.learner), x[:, 6:]))


def test_initial_values():
    memory = NeuralMemory(DIM, HEADS, depth=3, expansion=5, chunk=7)
    assert [tuple(m.shape) for m in memory.op.first] == [(2, 20, 4), (2, 20, 20), (2, 4, 20)]
    assert (memory.op.chunk, memory.op.reads) == (7, "token")
    assert NeuralMemory(DIM, HEADS, reads="chunk").op.reads == "chunk"
    assert MemoryAsGate(DIM, HEADS, reads="chunk").memory.op.reads == "chunk"
    assert [conv.kernel for conv in memory.convs] == [4, 4, 4]
    for name, rate in memory.rates.items():
        assert (rate.bias == memory.op.capabilities.gates[name].bias).all()


# -- beside attention --------------------------------------------------------------------------------------------------


def attended(attention: MultiHeadAttention, x: Tensor, visible: Tensor, at: Tensor | None = None) -> Tensor:
    """Compute softmax attention over tokens at these positions by the whole matrix."""
    q, k, v = (
        linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (attention.q, attention.k, attention.v)
    )
    if attention.position is not None:
        at = torch.arange(x.shape[1]) if at is None else at
        q, k = attention.position.rotate(q, at), attention.position.rotate(k, at)
    logits = (q @ k.mT / math.sqrt(DIM / HEADS)).masked_fill(~visible, -math.inf)
    return attention.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() * norm.weight


def in_window(n: int, window: int) -> Tensor:
    """Return the mask of figure 3b: the window and the persistent tokens."""
    query, key = torch.arange(n)[:, None], torch.arange(n)
    return (key <= query) & ((key < P) | (query - key < window))


@pytest.mark.parametrize("position", [None, Rotary()])
@pytest.mark.parametrize("cls", [MemoryAsGate, MemoryAsLayer])
def test_gate_and_layer_as_the_paper_writes_them(cls, position):
    layer, x = made(cls, window=4, position=position), tokens()
    whole = torch.cat([layer.persistent.expand(BATCH, -1, -1), x], 1)
    visible, recalled = in_window(P + LENGTH, 4), layer.memory(whole, causal=True)
    if cls is MemoryAsGate:
        y = attended(layer.attention, whole, visible)
        out = normed(layer.gate.norm, y) * torch.sigmoid(normed(layer.gate.memory_norm, recalled))
    else:
        out = attended(layer.attention, normed(layer.norm, whole + recalled), visible)
        bare = made(cls, window=4, position=position, residual=False)
        expected = attended(bare.attention, normed(bare.norm, recalled), visible)[:, P:]
        torch.testing.assert_close(bare(x, causal=True), expected)
    torch.testing.assert_close(layer(x, causal=True), out[:, P:])


@pytest.mark.parametrize("cls", [MemoryAsGate, MemoryAsLayer])
def test_gate_and_layer_ignore_hidden_tokens(cls):
    layer, x = made(cls, window=4, conv=0, chunk=1), tokens()
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    seen[0, [0, 5]] = seen[1, [2, 3, 9]] = False
    whole = torch.cat([layer.persistent.expand(BATCH, -1, -1), x], 1)
    real = F.pad(seen, (P, 0), value=True)
    visible = in_window(P + LENGTH, 4) & real[:, None, None]
    recalled = layer.memory(whole, mask=real[:, None, None], causal=True)
    y = attended(layer.attention, normed(layer.norm, whole + recalled) if cls is MemoryAsLayer else whole, visible)
    expected = layer.gate(y, recalled) if cls is MemoryAsGate else y
    out = layer(x.masked_fill(~seen[..., None], math.nan), mask=seen[:, None, None], causal=True)
    torch.testing.assert_close(out[seen], expected[:, P:][seen])


def context(layer: MemoryAsContext, x: Tensor) -> Tensor:
    """Compute it token by token: a context of recalled answers and tokens of the segment so far."""
    memory, segment, out = layer.memory, layer.segment, []
    prefix = layer.persistent.expand(BATCH, -1, -1)
    old, new = memory.init_state(BATCH, dtype=x.dtype), memory.init_state(BATCH, dtype=x.dtype)
    q = projected(memory, 0, x)
    for t in range(x.shape[1]):
        start = t - t % segment
        if t == start:
            old = new
        here = slice(start, t + 1)
        recalled = output_of(memory, memory.op.recall(q[:, :, here], old.learner), x[:, here])
        everything = torch.cat([prefix, recalled, x[:, here]], 1)
        place = torch.arange(t + 1 - start)
        at = torch.cat([torch.arange(P), P + place, P + segment + place])
        y = attended(layer.attention, everything, torch.ones(1, dtype=torch.bool), at)[:, -1:]
        learned, new = memory.step(y, new)
        out.append(normed(layer.gate.norm, y) * torch.sigmoid(normed(layer.gate.memory_norm, learned)))
    return torch.cat(out, 1)


@pytest.mark.parametrize("position", [None, Rotary()])
@pytest.mark.parametrize("options", [{"segment": 4}, {"segment": 3}, {"segment": 4, "conv": 0}, {"segment": 40}])
def test_context_token_by_token(options, position):
    layer, x = made(MemoryAsContext, position=position, **options), tokens()
    torch.testing.assert_close(layer(x, causal=True), context(layer, x))


@pytest.mark.parametrize("segment", [4, 40])
def test_a_context_ignores_hidden_tokens(segment):
    layer, x = made(MemoryAsContext, segment=segment, conv=0, chunk=1), tokens()
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    seen[:, -4:] = False
    out = layer(x.masked_fill(~seen[..., None], math.nan), mask=seen[:, None, None], causal=True)
    torch.testing.assert_close(out[:, :-4], layer(x[:, :-4], causal=True))
    with_conv = made(MemoryAsContext, segment=segment)(
        x.masked_fill(~seen.flip(1)[..., None], math.nan), mask=seen.flip(1)[:, None, None], causal=True
    )
    assert with_conv[:, 4:].isfinite().all()
    hole = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    hole[:, 1] = False  # of one segment, a token less: with the memory read before, the same as without that token
    out = layer(x, mask=hole[:, None, None], causal=True)
    first = torch.cat([x[:, :1], x[:, 2:4]], 1)
    torch.testing.assert_close(out[:, [0, 2, 3]], layer(first, causal=True))


# -- limits ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_gate_that_is_neither_open_nor_closed_leaves_attention():
    layer, x = made(MemoryAsGate, window=LENGTH, persistent=0), tokens()
    layer.gate.memory_norm.weight.zero_()
    plain = MultiHeadAttention(DIM, HEADS).double()
    plain.load_state_dict(layer.attention.state_dict())
    torch.testing.assert_close(layer(x, causal=True), 0.5 * normed(layer.gate.norm, plain(x, causal=True)))


@torch.no_grad()
def test_a_layer_over_an_empty_memory_is_attention():
    layer, x = zero_memory(made(MemoryAsLayer, window=LENGTH + P)), tokens()
    plain = MultiHeadAttention(DIM, HEADS).double()
    plain.load_state_dict(layer.attention.state_dict())
    whole = normed(layer.norm, torch.cat([layer.persistent.expand(BATCH, -1, -1), x], 1))
    torch.testing.assert_close(layer(x, causal=True), plain(whole, causal=True)[:, P:])


@torch.no_grad()
def test_one_segment_over_an_empty_memory_is_attention_with_answers_of_zero():
    layer, x = zero_memory(made(MemoryAsContext, segment=LENGTH)), tokens()
    whole = torch.cat([layer.persistent.expand(BATCH, -1, -1), torch.zeros_like(x), x], 1)
    earlier = masks.causal(LENGTH, LENGTH)
    visible = torch.zeros(P + 2 * LENGTH, P + 2 * LENGTH, dtype=torch.bool)
    visible[:, :P] = True
    visible[P + LENGTH :, P:] = torch.cat([earlier, earlier], 1)
    y = attended(layer.attention, whole, visible)[:, P + LENGTH :]
    torch.testing.assert_close(layer(x, causal=True), 0.5 * normed(layer.gate.norm, y))


REACH = {MemoryAsGate: {"window": 3}, MemoryAsLayer: {"window": 3}, MemoryAsContext: {"segment": 3}}


@pytest.mark.parametrize("cls", REACH)
def test_the_memory_alone_reaches_beyond_the_window(cls):
    def reach(layer: TitansLayer) -> Tensor:
        """Return the influence of each token on the last output."""
        x = tokens(12).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x, causal=True)[:, -1].square().sum(), x)
        return grad.abs().sum((0, 2))

    layer = made(cls, conv=0, **REACH[cls])
    assert (reach(layer) > 1e-9).all()
    alone = reach(zero_memory(layer))
    assert not alone[:9].any()
    assert (alone[9:] > 1e-9).all()


@pytest.mark.parametrize("cls", [NeuralMemory, *REACH])
@pytest.mark.parametrize("reads", ["token", "chunk"])
@torch.no_grad()
def test_a_stream_is_the_causal_call_and_its_state_does_not_grow(cls, reads):
    options = {} if cls is NeuralMemory else {"position": Rotary(), **REACH[cls]}
    layer, x = made(cls, reads=reads, **options), tokens(25)
    expected = layer(x, causal=True)

    def size(state: object) -> int:
        if isinstance(state, Tensor):
            return state.numel()
        parts = state if isinstance(state, tuple) else vars(state).values() if hasattr(state, "__dict__") else ()
        return sum(map(size, parts))

    for prompt in (0, 1, 7, 9):
        out, state = layer.prefill(x[:, :prompt]) if prompt else (x[:, :0], layer.init_state(BATCH, dtype=x.dtype))
        parts, sizes = [out], []
        for t in range(prompt, 25):
            y, state = layer.step(x[:, t : t + 1], state)
            parts.append(y)
            sizes.append(size(state))
        torch.testing.assert_close(torch.cat(parts, 1), expected)
        assert sizes[-1] == sizes[-7]  # a few whole segments earlier
        assert sizes[-1] > 3 * BATCH * HEADS * 4 * 4


@pytest.mark.parametrize("cls", REACH)
def test_no_persistent_tokens(cls):
    layer, x = made(cls, persistent=0, **REACH[cls]), tokens()
    state, out = layer.init_state(BATCH, dtype=x.dtype), []
    for t in range(LENGTH):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), layer(x, causal=True))


def test_defaults_are_declared():
    gate, ctx = MemoryAsGate(DIM), MemoryAsContext(DIM)
    assert (gate.attention.op.window, ctx.segment) == (128, 64)
    assert gate.persistent.shape == ctx.persistent.shape == (16, DIM)
    assert gate.attention.op.sinks == 16
    assert MemoryAsLayer(DIM).residual
    assert all(layer.capabilities.growth == "N" for layer in (gate, ctx, NeuralMemory(DIM)))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (NeuralMemory, {"heads": 3}, "heads=3 must divide dim=8"),
        (NeuralMemory, {"conv": -1}, "conv=-1"),
        (NeuralMemory, {"depth": 0}, "depth=0"),
        (MemoryAsGate, {"window": 0}, "window=0"),
        (MemoryAsGate, {"persistent": -1}, "persistent=-1"),
        (MemoryAsLayer, {"chunk": 0}, "chunk=0"),
        (MemoryAsLayer, {"position": Alibi(1)}, "position=Alibi adds a bias"),
        (MemoryAsContext, {"segment": 0}, "segment=0"),
        (MemoryAsContext, {"persistent": 1.5}, "persistent=1.5"),
        (MemoryAsContext, {"position": Alibi(1)}, "position=Alibi adds a bias"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(OptionError, match=message):
        cls(DIM, **options)


# -- claims ------------------------------------------------------------------------------------------------------------


class WordRecall:
    """A task: the first token is a word, noise follows, and the last positions ask for the word."""

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens `(size, 20)`, and the target of each position or -100."""
        word = torch.randint(VOCAB // 2, VOCAB, (size, 1), generator=generator)
        noise = torch.randint(1, VOCAB // 2, (size, 13), generator=generator)
        found = torch.cat([word, noise, torch.zeros(size, 6, dtype=torch.long)], 1)
        return found, torch.cat([torch.full((size, 14), -100), word.expand(-1, 6)], 1)


def share_recalled(layer: Layer) -> float:
    """Return the share of words that a trained network of one layer predicts."""
    model = Stack([layer])
    for name, parameter in model.named_parameters():
        if name.endswith("rates.theta.bias"):
            nn.init.zeros_(parameter)  # longer steps than the default, since the training is short
    return accuracy(train(model, WordRecall(), 200, lr=1e-2), WordRecall())


@pytest.fixture(scope="module")
def by_the_window() -> float:
    torch.manual_seed(0)
    return share_recalled(MultiHeadAttention(32, 1, op=SlidingWindow(4, 0), conv=4, position=Rotary()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options"),
    [(MemoryAsGate, {"window": 4, "chunk": 8}), (MemoryAsLayer, {"window": 4, "chunk": 8}),
     (MemoryAsContext, {"segment": 6, "chunk": 6})],
)  # fmt: skip
def test_it_recalls_tokens_beyond_the_window(claim, by_the_window, cls, options):
    torch.manual_seed(0)
    ours = share_recalled(cls(32, 1, persistent=2, position=Rotary(), depth=1, **options))
    claim(
        f"{cls.__name__}, one layer that sees 4 to 6 tokens, recalls a word from 14 or more tokens ago: share recalled",
        ours=ours, baseline=by_the_window, better="higher", margin=0.5,
        baseline_name="the window alone, with a short convolution", seed=0,
    )  # fmt: skip
