"""Prompts are divided into context and question by tokens, with and without a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.bench.comparison.encoding import prompts, tokens_of
from foveate.models.base import byte_tokenizer as bytes_
from foveate.tasks.base.task import Example, Task
from foveate.tasks.files.prompts import Prompts
from tests.corpus.benchmarks import LONGBENCH, MRCR, SCBENCH_KV
from tests.corpus.cases import lines, tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class One(Task):
    name = "one"

    def __init__(self, *examples: Example) -> None:
        self.made = list(examples)

    def examples(self) -> list[Example]:
        return self.made


def divided(task: Task, template: str = "", **options: Any) -> list[tuple[str, str]]:
    """The two parts of each prompt, as the byte tokenizer's text."""
    tokenizer = bytes_.build(2048)
    tokenizer.chat_template = template or None
    found = []
    for prompt in prompts(task, tokenizer, tiny(), **options):
        parts = prompt.ids[0, : prompt.context_tokens], prompt.ids[0, prompt.context_tokens :]
        found.append(tuple(tokenizer.decode(part, skip_special_tokens=True) for part in parts))
    return found  # type: ignore[return-value]


def test_the_question_starts_after_the_context(tmp_path: Path) -> None:
    task = Prompts(lines(tmp_path / "scbench_kv.jsonl", [SCBENCH_KV]))
    context = SCBENCH_KV["context"] + "\n\n"
    assert divided(task) == [(context, "Key k1:"), (context, "Key k1: v1\n\nKey k2:")]


@pytest.mark.parametrize(("spans", "context"), [
    ({}, ""), ({"needle": (0, 2)}, ""), ({"context": (0, 4)}, ""), ({"context": (0, 2), "prefix": (2, 4)}, "ab"),
    ({"question": (3, 4)}, "abc"), ({"question": (0, 4)}, ""),
])  # fmt: skip
def test_a_prompt_without_both_parts_is_not_divided(spans: dict[str, tuple[int, int]], context: str) -> None:
    assert divided(One(Example("abcd", "e", spans))) == [(context, "abcd"[len(context) :])]


def test_a_template_goes_around_both_parts(tmp_path: Path) -> None:
    task = Prompts(lines(tmp_path / "p.jsonl", [LONGBENCH]))
    assert divided(task, TEMPLATE, chat=True) == [("<user>long text", "\n\nWho?</user><assistant>Answer:")]


def test_the_last_message_of_a_conversation_is_its_question(tmp_path: Path) -> None:
    task = Prompts(lines(tmp_path / "p.jsonl", [MRCR]))
    before = "<user>write a poem about rain</user><assistant>Rain, rain.</assistant><user>"
    assert divided(task, TEMPLATE) == [(before, "Put Xy12 before the first poem about rain.</user><assistant>")]


def test_a_token_of_both_parts_belongs_to_the_question() -> None:
    built = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3}, [("b", "c")]))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    (prompt,) = prompts(One(Example("abca", "a", {"question": (2, 4)})), tokenizer, tiny())
    assert prompt.ids.tolist() == [[0, 3, 0]] and prompt.context_tokens == 1
    tokens = tokens_of(tokenizer)
    assert tokens.count("abca") == 3 and tokens.encode("abc") == [0, 3]
