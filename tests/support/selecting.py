"""A LM with weights set by hand for two tasks that share a copying head and differ in the head that selects.

A prompt has keys, each with a value behind it, and ends in two of the keys and the name of a task: task A asks for the
value of the later of the two keys, task B for that of the earlier one. In layer 0 head 0 writes beside each token the
one before it; head 1 selects the key for task A, head 2 for task B; head 3 does nothing. In layer 1 head 0 copies what
stands behind the selected key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.support.constructed import BASE, BOS, FAST, HEAD, KEYS, LOCAL_GAIN, SLOW, VALUES, VOCAB, blank_lm

TASK_A, TASK_B, FILLER = 1, 2, range(3, 16)
TOKEN, PREVIOUS, TARGET, PREDICTION, ONE = 0, VOCAB, 2 * VOCAB, 3 * VOCAB, 4 * VOCAB
WIDTH, HALF = 4 * VOCAB + 8, HEAD // 2
PREVIOUS_HEAD, SELECT_A, SELECT_B, COPY = (0, 0), (0, 1), (0, 2), (1, 0)


def selecting_lm(selects_b: bool = True) -> LlamaForCausalLM:
    """The model, in evaluation mode; with `selects_b=False` head (0, 2) looks at both keys in task B."""
    model = blank_lm(2, 4, 4, WIDTH, PREDICTION, ONE, units=5)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_((2 / WIDTH) ** 0.5)
        model.model.layers[1].input_layernorm.weight.fill_((4 / WIDTH) ** 0.5)
        first, second = (layer.self_attn for layer in model.model.layers)
        look_back(first, 0, ONE, 1)
        look_back(first, 1, TOKEN + TASK_A, 1)
        look_back(first, 2, TOKEN + TASK_B, 2 if selects_b else None)
        for head, where in ((0, PREVIOUS), (1, TARGET), (2, TARGET)):
            write(first, head, where)
        match(second, 0)
        write(second, 0, PREDICTION)
        for attention in (first, second):
            rest(attention)
    return model


def look_back(attention: nn.Module, head: int, when: int, distance: int | None) -> None:
    """Attend some tokens back where the stream has `when`; None is one and two back alike."""
    turn, at = BASE ** (-torch.arange(FAST) / HALF), head * HEAD
    attention.q_proj.weight[at : at + FAST, when] = LOCAL_GAIN
    for back in (1, 2) if distance is None else (distance,):
        attention.k_proj.weight[at : at + FAST, ONE] += (back * turn).cos() * HEAD**0.5
        attention.k_proj.weight[at + HALF : at + HALF + FAST, ONE] += (back * turn).sin() * HEAD**0.5


def rest(attention: nn.Module) -> None:
    """Attend to the first token where nothing else is matched."""
    for head in range(4):
        at = head * HEAD + HEAD - 1
        attention.q_proj.weight[at, ONE] = 25.0
        attention.k_proj.weight[at, TOKEN + BOS] = HEAD**0.5


def match(attention: nn.Module, head: int) -> None:
    """Attend to the value whose token before is the target."""
    slow = torch.cat([torch.arange(SLOW, HALF), torch.arange(HALF + SLOW, HEAD)])[:VOCAB].tolist()
    for token in KEYS:
        attention.q_proj.weight[head * HEAD + slow[token], TARGET + token] = 60.0
        attention.k_proj.weight[head * HEAD + slow[token], PREVIOUS + token] = HEAD**0.5
    attention.q_proj.weight[head * HEAD + slow[0], ONE] = 10.0
    attention.k_proj.weight[head * HEAD + slow[0], TOKEN + VALUES.start : TOKEN + VALUES.stop] = HEAD**0.5


def write(attention: nn.Module, head: int, where: int) -> None:
    """Carry the attended token into a part of the stream; the first token carries nothing."""
    for token in range(1, VOCAB):
        attention.v_proj.weight[head * HEAD + token, TOKEN + token] = 1.0
        attention.o_proj.weight[where + token, head * HEAD + token] = 1.0


def select(task: int, count: int, length: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts `(count, length)` and their counterfactuals with the two last keys exchanged; answers and distractors."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(FILLER.start, FILLER.stop, (count, length), generator=draw)
    answers = torch.empty(count, 2, dtype=torch.long)
    for row, ids in enumerate(clean):
        keys = KEYS.start + torch.randperm(len(KEYS), generator=draw)[:2]
        values = VALUES.start + torch.randperm(len(VALUES), generator=draw)[:2]
        slots = 1 + 2 * torch.randperm((length - 5) // 2, generator=draw)[:2]
        for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
            ids[slot : slot + 2] = torch.stack([key, value])
        ids[0], ids[-3], ids[-2], ids[-1] = BOS, keys[0], keys[1], task
        answers[row] = values.flip(0) if task == TASK_A else values
    corrupt = clean.clone()
    corrupt[:, [-3, -2]] = clean[:, [-2, -3]]
    return clean, corrupt, answers
