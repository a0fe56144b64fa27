"""A text and a question about it as token ids, with a chat template split between the two."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foveate.core.errors import OptionError

#: Stands for the text and for the question while the template is split.
_TEXT, _QUESTION = "\x02foveate-text\x03", "\x02foveate-question\x03"


class Turns:
    """What stands before the text, between it and a question, and before the answer.

    Args:
        tokenizer: None where everything is given as ids.
        chat: whether to use the tokenizer's chat template; None does where there is one.
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

    def need(self, what: str) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        if self.tokenizer is None:
            raise OptionError(f"{what} needs Context(..., tokenizer=...); without one, give ids to Context.generate")
        return self.tokenizer

    def text(self, text: str | Tensor) -> Tensor:
        """The ids `(1, N)` of the text, and of all that stands before it. Ids are taken as they are."""
        if not isinstance(text, str):
            return _row("text", text)
        if self.chat:  # the template says how a text begins
            return self._ids(self._before + text)
        tokenizer = self.need("a text in words")
        plain, whole = self._ids(text), _row("text", torch.tensor(tokenizer(text).input_ids))
        ended = whole.shape[1] > plain.shape[1] and whole[0, -1] == tokenizer.eos_token_id != plain[0, -1]
        return whole[:, :-1] if ended else whole  # an end token would close the text before the question

    def question(self, question: str | Tensor) -> Tensor:
        """The ids `(1, N)` of a question and of what stands around it. Ids are taken as they are."""
        if not isinstance(question, str):
            return _row("question", question)
        return self._ids(self._between + question + self._after)

    def words(self, ids: Tensor) -> str:
        return str(self.need("ask").decode(ids, skip_special_tokens=True))

    def _ids(self, text: str) -> Tensor:
        made = self.need("a text in words")(text, add_special_tokens=False).input_ids
        return _row("text", torch.tensor(made, dtype=torch.long))

    def _template(self, system: str | None) -> tuple[str, str, str]:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": f"{_TEXT}\n\n{_QUESTION}"})
        whole = str(self.need("chat").apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before, _, rest = whole.partition(_TEXT)
        between, _, after = rest.partition(_QUESTION)
        if not rest or _QUESTION not in rest or _TEXT in rest or _QUESTION in after:
            raise OptionError("the tokenizer's chat template does not hand a message through; use chat=False")
        return before, between, after


def _row(name: str, ids: Tensor) -> Tensor:
    """Ids as `(1, N)`."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise OptionError(f"{name} must be a text, or ids (N,) or (1, N); got {got}")
    row = ids if ids.dim() == 2 else ids[None]
    if row.shape[0] != 1 or not row.shape[1]:
        raise OptionError(f"{name} must be one sequence of at least one id; got {tuple(ids.shape)}")
    return row
