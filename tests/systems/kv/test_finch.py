"""Finch: the question's attention by hand, keys without gaps, and what a question is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Context, apply
from foveate.kv import Finch, Renumbered
from foveate.kv.finch import gaps
from tests.conftest import ClaimFixture
from tests.support.constructed import accuracy, induction_lm, recall
from tests.support.host_models import model, tokens
from tests.systems.kv.test_score_policies import best, kept, seen

N, ASKED = 40, 6


def held(context: Context, layer: int = 0) -> list[list[int]]:
    found = context.cache.layers[layer]
    positions = found.positions if hasattr(found, "positions") else found.store.padded("positions")
    return [sorted(p for p in head.tolist() if p >= 0) for head in positions[0]]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_the_question_chooses(normalised: bool, together: bool) -> None:
    """By the sum over its tokens, each times the number of tokens that it sees; it is not kept itself."""
    text, question = tokens(1, N), tokens(1, ASKED, seed=3)
    _, weights = seen(model("llama"), torch.cat([text, question], 1))
    rows = weights[0, :, :, -ASKED:, :N]
    if normalised:
        rows = rows * torch.arange(N + 1, N + ASKED + 1)[:, None]
    score = rows.sum((1, 2))
    score = score.sum(0, keepdim=True).expand(2, -1) if together else score
    policy = Finch(share=0.3, normalised=normalised, together=together, sink=1)
    context = Context(model("llama"), policy).read(text, question=question)
    assert held(context) == best(score, 12, [0])
    assert (held(context)[0] == held(context)[1]) == together


def test_without_a_question_the_end_of_the_prompt_is_one_and_stays() -> None:
    ids = tokens(1, N)
    _, weights = seen(model("llama"), ids)
    score = (weights[0, :, :, -ASKED:] * torch.arange(N - ASKED + 1, N + 1)[:, None]).sum((0, 1, 2))
    made = kept(model("llama"), ids, Finch(share=0.5, recent=ASKED))[0]
    assert made == best(score.expand(2, -1), 20, range(N - ASKED, N))


def one_layer(**options: Any) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=512, initializer_range=0.3, num_key_value_heads=2, head_dim=16, **options,
    )  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("chunk", [None, 17])
@torch.no_grad()
def test_what_stays_stands_without_gaps(chunk: int | None) -> None:
    """Keys of one layer depend on their own token only: the model reads the kept tokens and the question alone."""
    lm, text, question = one_layer(), tokens(1, 60), tokens(1, 5, seed=1)
    context = Context(lm, Finch(share=0.25), chunk=chunk).read(text, question=question)
    (left, other) = held(context)
    assert left == other and len(left) == 15
    expected = lm(torch.cat([text[:, left], question], 1)).logits[:, -5:]
    with apply(lm, Finch(share=0.25), evict="after prompt"):
        got = lm(question, past_key_values=context.cache).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_is_the_choice_and_renumbered_together() -> None:
    """For one piece; in later ones, `Renumbered` does not tell the choice where keys stand."""
    llama, text, question, made = model("llama"), tokens(1, 60), tokens(1, 5, seed=1), []
    for methods in ((Finch(0.25),), (Finch(0.25, renumbered=False), Renumbered()), (Finch(0.25, renumbered=False),)):
        context = Context(llama, *methods).read(text, question=question)
        with apply(llama, *methods, evict="after prompt"):
            made.append(llama(question, past_key_values=context.cache).logits)
    torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=1e-4)
    assert (made[0] - made[2]).abs().max() > 1e-2


def test_gaps_are_the_dropped_tokens_behind() -> None:
    assert gaps(torch.tensor([[[0, 4, 7, -1]]]), torch.tensor([[[-1, 2, 5, 6, -1]]])).tolist() == [[[3, 2, 0, 0]]]


def test_a_text_is_kept_for_its_question(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, answers = recall(16, length=96, distractors=5, away=20)
    found: dict[bool, float] = {}
    assert accuracy(lm, ids, answers) == 1.0
    for aware in (True, False):
        right = 0
        for row, answer in zip(ids, answers, strict=True):
            context = Context(lm, Finch(share=0.1, sink=1, recent=4), chunk=32)
            context.read(row[None, :-1], question=row[None, -1:] if aware else None)
            right += int(context.generate(row[None, -1:], max_new_tokens=1)[0, 0] == answer[0])
        found[aware] = right / len(ids)
    claim(
        "a text that is compressed chunk by chunk for its question answers it: share of answers found",
        ours=found[True], baseline=found[False], better="higher", margin=0.5,
        baseline_name="the end of each chunk in place of the question", seed=0,
    )  # fmt: skip


def test_models_whose_keys_do_not_rotate_are_refused_unless_gaps_stay() -> None:
    gpt = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModel, match="do not rotate"), apply(gpt, Finch()):
        pass
    with torch.no_grad(), apply(gpt, Finch(0.5, recent=2, renumbered=False)) as run:
        gpt(tokens(1, 20))
    assert run.stats.kept < 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recent": 0}, "recent=0"),
        ({"normalised": 1}, "normalised=1"),
        ({"together": "x"}, "together='x'"),
        ({"renumbered": None}, "renumbered=None"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Finch(**options)
