"""Encode a task's examples as token ids for one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.bench.comparison.model_context import context_length
from foveate.core import validate
from foveate.core.errors import TaskError
from foveate.tasks.base.task import Example, Task
from foveate.tasks.base.tokens import Tokens

_SPARE = 2  # tokens beyond the expected answer, which show if the output ends there
_SPARE_IN_SENTENCES = 24  # the same if the answer may be inside a sentence
_ALL_ANSWERS = ("ruler-all", "ruler2-soft", "scbench-share")  # rules that ask for every answer
IN_SENTENCES = ("contains", "contains-all", "first-number")


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Args:
        example: the encoded example; its prompt is the text that the model reads, with special tokens.
        ids: `(1, N)`.
        new_tokens: how many tokens to generate.
        context: the model's context length in tokens; None without a limit.
        answer_ids: `(1, M)`, the first accepted answer as a continuation of the prompt.
        context_tokens: how many of the first ids belong to the context, which a method can read without the question;
            0 if the example does not divide its prompt.
    """

    example: Example
    ids: Tensor
    new_tokens: int
    context: int | None = None
    answer_ids: Tensor | None = None
    context_tokens: int = 0

    @property
    def excess(self) -> int:
        """The number of tokens of prompt and answer past the model's context; 0 if they fit."""
        return 0 if self.context is None else max(0, self.ids.shape[1] + self.new_tokens - self.context)


def prompts(
    task: Task,
    tokenizer: Any,
    model: PreTrainedModel,
    *,
    chat: bool = False,
    new_tokens: int | None = None,
    score: str | None = None,
) -> list[Prompt]:
    """Encode the task's examples, with one begin token if the model has one, and no end token.

    Args:
        task: the source of the examples.
        tokenizer, model: the model and its tokenizer.
        chat: True applies the model's chat template to plain prompts too; conversations always get it.
        new_tokens: how many tokens to generate; None depends on the accepted answers.
        score: the score of the answers; None is the task's own.

    Raises:
        TaskError: if an example cannot be encoded with token ids that the model has.
    """
    if new_tokens is not None:
        validate.at_least("new_tokens", new_tokens, 1)
    context, vocabulary = context_length(model.config), _vocabulary_size(model)
    in_sentences = chat or (score or task.metric) in IN_SENTENCES
    found = []
    for number, example in enumerate(task.examples(), 1):
        where = f"example {number} of {task.name}"
        example = _apply_template(example, tokenizer, chat, where)
        ids = encoded(tokenizer, example.prompt)
        if not ids:
            raise TaskError(f"{where}: prompt must not be empty")
        answer = _continuation_ids(tokenizer, example.prompt, ids, example.answer)
        _check_ids([*ids, *answer], vocabulary, tokenizer, where)
        spare = _SPARE_IN_SENTENCES if in_sentences or example.rule else _SPARE
        length = new_tokens or example.new_tokens or _answer_length(tokenizer, example, answer, score or task.metric)
        length += 0 if new_tokens or example.new_tokens else spare
        tensors = (torch.tensor([row], device=model.device) for row in (ids, answer))
        found.append(
            Prompt(example, next(tensors), length, context, next(tensors), _context_tokens(tokenizer, example, ids))
        )
    return found


def tokens_of(tokenizer: Any) -> Tokens:
    """Return a tokenizer's tokens, for tasks whose length is in tokens."""
    return Tokens(
        lambda text: _ids(tokenizer, text, special=False),
        lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
    )


def check_context(task: Task, batch: list[Prompt]) -> None:
    """Refuse a prompt that does not fit into the model's context."""
    for number, prompt in enumerate(batch, 1):
        if prompt.excess:
            raise TaskError(
                f"example {number} of {task.name} takes {prompt.ids.shape[1]} + {prompt.new_tokens} tokens; "
                f"the model's context holds {prompt.context}"
            )


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Encode a text after the tokenizer's begin tokens, which appear once even if the text contains them too.

    Tokens that the tokenizer adds at the end (T5's end token, BERT's separator) are left out, since the model continues
    the text.
    """
    plain = _ids(tokenizer, text, special=False)
    begin = _ids_before(_ids(tokenizer, text, special=True), plain)
    found = plain if plain[: len(begin)] == begin else begin + plain
    bos = tokenizer.bos_token_id
    while bos is not None and bos != tokenizer.eos_token_id and found[:2] == [bos, bos]:
        found = found[1:]
    return found


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _ids_before(whole: list[int], plain: list[int]) -> list[int]:
    """Return the ids before `plain` in `whole`."""
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _apply_template(example: Example, tokenizer: Any, chat: bool, where: str) -> Example:
    """Format the example's conversation by the chat template, up to the start of the model's answer."""
    if not (chat or example.messages):
        return example
    if not getattr(tokenizer, "chat_template", None):
        source = "--chat needs" if chat else "a list of messages needs"
        raise TaskError(f"{where}: {source} a chat template; the model's tokenizer has none")
    start, end = example.spans.get("prefix", (len(example.prompt), len(example.prompt)))
    messages = example.messages or ({"role": "user", "content": example.prompt[:start].rstrip()},)
    begun = messages[-1]["role"] == "assistant"  # the model continues its own last message
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # noqa: BLE001  a template is a program and may raise anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise TaskError(f"{where}: the model's chat template fails: {first[0]}") from None
    begun_answer = example.prompt[start:end].lstrip()
    return replace(example, prompt=text + begun_answer, spans=_moved_question(example, text), messages=())


def _moved_question(example: Example, text: str) -> dict[str, tuple[int, int]]:
    """Return the place of the question in a formatted conversation; empty if it is not there or has no context."""
    if "question" not in example.spans or "context" not in example.spans:
        return {}
    question, context = (example.prompt[slice(*example.spans[name])].strip() for name in ("question", "context"))
    at = text.find(context)
    start = at + len(context) if at >= 0 else text.rfind(question)
    return {"question": (start, len(text))} if start > 0 else {}


def _context_tokens(tokenizer: Any, example: Example, ids: list[int]) -> int:
    """Return how many ids hold the context alone; a token of both context and question belongs to the question."""
    spans = example.spans
    start = spans.get("question", spans.get("prefix", (0, 0)) if "context" in spans else (0, 0))[0]
    if start <= 0:
        return 0
    context = encoded(tokenizer, example.prompt[:start])
    return next(
        (at for at, (a, b) in enumerate(zip(context, ids, strict=False)) if a != b), min(len(context), len(ids))
    )


def _continuation_ids(tokenizer: Any, prompt: str, ids: list[int], answer: str) -> list[int]:
    """Encode the answer as a continuation of the prompt, or alone if a token would span both."""
    whole = encoded(tokenizer, prompt + answer)
    if whole[: len(ids)] == ids and len(whole) > len(ids):
        return whole[len(ids) :]
    return _ids(tokenizer, answer, special=False)


def _answer_length(tokenizer: Any, example: Example, first: list[int], metric: str) -> int:
    """Return the tokens of the longest accepted answer, or of all answers if the score wants all."""
    each = [len(first), *(len(_ids(tokenizer, answer, special=False)) for answer in example.answers[1:])]
    every = metric == "contains-all" if not example.rule else example.rule in _ALL_ANSWERS
    return sum(each) + _SPARE * (len(each) - 1) if every else max(each)


def _vocabulary_size(model: PreTrainedModel) -> int | None:
    """Return the number of token ids that the model embeds; None if it is unknown."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def _check_ids(ids: list[int], vocabulary: int | None, tokenizer: Any, where: str) -> None:
    if vocabulary is not None and max(ids) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise TaskError(
            f"{where} has the token {token!r} with id {max(ids)}; the model's embedding holds {vocabulary} ids, "
            "so the tokenizer belongs to another model"
        )
