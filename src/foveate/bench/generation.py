"""Generate an answer under methods, token by token, with the bytes of the cache and the speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from foveate.bench.comparison.encoding import encoded
from foveate.bench.comparison.model_context import context_length
from foveate.bench.parts.timing import now
from foveate.core import validate
from foveate.core.errors import FoveateError, OptionError, TaskError
from foveate.host import Context, Held, Method, apply, held
from foveate.host.hf.chat_template import ChatTemplate


@dataclass(frozen=True)
class Generated:
    """A generated answer and its cost.

    Args:
        text: the answer.
        prompt_tokens, new_tokens: tokens that were read, and generated.
        read_seconds: the time to read the prompt and give the first token.
        tokens_per_second: the speed of the later tokens; NaN for an answer of one token.
        cache_bytes: bytes of keys and values at the end; those of the text alone with `before_question`.
        kept: share of the full cache's slots that is stored.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    read_seconds: float
    tokens_per_second: float
    cache_bytes: int
    kept: float

    def line(self) -> str:
        """Return the cost as one line."""
        speed = f"{self.tokens_per_second:.1f} tokens/s" if self.new_tokens > 1 else "one token"
        return (
            f"{self.prompt_tokens} tokens read in {self.read_seconds:.2f} s; {self.new_tokens} generated, {speed}; "
            f"cache {self.cache_bytes:,} bytes, {self.kept:.1%} of its slots"
        )


@dataclass(frozen=True)
class Asked:
    """A prompt, with all that decides how the model reads it.

    Args:
        prompt: the prompt, or the question about `text`.
        text: a long text before it, or None.
        chat: whether to use the tokenizer's chat template; None does so if there is one.
        system: a system message to begin the chat with.
        before_question: True compresses the text before the question is read, as `foveate.Context` does. One compressed
            text then serves every question, but methods cannot keep what this one needs.
    """

    prompt: str
    text: str | None = None
    chat: bool | None = None
    system: str | None = None
    before_question: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise OptionError("prompt must not be empty")
        if self.before_question and self.text is None:
            raise OptionError("before_question=True needs a text, which is compressed before the question")


def ids_of(asked: Asked, tokenizer: Any) -> list[int]:
    """Return the token ids of text and prompt, in the chat template where there is one."""
    content = asked.prompt if asked.text is None else f"{asked.text}\n\n{asked.prompt}"
    messages = [{"role": "system", "content": asked.system}] if asked.system is not None else []
    messages.append({"role": "user", "content": content})
    try:
        if not ChatTemplate(tokenizer, asked.chat, asked.system).chat:
            return encoded(tokenizer, content)
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except FoveateError:
        raise
    except Exception as error:  # noqa: BLE001  a template is a program and may raise anything
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise TaskError(f"the model's chat template fails: {first[0]}") from None
    return encoded(tokenizer, whole)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[Method],
    asked: Asked,
    *,
    tokens: int = 256,
    sample: bool = False,
    write: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Generate an answer.

    Args:
        model, tokenizer: the model and its tokenizer.
        methods: applied in order.
        asked: the prompt.
        tokens: the most tokens of the answer.
        sample: True draws tokens with the model's own settings; False takes the likeliest.
        write: called with each new piece of the answer.
    """
    validate.count("tokens", tokens, 1)
    stream = _Stream(tokenizer, write, model.device)
    options: dict[str, Any] = {"max_new_tokens": tokens, "streamer": stream, "do_sample": sample}
    if not sample:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        options["pad_token_id"] = tokenizer.eos_token_id
    if asked.before_question:
        count, cost = _after_text(model, tokenizer, methods, asked, options, stream)
    else:
        count, cost = _whole(model, tokenizer, methods, asked, options, stream)
    return Generated(stream.text, count, len(stream.ids), stream.first_seconds, stream.speed, cost.nbytes, cost.kept)


@torch.no_grad()
def _whole(
    model: PreTrainedModel, tokenizer: Any, methods: Sequence[Method], asked: Asked, options: dict[str, Any],
    stream: _Stream,
) -> tuple[int, Held]:  # fmt: skip
    ids = torch.tensor([ids_of(asked, tokenizer)], device=model.device)
    _check_context(model, methods, ids.shape[1], options["max_new_tokens"])
    cache = DynamicCache(config=model.config)
    with apply(model, *methods):
        stream.start()
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    return ids.shape[1], held(cache)


def _after_text(
    model: PreTrainedModel, tokenizer: Any, methods: Sequence[Method], asked: Asked, options: dict[str, Any],
    stream: _Stream,
) -> tuple[int, Held]:  # fmt: skip
    context = Context(model, *methods, tokenizer=tokenizer, chat=asked.chat, system=asked.system)
    question = asked.prompt if context.template.chat else f"\n\n{asked.prompt}"
    assert asked.text is not None
    count = sum(
        ids.shape[1] for ids in (context.template.text_ids(asked.text), context.template.question_ids(question))
    )
    _check_context(model, methods, count, options["max_new_tokens"])
    with context:
        stream.start()
        context.read(asked.text).generate(question, **options)
        return count, context.held


def _check_context(model: PreTrainedModel, methods: Sequence[Method], count: int, new: int) -> None:
    """Refuse a prompt that does not fit, unless a method drops tokens."""
    context = context_length(model.config)
    if context is not None and count + new > context and not any(method.evicts for method in methods):
        raise OptionError(f"the prompt and its answer take {count} + {new} tokens; the model's context holds {context}")


class _Stream(BaseStreamer):
    """Receives tokens from `generate`, and writes each piece of text as soon as it is complete."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], device: torch.device) -> None:
        self.tokenizer, self.write, self.device = tokenizer, write, device
        self.ids: list[int] = []
        self.text = ""
        self._times: list[float] = []
        self._prompt = True

    def start(self) -> None:
        self._times = [now(self.device)]

    def put(self, value: Tensor) -> None:
        if self._prompt:  # the first call brings the prompt
            self._prompt = False
            return
        self._times.append(now(self.device))
        self.ids += value.flatten().tolist()
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip("\ufffd"))  # half a character

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > len(self.text):
            self.write(text[len(self.text) :])
            self.text = text

    @property
    def first_seconds(self) -> float:
        return self._times[1] - self._times[0] if len(self._times) > 1 else float("nan")

    @property
    def speed(self) -> float:
        later = self._times[1:]
        return (len(later) - 1) / (later[-1] - later[0]) if len(later) > 1 else float("nan")
