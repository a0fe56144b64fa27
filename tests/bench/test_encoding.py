"""Encoded prompts have one begin token, no end token, and ids that the model has, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foveate.bench.comparison.encoding import Prompt, check_context, encoded, prompts
from foveate.core.errors import OptionError, TaskError
from foveate.models.base import byte_tokenizer as bytes_
from foveate.tasks.base.task import Example, Task
from tests.corpus.cases import tiny

WORDS = ("<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[gMASK]", "<sop>", "▁the", "▁fox", "▁is", "▁red", "▁12", "▁")
SPECIAL = WORDS[:7]


def tokenizer(template: str, **named: str) -> PreTrainedTokenizerFast:
    """Build a word tokenizer in SentencePiece's style, with a template of special tokens around every text."""
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(list(SPECIAL))
    if template != "$A":
        tokens = [(word, WORDS.index(word)) for word in SPECIAL if word in template]
        built.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", **named)


KINDS: dict[str, tuple[PreTrainedTokenizerFast, list[str]]] = {
    "llama": (tokenizer("<s> $A", bos_token="<s>", eos_token="</s>"), ["<s>"]),
    "qwen": (tokenizer("$A", eos_token="</s>"), []),
    "gpt2": (tokenizer("$A", bos_token="</s>", eos_token="</s>"), []),
    "t5": (tokenizer("$A </s>", eos_token="</s>"), []),
    "both ends": (tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>"), ["<s>"]),
    "bert": (tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]"), ["[CLS]"]),
    "glm": (tokenizer("[gMASK] <sop> $A", eos_token="</s>"), ["[gMASK]", "<sop>"]),
    "opt": (tokenizer("</s> $A", bos_token="</s>", eos_token="</s>"), ["</s>"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_begin_tokens_appear_once_and_end_tokens_never(kind: str) -> None:
    found, begin = KINDS[kind]
    ids = found.convert_tokens_to_ids([*begin, "▁the", "▁fox"])
    assert encoded(found, "the fox") == ids
    prefix = "".join(begin)
    assert encoded(found, f"{prefix}the fox")[: len(begin) + 1] == ids[: len(begin) + 1]
    assert encoded(found, f"{prefix}the fox").count(ids[0]) == 1


def test_a_text_may_contain_an_end_token() -> None:
    found, _ = KINDS["both ends"]
    assert found.convert_ids_to_tokens(encoded(found, "the fox</s>")) == ["<s>", "▁the", "▁fox", "</s>"]


def test_truncation_and_padding_are_not_applied() -> None:
    built = tokenizer("<s> $A", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    built._tokenizer.enable_truncation(3)
    built._tokenizer.enable_padding(length=64)
    assert built.convert_ids_to_tokens(encoded(built, "the fox is red"))[1:] == ["▁the", "▁fox", "▁is", "▁red"]


def test_repeated_begin_tokens_become_one() -> None:
    found, _ = KINDS["llama"]
    assert found.convert_ids_to_tokens(encoded(found, "<s><s>the")).count("<s>") == 1


class Given(Task):
    """A task with a test's own examples."""

    name = "given"
    metric = "begins"

    def __init__(self, *given: Example, metric: str = "begins") -> None:
        self.given = list(given)
        self.metric = metric

    def examples(self) -> list[Example]:
        return self.given


def one(example: Example, found: Any = None, metric: str = "begins", **options: Any) -> Prompt:
    (prompt,) = prompts(Given(example, metric=metric), found or bytes_.build(64), tiny(), **options)
    return prompt


TALK = "[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
TEMPLATES = {
    "writes the begin token": "{{ bos_token }}" + TALK,
    "leaves it to the tokenizer": TALK,
    "writes it twice": "{{ bos_token }}{{ bos_token }}" + TALK,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_has_one_begin_token(template: str) -> None:
    found = bytes_.build(64)
    found.chat_template = TEMPLATES[template]
    prompt = one(Example("hello", "hi"), found, chat=True)
    assert prompt.ids[0].tolist() == [bytes_.BOS, *b"[hello]>"]
    talk = Example("", "hi", messages=({"role": "user", "content": "hello"},))
    assert one(talk, found).ids.tolist() == prompt.ids.tolist()


def test_a_begun_assistant_message_continues() -> None:
    found = bytes_.build(64)
    found.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'user' %}|{% endif %}{% endfor %}"
    )
    talk = ({"role": "user", "content": "who?"}, {"role": "assistant", "content": "It is"})
    assert one(Example("", " me", messages=talk), found).example.prompt == "[user]who?|[assistant]It is"


def test_answers_continue_the_prompt_and_set_the_length() -> None:
    prompt = one(Example("the key is", " ab", accepted=(" ab", "abcdef")))
    assert prompt.answer_ids is not None and prompt.answer_ids[0].tolist() == [*b" ab"]
    assert prompt.new_tokens == 6 + 2
    assert one(Example("a", "b"), new_tokens=5).new_tokens == 5
    assert one(Example("a", "b"), score="contains").new_tokens > one(Example("a", "b")).new_tokens
    all_of = Example("a", "bb", accepted=("bb", "cc"))
    assert one(all_of, metric="contains-all").new_tokens > one(all_of, metric="contains").new_tokens
    with pytest.raises(OptionError, match="new_tokens"):
        one(Example("a", "b"), new_tokens=0)


def test_an_answer_that_shares_a_token_with_the_prompt_is_encoded_alone() -> None:
    found, _ = KINDS["llama"]
    prompt = one(Example("the f", "ox"), found)
    assert prompt.answer_ids is not None
    assert prompt.answer_ids[0].tolist() == found("ox", add_special_tokens=False).input_ids


def test_ids_beyond_the_embedding_are_refused() -> None:
    model = tiny(vocab_size=100, pad_token_id=0)
    with pytest.raises(TaskError, match="example 1 of given has the token '<bos>' with id 256; .* holds 100"):
        prompts(Given(Example("a", "b")), bytes_.build(64), model)


def test_prompts_know_their_excess_over_the_context() -> None:
    model = tiny(max_position_embeddings=16)
    fits, long = prompts(Given(Example("a" * 10, "b"), Example("a" * 20, "b")), bytes_.build(64), model)
    assert (fits.excess, long.excess, long.context) == (0, 1 + 20 + 3 - 16, 16)
    with pytest.raises(TaskError, match="example 2 of given takes 21 \\+ 3 tokens; the model's context holds 16"):
        check_context(Given(), [fits, long])


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="prompt must not be empty"):
        one(Example("", "b"), KINDS["qwen"][0])
