"""An induction LM whose weights are set by hand: a real `LlamaForCausalLM` that retrieves, with nothing trained.

Random toy models have no retrieval heads, so that broken policies pass on them. This one copies: a head of layer 0
writes the previous token beside each token, and *matching* heads further up look for a place whose previous token is
the current one, and predict what stands there. Everything it knows about the far past goes through those heads.

    model = induction_lm(matching=[(1, 0)])
    ids, answers = recall(8, length=256, answer=4)
    assert accuracy(model, ids, answers) == 1.0

The residual stream is `[token | previous token | prediction | 1]`, one-hot. Rotary pairs that turn fast carry position
(the previous-token heads), pairs that all but stand still carry content (the matching heads).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS, FILLER, KEYS, VALUES, VOCAB = 0, range(1, 16), range(16, 32), range(32, 48), 48
WIDTH, HEAD = 3 * VOCAB + 8, 64
TOKEN, PREVIOUS, PREDICTION, ONE = 0, VOCAB, 2 * VOCAB, 3 * VOCAB
#: Rotary base: pair 0 turns by one radian a token, pairs from 8 on by less than a millionth.
BASE, FAST, SLOW = 1e24, 8, 8
LOCAL_GAIN, MATCH_GAIN = 60.0, 30.0


def induction_lm(
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    matching: Sequence[tuple[int, int]] = ((1, 0),),
    silent: Sequence[tuple[int, int]] = (),
) -> LlamaForCausalLM:
    """The model, in evaluation mode.

    Args:
        layers, heads, kv_heads: its size; a head without another task looks at the previous token and writes nothing.
        matching: (layer, query head) of the heads that match, each in another group of key/value heads; layers >= 1.
        silent: those of them that attend to the match but write nothing.
    """
    model = blank_lm(layers, heads, kv_heads, WIDTH, PREDICTION, ONE, units=4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            # a stream of two (later: three) unit vectors comes out of the norm as it went in
            layer.input_layernorm.weight.fill_(((2 if index == 0 else 3) / WIDTH) ** 0.5)
            for head in range(heads):
                _look_back(layer.self_attn, head, heads // kv_heads)
        _write(model.model.layers[0].self_attn, 0, 0, PREVIOUS, gain=1.0)
        for index, head in matching:
            _match(model.model.layers[index].self_attn, head, heads // kv_heads)
            gain = 0.0 if (index, head) in silent else 1.0
            _write(model.model.layers[index].self_attn, head, head // (heads // kv_heads), PREDICTION, gain)
    return model


def blank_lm(
    layers: int, heads: int, kv_heads: int, width: int, prediction: int, one: int, units: int
) -> LlamaForCausalLM:
    """A decoder whose heads do nothing, with tokens at 0 of its stream and what it predicts at another place.

    Args:
        layers, heads, kv_heads, width: its size.
        prediction, one: the places of the prediction and of a constant 1 in the stream.
        units: the number of unit vectors in the last stream, which the final norm leaves as it is.
    """
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=HEAD, max_position_embeddings=8192, rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": BASE}, bos_token_id=BOS, eos_token_id=None,
        pad_token_id=BOS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, :VOCAB] = torch.eye(VOCAB)
        model.model.embed_tokens.weight[:, one] = 1.0
        model.lm_head.weight[:, prediction : prediction + VOCAB] = 20.0 * torch.eye(VOCAB)
        model.model.norm.weight.fill_((units / width) ** 0.5)
    return model


def _look_back(attention: torch.nn.Module, head: int, group: int) -> None:
    """Attend to the token one before: logits are a sum of cosines of (distance - 1)."""
    half, kv = HEAD // 2, head // group
    turn = BASE ** (-torch.arange(FAST) / half)
    attention.q_proj.weight[head * HEAD : head * HEAD + FAST, ONE] = LOCAL_GAIN
    attention.k_proj.weight[kv * HEAD : kv * HEAD + FAST, ONE] = turn.cos() * HEAD**0.5
    attention.k_proj.weight[kv * HEAD + half : kv * HEAD + half + FAST, ONE] = turn.sin() * HEAD**0.5


def _match(attention: torch.nn.Module, head: int, group: int) -> None:
    """Attend to where the previous token is the current one; the sink is the way out where there is no such place."""
    half, kv = HEAD // 2, head // group
    slow = torch.cat([torch.arange(SLOW, half), torch.arange(half + SLOW, HEAD)])[:VOCAB]
    attention.q_proj.weight[head * HEAD : (head + 1) * HEAD] = 0.0
    attention.k_proj.weight[kv * HEAD : (kv + 1) * HEAD] = 0.0
    for token, place in enumerate(slow.tolist()):
        attention.q_proj.weight[head * HEAD + place, TOKEN + token] = MATCH_GAIN
        attention.k_proj.weight[kv * HEAD + place, PREVIOUS + token] = HEAD**0.5
        attention.k_proj.weight[kv * HEAD + place, TOKEN + BOS] = 0.5 * HEAD**0.5


def _write(attention: torch.nn.Module, head: int, kv: int, where: int, gain: float) -> None:
    """Carry the attended token into a part of the stream; the sink token carries nothing."""
    for token in range(1, VOCAB):
        attention.v_proj.weight[kv * HEAD + token, TOKEN + token] = 1.0
        attention.o_proj.weight[where + token, head * HEAD + token] = gain


def recall(
    count: int, length: int, answer: int = 1, away: int = 0, distractors: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Prompts `(count, length)` that end in a key, and the `answer` values `(count, answer)` that stood behind it.

    Args:
        away: tokens at least between the values and the end of the prompt.
        distractors: other keys with other values in the same prompt.
    """
    draw = torch.Generator().manual_seed(seed)
    prompts, answers = [], []
    for _ in range(count):
        ids = torch.randint(FILLER.start, FILLER.stop, (length,), generator=draw)
        keys = KEYS.start + torch.randperm(len(KEYS), generator=draw)
        values = (VALUES.start + torch.randperm(len(VALUES), generator=draw)).split(answer)
        size = answer + 1
        slots = torch.randperm((length - 2 - away) // size, generator=draw)[: distractors + 1]
        for key, value, slot in zip(keys, values, slots.tolist(), strict=False):
            at = 1 + slot * size
            ids[at : at + size] = torch.cat([key[None], value])
        ids[0], ids[-1] = BOS, keys[0]
        prompts.append(ids)
        answers.append(values[0])
    return torch.stack(prompts), torch.stack(answers)


def accuracy(model: LlamaForCausalLM, ids: Tensor, answers: Tensor) -> float:
    """Share of the answers' tokens that greedy generation gives."""
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=answers.shape[1], do_sample=False, pad_token_id=BOS
        )
    return (out[:, ids.shape[1] :] == answers).double().mean().item()
