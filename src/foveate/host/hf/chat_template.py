"""Convert a text and a question to token ids, with a chat template that is split between the two."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foveate.core.errors import OptionError

#: Placeholders of the text and of the question while the template is split.
_TEXT, _QUESTION = "\x02foveate-text\x03", "\x02foveate-question\x03"


class ChatTemplate:
    """A chat template in three parts: before the text, between text and question, and before the answer.

    Args:
        tokenizer: None if text and questions are given as ids.
        chat: whether to use the tokenizer's chat template; None does so if there is one.
        system: a system message to begin with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, chat: bool | None, system: str | None) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise OptionError("chat=True needs a tokenizer with a chat template")
        self.tokenizer, self.chat = tokenizer, has_template if chat is None else chat
        if system is not None and not self.chat:
            raise OptionError("system= needs a tokenizer with a chat template")
        self._before, self._between, self._after = self._template(system) if self.chat else ("", "", "")

    def require_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer, or raise an error that names `what` as the reason."""
        if self.tokenizer is None:
            raise OptionError(f"{what} needs Context(..., tokenizer=...); without one, give ids to Context.generate")
        return self.tokenizer

    def text_ids(self, text: str | Tensor) -> Tensor:
        """Return the ids `(1, N)` of the text and of the template before it. Ids are returned unchanged."""
        if not isinstance(text, str):
            return _row("text", text)
        if self.chat:  # the template contains the start token
            return self._ids(self._before + text)
        tokenizer = self.require_tokenizer("a text in words")
        plain, whole = self._ids(text), _row("text", torch.tensor(tokenizer(text).input_ids))
        ended = whole.shape[1] > plain.shape[1] and whole[0, -1] == tokenizer.eos_token_id != plain[0, -1]
        return whole[:, :-1] if ended else whole  # an end token would end the text before the question

    def question_ids(self, question: str | Tensor) -> Tensor:
        """Return the ids `(1, N)` of a question and of the template around it. Ids are returned unchanged."""
        if not isinstance(question, str):
            return _row("question", question)
        return self._ids(self._between + question + self._after)

    def part_ids(self, text: str) -> Tensor:
        """Return the ids `(1, N)` of a part of the text, without special tokens; N is 0 for an empty part."""
        made = self.require_tokenizer("a text in words")(text, add_special_tokens=False).input_ids
        return torch.tensor(made, dtype=torch.long)[None]

    def decode(self, ids: Tensor) -> str:
        return str(self.require_tokenizer("ask").decode(ids, skip_special_tokens=True))

    def _ids(self, text: str) -> Tensor:
        return _row("text", self.part_ids(text))

    def _template(self, system: str | None) -> tuple[str, str, str]:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": f"{_TEXT}\n\n{_QUESTION}"})
        tokenizer = self.require_tokenizer("chat")
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before, _, rest = whole.partition(_TEXT)
        between, _, after = rest.partition(_QUESTION)
        if not rest or _QUESTION not in rest or _TEXT in rest or _QUESTION in after:
            raise OptionError("the tokenizer's chat template does not contain the message; use chat=False")
        return before, between, after


def _row(name: str, ids: Tensor) -> Tensor:
    """Return ids as `(1, N)`."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise OptionError(f"{name} must be a text, or ids (N,) or (1, N); got {got}")
    row = ids if ids.dim() == 2 else ids[None]
    if row.shape[0] != 1 or not row.shape[1]:
        raise OptionError(f"{name} must be one sequence of at least one id; got {tuple(ids.shape)}")
    return row
