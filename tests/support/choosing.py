"""A LM with weights set by hand that answers multiple-choice questions, and whose heads are of known kinds.

A prompt lists letters, each with a content behind it, and ends in "?" and one of the contents; its letter is the
answer. Layer 0 writes beside each token the one before it. In layer 1 head 0 gathers: from the last token it finds the
earlier place of the content, and writes which letter stood there. In layer 2 head 0 is the correct-letter head: it
attends from the last token to that letter, and predicts it. Helpers are heads 1 to 3 of layer 2: one for the letter B
alone, one that raises all letters, and one that amplifies what the gatherer wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from foveate.lens import LetterPrompts
from tests.support.constructed import BASE, BOS, FAST, HEAD, LOCAL_GAIN, SLOW, VOCAB, blank_lm

ASKS, LETTERS, OTHER_LETTERS, CONTENTS = 1, range(2, 6), range(6, 16), range(16, 47)
TOKEN, PREVIOUS, PREDICTION, LETTER, ONE = 0, VOCAB, 2 * VOCAB, 3 * VOCAB, 3 * VOCAB + 4
WIDTH, HALF, UNIT = 3 * VOCAB + 8, HEAD // 2, HEAD**0.5
GATHERER, CORRECT, SINGLE, CONSTANT, AMPLIFIER = (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)
SLOW_PLACES = torch.cat([torch.arange(SLOW, HALF), torch.arange(HALF + SLOW, HEAD)])[:VOCAB].tolist()


def choosing_lm(helpers: bool = True) -> LlamaForCausalLM:
    """The model, in evaluation mode."""
    model = blank_lm(3, 4, 4, WIDTH, PREDICTION, ONE, units=5)
    with torch.no_grad():
        for layer, units in zip(model.model.layers, (2, 3, 4), strict=True):
            layer.input_layernorm.weight.fill_((units / WIDTH) ** 0.5)
            for head in range(4):  # the first token, where nothing else is matched
                key(layer.self_attn, head, 47, TOKEN + BOS)
                query(layer.self_attn, head, 47, ONE, 25.0)
        first, second, third = (layer.self_attn for layer in model.model.layers)
        look_back(first)
        carry(first, 0, {TOKEN + token: PREVIOUS + token for token in range(1, VOCAB)})
        gather(second)
        carry(second, 0, {PREVIOUS + letter: LETTER + at for at, letter in enumerate(LETTERS)})
        read_letters(third, helpers)
    return model


def query(attention: nn.Module, head: int, place: int, channel: int, gain: float) -> None:
    attention.q_proj.weight[head * HEAD + SLOW_PLACES[place], channel] = gain


def key(attention: nn.Module, head: int, place: int, channel: int) -> None:
    attention.k_proj.weight[head * HEAD + SLOW_PLACES[place], channel] = UNIT


def carry(attention: nn.Module, head: int, channels: dict[int, int], gain: float = 1.0) -> None:
    """Move channels of the attended token into channels of the reading one."""
    for number, (origin, target) in enumerate(channels.items()):
        attention.v_proj.weight[head * HEAD + number, origin] = 1.0
        attention.o_proj.weight[target, head * HEAD + number] = gain


def look_back(attention: nn.Module) -> None:
    """Attend to the token before."""
    turn = BASE ** (-torch.arange(FAST) / HALF)
    attention.q_proj.weight[:FAST, ONE] = LOCAL_GAIN
    attention.k_proj.weight[:FAST, ONE] = turn.cos() * UNIT
    attention.k_proj.weight[HALF : HALF + FAST, ONE] = turn.sin() * UNIT


def gather(attention: nn.Module) -> None:
    """Attend to the same content behind a letter."""
    for content in CONTENTS:
        query(attention, 0, content, TOKEN + content, 30.0)
        key(attention, 0, content, TOKEN + content)
    query(attention, 0, 1, ONE, 20.0)
    for letter in LETTERS:
        key(attention, 0, 1, PREVIOUS + letter)


def read_letters(attention: nn.Module, helpers: bool) -> None:
    predict = {TOKEN + letter: PREDICTION + letter for letter in LETTERS}
    for at, letter in enumerate(LETTERS):
        query(attention, 0, letter, LETTER + at, 60.0)
        key(attention, 0, letter, TOKEN + letter)
    carry(attention, 0, predict)
    if not helpers:
        return
    query(attention, 1, LETTERS[1], LETTER + 1, 60.0)
    key(attention, 1, LETTERS[1], TOKEN + LETTERS[1])
    carry(attention, 1, predict, 0.4)
    query(attention, 2, 1, ONE, 50.0)
    for letter in LETTERS:
        key(attention, 2, 1, TOKEN + letter)
    carry(attention, 2, predict, 0.8)
    query(attention, 3, 1, ONE, 60.0)
    query(attention, 3, 2, ONE, 30.0)
    key(attention, 3, 2, PREVIOUS + ASKS)
    for at in range(4):
        key(attention, 3, 1, LETTER + at)
    carry(attention, 3, {LETTER + at: PREDICTION + letter for at, letter in enumerate(LETTERS)}, 0.4)


def choices(count: int, seed: int = 0, letters: str = "usual") -> LetterPrompts:
    """Prompts; `letters` are the "usual" four in order, these "shuffled", or "random" ones that the model ignores."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 12), ASKS)
    correct = torch.arange(count) % 4
    for row in range(count):
        contents = CONTENTS.start + torch.randperm(len(CONTENTS), generator=draw)[:4]
        named = torch.tensor(LETTERS)
        if letters == "shuffled":
            named = named[torch.randperm(4, generator=draw)]
        elif letters == "random":
            named = OTHER_LETTERS.start + torch.randperm(len(OTHER_LETTERS), generator=draw)[:4]
        ids[row, 0], ids[row, -1] = BOS, contents[correct[row]]
        ids[row, 2:10] = torch.stack([named, contents], 1).flatten()
    places = torch.arange(2, 10, 2).expand(count, -1)
    return LetterPrompts(ids, places, correct, places + 1)


def accuracy(model: LlamaForCausalLM, prompts: LetterPrompts) -> float:
    """Share of the prompts at which the correct letter is predicted."""
    with torch.no_grad():
        found = model(prompts.ids).logits[:, -1].argmax(-1)
    right: Tensor = prompts.letters.gather(1, prompts.correct[:, None])[:, 0]
    return float((found == right).double().mean())
