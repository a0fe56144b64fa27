"""The sequence-to-sequence decoders of the catalogue, for the contract.

Every `Seq2Seq` that is the object or a part of a row is here. `MonotonicLocationSeq2Seq` is none: it reads words, and
its encoder makes the memory; its `MonotonicLocationDecoder` is one. `VariationalAttention` is none: it is a layer of
attention with a word classifier, whose queries a decoder of the caller's makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from foveate.core.catalog import systems
from foveate.nn import LuongDecoder, PointerNetwork, VisualAttentionLSTM
from foveate.nn.base.seq2seq import Decoded, Seq2Seq

DIM, VOCAB, BATCH, PLACES, STEPS = 8, 4, 3, 5, 6

Make = Callable[[], Seq2Seq]


def _found() -> dict[str, type[Seq2Seq]]:
    """Return the decoders of the rows, by key; a second one of a row by key and name."""
    found: dict[str, type[Seq2Seq]] = {}
    for row in systems():
        for module, _, name in (target.partition(":") for target in (row.object, *row.parts)):
            here = module.startswith(("foveate.nn.", "foveate.models."))
            cls = getattr(import_module(module), name) if here else None
            if isinstance(cls, type) and issubclass(cls, Seq2Seq):
                found[row.key if row.key not in found else f"{row.key}-{name}"] = cls
    return found


SYSTEMS = _found()


def _spread(decoder: Seq2Seq, width: float = 0.8) -> Seq2Seq:
    for parameter in decoder.parameters():
        torch.nn.init.uniform_(parameter, -width, width)
    return decoder


#: Second ways through a decoder.
EXTRA: dict[str, Make] = {
    "luong_attention-at-once": lambda: _spread(LuongDecoder(DIM, VOCAB, "concat", input_feeding=False, layers=2)),
    "luong_attention-local": lambda: _spread(LuongDecoder(DIM, VOCAB, "dot", "local_m", window=4)),
    "luong_attention-local-at-once": lambda: _spread(
        LuongDecoder(DIM, VOCAB, "general", "local_m", window=4, input_feeding=False)
    ),
    "pointer_network-stop": lambda: _spread(PointerNetwork(DIM, 6), 1.5),
    "show_attend_tell-hard": lambda: _spread(VisualAttentionLSTM(DIM, 6, VOCAB, "hard")),
    "show_attend_tell-release": lambda: _spread(VisualAttentionLSTM(DIM, 6, VOCAB, gate=False, variant="release")),
}

KEYS = [*SYSTEMS, *EXTRA]

#: Parameters that a call gives no gradient, since the choice of one location is a step function: a sampling objective
#: trains them (`HardAttentionLoss`).
TRAINED_ELSEWHERE = {"show_attend_tell-hard": {"v", "w_a.weight", "w_a.bias", "w_h.weight"}}


def example(key: str) -> Seq2Seq:
    """Make the decoder's example with the same parameters each time, all of which have an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = EXTRA[key]() if key in EXTRA else SYSTEMS[key].example(DIM, VOCAB)
    return made.double().eval()


def memories(seed: int = 0, batch: int = BATCH) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, PLACES, DIM, generator=random, dtype=torch.float64)


def drawable(decoder: Seq2Seq, memory: Tensor) -> int:
    """Return the number of tokens that tests draw from: all but a stop slot behind the memory."""
    return min(decoder.vocab_of(memory), memory.shape[1])


def given(decoder: Seq2Seq, memory: Tensor, seed: int = 1, steps: int = STEPS) -> Tensor:
    """Return tokens that begin with a start token: the decoder's own, where it has one."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(drawable(decoder, memory), (len(memory), steps), generator=random)
    if decoder.has_start:
        tokens[:, 0] = -1
    return tokens


def first(decoder: Seq2Seq, memory: Tensor) -> Tensor | None:
    return None if decoder.has_start else given(decoder, memory)[:, 0]


def hiding(*places: int) -> Tensor:
    """Return a mask that hides these places of the memory, in the first two examples."""
    mask = torch.ones(BATCH, PLACES, dtype=torch.bool)
    mask[:2, list(places)] = False
    return mask


def stepwise(decoder: Seq2Seq, memory: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Decoded:
    """Run a decoder by its hooks, one token after the other."""
    mask = torch.ones(memory.shape[:2], dtype=torch.bool) if mask is None else mask
    source = decoder.encode(memory.masked_fill(~mask[..., None], 0.0), mask)
    state, logits, weights = decoder.begin(source, None), [], []
    for token in tokens.unbind(1):
        made = decoder.step(token, state, source)
        logits.append(made.logits)
        weights.append(made.weights)
        state = made.state
    return Decoded(torch.stack(logits, 1), torch.stack(weights, 1))


def likelihood(decoder: Seq2Seq, memory: Tensor, begun: Tensor, made: Tensor) -> Tensor:
    """Return the log-probability of made tokens, under teacher forcing; -1 behind the end adds nothing."""
    follow = torch.cat([begun[:, None], made[:, :-1].clamp(min=0)], 1)
    log_probs = decoder(memory, follow).logits.log_softmax(-1)
    each = log_probs.gather(-1, made.clamp(min=0)[..., None])[..., 0]
    return torch.where(made < 0, 0.0, each).sum(-1)


def every_sequence(vocab: int, steps: int, stop: int | None = None) -> Tensor:
    """Return all sequences of so many tokens, with -1 behind a stop token, each once."""
    rows = itertools.product(range(vocab), repeat=steps)
    if stop is None:
        return torch.tensor(list(rows))
    ended = {row[: row.index(stop) + 1] + (-1,) * (steps - row.index(stop) - 1) if stop in row else row for row in rows}
    return torch.tensor(sorted(ended))


def decoders(where: Callable[[Seq2Seq], bool] = lambda decoder: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("key", [key for key in KEYS if where(example(key))])
