"""Prompts that hold several documents and a question, with the place of each document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host.hf.chat_template import ChatTemplate


@final
@dataclass(frozen=True, eq=False)
class DocumentPrompt:
    """The ids of a prompt, and where its documents stand.

    Args:
        ids: one sequence `(1, N)` without padding.
        spans: `(start, end)` of each document's tokens, in the order of the prompt; `end` is not included.
    """

    ids: Int[Tensor, "1 n"]
    spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        check_spans(self.ids, self.spans)


#: Builds a prompt from `(tokenizer, documents, question)`; the documents stand in the given order.
BuildPrompt = Callable[[Any, Sequence[Any], Any], DocumentPrompt]


@final
@dataclass(frozen=True)
class PromptFormat:
    """The words around documents and question. Call it with `(tokenizer, documents, question)` to build a prompt.

    Each document is converted to ids by itself, so that it has the same ids at every place, and its span is exact. With
    a chat template the whole prompt is one message of the user.

    Args:
        instruction: stands before the documents.
        document: holds "{document}", and "{number}" if documents are to be numbered from 1 in the order of the prompt.
        question: holds "{question}".
        answer: begins the answer of a model without a chat template.
        chat: whether to use the tokenizer's chat template; None does so if there is one.
        system: a system message to begin the chat with.
    """

    instruction: str = "Answer a question about the documents below. Many of them may have nothing to do with it.\n\n"
    document: str = "Document: {document}\n\n"
    question: str = "Question: {question}\nGive the answer alone, in few words."
    answer: str = "\nAnswer:"
    chat: bool | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.instruction, str) or not self.instruction:
            raise OptionError(f"instruction={shown(self.instruction)} must be a text that is not empty")
        for name in ("document", "question"):
            value = getattr(self, name)
            if not isinstance(value, str) or f"{{{name}}}" not in value:
                raise OptionError(f"{name}={shown(value)} must be a text that contains {{{name}}}")

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], question: str
    ) -> DocumentPrompt:  # fmt: skip
        template = ChatTemplate(tokenizer, self.chat, self.system)
        parts, spans = [template.text_ids(self.instruction)], []
        end = parts[0].shape[1]
        for number, document in enumerate(documents, start=1):
            words = self.document.replace("{number}", str(number)).replace("{document}", document)
            parts.append(template.part_ids(words))
            spans.append((end, end + parts[-1].shape[1]))
            end = spans[-1][1]
        last = self.question.replace("{question}", question)
        parts.append(template.question_ids(last if template.chat else last + self.answer))
        return DocumentPrompt(torch.cat(parts, 1), tuple(spans))


def check_spans(ids: Tensor, spans: Sequence[tuple[int, int]]) -> None:
    """Refuse ids that are not one sequence, and spans that are empty, overlap, or do not lie before its last token."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or ids.shape[0] != 1:
        raise ShapeError(f"ids must be one sequence (1, N) of ids; got {shown(ids)}")
    if not spans:
        raise OptionError("spans must hold at least one document; got none")
    end = 0
    for start, stop in spans:
        if not end <= start < stop < ids.shape[1]:
            raise OptionError(
                f"spans: ({start}, {stop}) must begin at {end} or later, hold a token, and end before the last of "
                f"{ids.shape[1]} tokens"
            )
        end = stop
