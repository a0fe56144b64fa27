"""`Context` reads a text once and answers many questions about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host import Method, Site, apply
from foveate.kv.duo_attention import DuoAttention
from foveate.kv.sink_recent import SinkRecent
from foveate.kv.token_select import TokenSelect
from tests.support.host_models import DECODERS, Recent, model, tokens
from tests.support.lab import lab

GATES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
METHODS: dict[str, Callable[[], list[Method]]] = {
    "no method": list,
    "sink_recent": lambda: [SinkRecent(2, 6)],
    "duo_attention": lambda: [DuoAttention(GATES, 0.5, 2, 6)],
    "token_select": lambda: [TokenSelect(1, 2, 3)],  # fewer than the narrowest window
}
TEXT, QUESTIONS = tokens(1, 24), [tokens(1, 5, seed=1), tokens(1, 19, seed=2), tokens(1, 1, seed=3)]


def by_hand(name: str, methods: list[Method], question: Tensor, new: int) -> Tensor:
    """Read the text under the methods, then answer the question greedily on a cache from which nothing is dropped."""
    subject, cache = model(name), DynamicCache(config=model(name).config)
    with torch.no_grad(), apply(subject, *methods, evict="after prompt"):
        subject(TEXT, past_key_values=cache)
        ids, found = question, []
        for piece in (question[:, :1], question[:, 1:]):  # the first token ends the prompt
            if piece.shape[1]:
                ids = subject(piece, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        for _ in range(new):
            found.append(ids)
            ids = subject(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", METHODS)
def test_each_question_is_answered_independently(name: str, kind: str) -> None:
    context = foveate.Context(model(name), *METHODS[kind]()).read(TEXT)
    before = (context.kept, context.tokens, context.cache.get_seq_length())
    for question in [*QUESTIONS, QUESTIONS[0]]:
        answer = context.generate(question, 6)
        if kind != "token_select":  # its choice depends on how calls are cut
            assert torch.equal(answer, by_hand(name, METHODS[kind](), question, 6))
        fresh = foveate.Context(model(name), *METHODS[kind]()).read(TEXT)
        assert torch.equal(answer, fresh.generate(question, 6))
        assert before == (context.kept, context.tokens, context.cache.get_seq_length())
    evicts = kind in ("sink_recent", "duo_attention")
    assert (before[0] < 0.8) == (evicts or name in ("mistral", "gemma2", "gemma3"))
    assert before[1:] == (24, 24)


def test_without_a_method_answers_equal_plain_generation() -> None:
    llama, ids = model("llama"), torch.cat([TEXT, QUESTIONS[0]], 1)
    expected = llama.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    context = foveate.Context(llama).read(TEXT)
    assert torch.equal(context.generate(QUESTIONS[0], 6), expected)
    beams = llama.generate(ids, max_new_tokens=6, do_sample=False, num_beams=3, num_return_sequences=2)
    got = context.generate(QUESTIONS[0], 6, num_beams=3, num_return_sequences=2)
    assert torch.equal(got, beams[:, ids.shape[1] :])
    drawn = [context.generate(QUESTIONS[0], 6, do_sample=True, num_return_sequences=4) for _ in range(2)]
    assert drawn[0].shape == (4, 6) and not torch.equal(*drawn)


class KeepsAttended(Method):
    """Keeps the tokens that the last query attends to most, as scoring methods do."""

    def keep(self, site: Site) -> Tensor:
        k = site.k.repeat_interleave(site.groups, 1)
        scores = torch.einsum("bhd,bhsd->bhs", site.q[:, :, -1], k).unflatten(1, (-1, site.groups)).amax(2)
        scores = scores.masked_fill((site.positions < 0) | (site.positions >= site.seen), float("-inf"))
        return scores >= scores.topk(6).values[..., -1:]


def test_a_known_question_decides_what_is_kept() -> None:
    """The question is seen while tokens are dropped, is not kept itself, and is asked like any other."""
    llama = model("llama")

    def kept(question: Tensor | None) -> list[list[int]]:
        context = foveate.Context(llama, KeepsAttended()).read(TEXT, question)
        assert context.tokens == 24 and context.kept == 6 / 24
        layers = [layer.positions for layer in context.cache.layers]
        assert all(int(positions.max()) < 24 for positions in layers)
        return [positions.flatten().tolist() for positions in layers]

    aware = [kept(question) for question in QUESTIONS[:2]]
    assert aware[0] != aware[1] and kept(None) not in aware
    together = torch.cat([TEXT, QUESTIONS[1]], 1)
    masks: list[Tensor] = []

    class Expected(KeepsAttended):
        def keep(self, site: Site) -> Tensor:
            masks.append(super().keep(site.as_of(24))[0])
            return torch.ones_like(site.positions, dtype=torch.bool)

    with torch.no_grad(), apply(llama, Expected()):
        llama(together)
        llama(together, past_key_values=DynamicCache())
    chosen = [keep[:, :24].nonzero()[:, 1].tolist() for keep in masks[-3:]]
    assert aware[1] == chosen


def test_contexts_share_a_model() -> None:
    llama = model("llama")
    short, long = foveate.Context(llama, Recent(4)).read(TEXT), foveate.Context(llama, Recent(12)).read(TEXT)
    assert (short.kept, long.kept) == (4 / 24, 12 / 24)
    answers = [context.generate(QUESTIONS[0], 6) for context in (short, long, short, long)]
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert llama.config._attn_implementation == "sdpa"


def test_chunks_are_read_one_after_another() -> None:
    llama, sizes = model("llama"), []

    class Sees(Method):
        def keep(self, site: Site) -> None:
            sizes.append((site.layer, site.q.shape[2]))

    foveate.Context(llama, Sees(), chunk=10).read(TEXT, QUESTIONS[0])
    assert [size for layer, size in sizes if layer == 0] == [10 + 5, 10 + 5, 4 + 5], "the question follows each"


def test_strings_are_tokenized_and_decoded() -> None:
    subject, tokenizer = lab()
    context = foveate.Context(subject, SinkRecent(4, 40), tokenizer=tokenizer)
    context.read("The lamp is green. " * 6)
    answer = context.ask("The lamp is", max_new_tokens=8)
    ids = context.generate("The lamp is", 8)
    assert isinstance(answer, str) and answer == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert torch.equal(
        context.generate(tokenizer("The lamp is", add_special_tokens=False, return_tensors="pt").input_ids, 8), ids
    )


@pytest.mark.parametrize("how", ["aware", "agnostic"])
def test_the_template_encloses_text_and_question(how: str) -> None:
    subject, tokenizer = lab()
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        context = foveate.Context(subject, tokenizer=tokenizer, system="Be brief.")
        question = "Which?" if how == "aware" else None
        context.read("A text.", question)
        template = context.template
        whole = torch.cat([template.text_ids("A text."), template.question_ids("Which?")], 1)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A text.\n\nWhich?"}]
        assert tokenizer.decode(whole[0]) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokenizer.chat_template = "{{ 'closed' }}"
        with pytest.raises(OptionError, match="does not contain the message"):
            foveate.Context(subject, tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = before


def test_refusals() -> None:
    llama = model("llama")
    with pytest.raises(OptionError, match=r"has read no text; call read\(text\) first"):
        foveate.Context(llama).generate(QUESTIONS[0])
    with pytest.raises(UnsupportedModel, match="needs a decoder; BartForConditionalGeneration is not one"):
        foveate.Context(model("bart"))
    with pytest.raises(OptionError, match="chunk=0"):
        foveate.Context(llama, chunk=0)
    with pytest.raises(OptionError, match="needs a tokenizer with a chat template"):
        foveate.Context(llama, chat=True)
    context = foveate.Context(llama).read(TEXT)
    with pytest.raises(OptionError, match="a Context sets past_key_values itself"):
        context.generate(QUESTIONS[0], past_key_values=DynamicCache())
    with pytest.raises(OptionError, match="prompt_lookup_num_tokens makes transformers read the text again"):
        context.generate(QUESTIONS[0], prompt_lookup_num_tokens=3)
    with pytest.raises(OptionError, match=r"ask needs Context\(..., tokenizer=...\)"):
        context.ask("Which?")
    with pytest.raises(OptionError, match=r"one sequence of at least one id; got \(2, 5\)"):
        context.read(tokens(2, 5))
    with pytest.raises(OptionError, match="has read no text"):
        context.generate(QUESTIONS[0])


def test_an_answer_that_fails_leaves_the_text_as_it_was() -> None:
    context = foveate.Context(model("llama"), Recent(6)).read(TEXT)
    expected = context.generate(QUESTIONS[0], 6)

    def stop(*_: object) -> bool:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        context.generate(QUESTIONS[1], 6, stopping_criteria=[stop])
    assert torch.equal(context.generate(QUESTIONS[0], 6), expected)
    with context:
        assert "24 tokens, kept=0.250" in repr(context)
    assert "no text read" in repr(context)
