"""From a task's examples to token ids for one model."""

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

_SPARE = 2  # tokens beyond the expected answer's, so that an answer is seen to end or to run on
_TALK = 24  # the same where an answer may stand in a sentence
_IN_SENTENCES = ("contains", "contains-all", "first-number")


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Args:
        example: what the ids were made from; its prompt is the text that the model reads, special tokens included.
        ids: `(1, N)`.
        new_tokens: how many tokens to answer with.
        context: positions that the model was made for; None where it has no limit.
        answer_ids: `(1, M)`, the first accepted answer as it continues the prompt.
    """

    example: Example
    ids: Tensor
    new_tokens: int
    context: int | None = None
    answer_ids: Tensor | None = None

    @property
    def beyond(self) -> int:
        """How many tokens the prompt and its answer run past the model's context; 0 where they fit."""
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
    """The task's examples, tokenized: one begin token where the model has one, and no end token.

    Args:
        task: where the examples come from.
        tokenizer, model: that read them.
        chat: put plain prompts into the model's chat template too; conversations always are.
        new_tokens: how many tokens to answer with; None is by the accepted answers.
        score: how answers will be scored; None is the task's own way.

    Raises:
        TaskError: where an example cannot be put into ids that the model has.
    """
    if new_tokens is not None:
        validate.at_least("new_tokens", new_tokens, 1)
    context, words = context_length(model.config), _embedded(model)
    spare = _TALK if chat or (score or task.metric) in _IN_SENTENCES else _SPARE
    found = []
    for number, example in enumerate(task.examples(), 1):
        where = f"example {number} of {task.name}"
        example = _worded(example, tokenizer, chat, where)
        ids = encoded(tokenizer, example.prompt)
        if not ids:
            raise TaskError(f"{where} has an empty prompt")
        answer = _continued(tokenizer, example.prompt, ids, example.answer)
        _check_words([*ids, *answer], words, tokenizer, where)
        length = new_tokens or _length(tokenizer, example, answer, score or task.metric) + spare
        tensors = (torch.tensor([row], device=model.device) for row in (ids, answer))
        found.append(Prompt(example, next(tensors), length, context, next(tensors)))
    return found


def check_context(task: Task, batch: list[Prompt]) -> None:
    """Refuse the first prompt that does not fit into the model's context."""
    for number, prompt in enumerate(batch, 1):
        if prompt.beyond:
            raise TaskError(
                f"example {number} of {task.name} takes {prompt.ids.shape[1]} + {prompt.new_tokens} tokens; "
                f"the model's context holds {prompt.context}"
            )


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids behind what the tokenizer begins every text with, once, whether or not the text says it too.

    What the tokenizer ends texts with (T5's end token, BERT's separator) is left out: the model is to go on.
    """
    plain = _ids(tokenizer, text, special=False)
    begin = _before(_ids(tokenizer, text, special=True), plain)
    found = plain if plain[: len(begin)] == begin else begin + plain
    bos = tokenizer.bos_token_id
    while bos is not None and bos != tokenizer.eos_token_id and found[:2] == [bos, bos]:
        found = found[1:]
    return found


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _before(whole: list[int], plain: list[int]) -> list[int]:
    """The ids that stand before `plain` in `whole`."""
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def _worded(example: Example, tokenizer: Any, chat: bool, where: str) -> Example:
    """The example with its conversation put into words by the chat template, up to where the model answers."""
    if not (chat or example.messages):
        return example
    if not getattr(tokenizer, "chat_template", None):
        what = "--chat asks for" if chat else "is a list of messages, which needs"
        raise TaskError(f"{where}: {what} a chat template, and the model's tokenizer has none")
    start, end = example.spans.get("prefix", (len(example.prompt), len(example.prompt)))
    messages = example.messages or ({"role": "user", "content": example.prompt[:start].rstrip()},)
    begun = messages[-1]["role"] == "assistant"  # the model goes on with what it is said to have begun
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # noqa: BLE001  a template is a program of the checkpoint's, and raises what it likes
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise TaskError(f"{where}: the model's chat template refuses it: {first[0]}") from None
    return replace(example, prompt=text + example.prompt[start:end].lstrip(), spans={}, messages=())


def _continued(tokenizer: Any, prompt: str, ids: list[int], answer: str) -> list[int]:
    """The answer's ids as they continue the prompt's; by themselves where the two melt into one token."""
    whole = encoded(tokenizer, prompt + answer)
    if whole[: len(ids)] == ids and len(whole) > len(ids):
        return whole[len(ids) :]
    return _ids(tokenizer, answer, special=False)


def _length(tokenizer: Any, example: Example, first: list[int], metric: str) -> int:
    """Tokens that the longest accepted answer takes; all of them where all are asked for."""
    each = [len(first), *(len(_ids(tokenizer, answer, special=False)) for answer in example.answers[1:])]
    return sum(each) + _SPARE * (len(each) - 1) if metric == "contains-all" else max(each)


def _embedded(model: PreTrainedModel) -> int | None:
    """How many token ids the model has an embedding for; None where it does not say."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def _check_words(ids: list[int], words: int | None, tokenizer: Any, where: str) -> None:
    if words is not None and max(ids) >= words:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise TaskError(
            f"{where} has the token {token!r} with id {max(ids)}; the model's embedding holds {words} ids, "
            "so the tokenizer is another model's"
        )
