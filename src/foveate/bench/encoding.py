"""From a task's examples to token ids for one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from foveate.core.errors import TaskError
from foveate.tasks.base import Example, Task

_SPARE = 2  # tokens beyond the expected answer's, so that an answer is seen to end or to run on


@dataclass(frozen=True)
class Prompt:
    """An example as token ids.

    Args:
        example: what the ids were made from.
        ids: `(1, N)`.
        new_tokens: how many tokens to answer with.
        context: positions that the model was made for; None where it has no limit.
    """

    example: Example
    ids: Tensor
    new_tokens: int
    context: int | None = None

    @property
    def beyond(self) -> int:
        """How many tokens the prompt and its answer run past the model's context; 0 where they fit."""
        return 0 if self.context is None else max(0, self.ids.shape[1] + self.new_tokens - self.context)


def prompts(task: Task, tokenizer: Any, model: PreTrainedModel) -> list[Prompt]:
    """The task's examples, tokenized."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for number, example in enumerate(task.examples(), 1):
        ids = tokenizer(example.prompt, return_tensors="pt", verbose=False).input_ids
        new = len(tokenizer(example.answer, add_special_tokens=False).input_ids) + _SPARE
        if ids.shape[1] == 0:
            raise TaskError(f"example {number} of {task.name} has an empty prompt")
        found.append(Prompt(example, ids.to(model.device), new, context))
    return found


def check_context(task: Task, batch: list[Prompt]) -> None:
    """Refuse the first prompt that does not fit into the model's context."""
    for number, prompt in enumerate(batch, 1):
        if prompt.beyond:
            raise TaskError(
                f"example {number} of {task.name} takes {prompt.ids.shape[1]} + {prompt.new_tokens} tokens; "
                f"the model's context holds {prompt.context}"
            )
