"""Read a long text once, compress its cache, then ask about it any number of times."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from foveate.core import validate
from foveate.core.errors import OptionError, UnsupportedModel
from foveate.host.cache_contents import Held, held
from foveate.host.entry import apply
from foveate.host.hf.adoption import end_prompt
from foveate.host.hf.chat_template import ChatTemplate
from foveate.host.hf.marks import Mark
from foveate.host.hf.model import Host, host
from foveate.host.method import Method
from foveate.host.run import Run

#: Options of `generate` that a context sets itself.
_OWN = (
    "input_ids", "inputs", "inputs_embeds", "attention_mask", "past_key_values", "use_cache", "cache_implementation",
    "return_dict_in_generate",
)  # fmt: skip
#: Options that make `generate` read the whole text again, although the cache holds it.
_REREAD = ("assistant_model", "prompt_lookup_num_tokens")


class Context:
    """A text that a model has read under methods, for many questions. Methods may drop tokens when it has been read.

        context = foveate.Context(model, SinkRecent(4, 512), tokenizer=tokenizer)
        context.read(long_text)
        context.ask("Who wrote it?"), context.ask("And when?")

    The text is read once. Each question continues from there, and the cache is then restored, so that answers do not
    depend on each other. Tokens are dropped while the text is read and never later: questions and answers are kept.

    By default the methods do not know the questions (question-agnostic): one compressed text serves all of them. With
    `read(text, question=...)` the question follows the text while tokens are dropped, and is removed afterwards
    (question-aware). A method that scores tokens by the attention that they receive then keeps the tokens that this
    question needs, and the answers to other questions may be missing. Scores of the two modes are not comparable.

    The methods act on the model during `read` and `ask` only, so that several contexts may share one model.

    Args:
        model: a decoder.
        methods: applied in order, as in `foveate.apply`.
        tokenizer: turns text into ids and back; without one, texts and questions have to be ids.
        chat: whether to put text and question into the tokenizer's chat template, as one message of the user; None
            does so if there is a template.
        system: a system message to begin the chat with.
        chunk: tokens to read at once; None reads the text in one call. Methods drop tokens after each chunk.
    """

    def __init__(
        self,
        model: object,
        *methods: Method,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat: bool | None = None,
        system: str | None = None,
        chunk: int | None = None,
    ) -> None:
        if chunk is not None:
            validate.count("chunk", chunk, 1)
        apply(model, *methods)  # raises where a method cannot be applied
        self.host: Host = host(model)
        if self.host.decoder is None or self.host.model.config.is_encoder_decoder:
            raise UnsupportedModel(f"a Context needs a decoder; {type(model).__name__} is not one")
        self.methods, self.chunk = methods, chunk
        self.template = ChatTemplate(tokenizer, chat, system)
        self._ids: Tensor | None = None
        self._mark: Mark | None = None

    def __repr__(self) -> str:
        names = ", ".join(type(method).__name__ for method in self.methods)
        state = "no text read" if self._ids is None else f"{self.tokens} tokens, kept={self.kept:.3f}, {self.nbytes} B"
        return f"Context({type(self.host.model).__name__}; {names or 'no method'}; {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the text and its cache."""
        self._ids, self._mark = None, None

    # -- contents ----------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> Cache:
        """The cache of the text."""
        return self._required_mark().cache

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return self._required_mark().seen

    @property
    def held(self) -> Held:
        """The contents of the text's cache."""
        return held(self.cache)

    @property
    def kept(self) -> float:
        """Share of the text's full cache that is kept."""
        return self.held.kept

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept."""
        return self.held.nbytes

    # -- reading and asking ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, text: str | Tensor, question: str | Tensor | None = None) -> Self:
        """Read a text and replace the previous one.

        Args:
            text: a text, or ids `(N,)` or `(1, N)`.
            question: follows the text while tokens are dropped, and is then removed from the cache. It follows each
                chunk.
        """
        self.close()
        begin = self.template.text_ids(text)
        behind = None if question is None else self.template.question_ids(question)
        ids = self._on_device(begin)
        cache = DynamicCache(config=self.host.config)
        with apply(self.host.model, *self.methods, evict="after prompt") as run:
            assert isinstance(run, Run)
            aware = self._on_device(behind) if behind is not None and run.evicts else ids[:, :0]
            self._check_croppable(cache, aware)
            run.tentative = aware.shape[1]
            for piece in ids.split(self.chunk or ids.shape[1], 1):
                self._forward(torch.cat([piece, aware], 1), cache)
                if aware.shape[1]:
                    cache.crop(-aware.shape[1])
        end_prompt(cache, None, ids.shape[1])
        self._ids, self._mark = ids, Mark(cache)
        return self

    def ask(self, question: str | Tensor, max_new_tokens: int = 256, **options: Any) -> str:
        """Return the model's answer to a question about the text, as a string.

        Args:
            question: a text, or ids `(N,)` or `(1, N)`.
            max_new_tokens: the most tokens that the answer may have.
            options: of `model.generate`. Decoding is greedy unless they say otherwise.
        """
        self.template.require_tokenizer("ask")
        if options.get("num_return_sequences", 1) != 1:
            raise OptionError(
                "ask() returns one answer; for num_return_sequences use Context.generate, which returns ids"
            )
        return self.template.decode(self.generate(question, max_new_tokens, **options)[0])

    @torch.no_grad()
    def generate(self, question: str | Tensor, max_new_tokens: int = 256, **options: Any) -> Tensor:
        """Return the new ids `(sequences, N)`; see `ask`."""
        mark = self._required_mark()
        for name in _OWN:
            if name in options:
                raise OptionError(f"a Context sets {name} itself; leave it out")
        for name in _REREAD:
            if options.get(name) is not None:
                raise OptionError(f"{name} makes transformers read the text again after its cache; leave it out")
        assert self._ids is not None
        ids = torch.cat([self._ids, self._on_device(self.template.question_ids(question))], 1)
        if ids.shape[1] == self._ids.shape[1]:
            raise OptionError("question must hold at least one token")
        if not options.get("do_sample"):
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            options = {**greedy, **options}
        branches = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        cache = mark.copied(branches) if branches > 1 else mark.cache
        end_prompt(cache, None, mark.seen)
        with apply(self.host.model, *self.methods, evict="after prompt"):
            try:
                made = self.host.model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=max_new_tokens,
                    **options,
                )  # fmt: skip
            finally:
                mark.rewind()
        return made[:, ids.shape[1] :]

    # -- parts -------------------------------------------------------------------------------------------------------

    def _required_mark(self) -> Mark:
        if self._mark is None:
            raise OptionError("this Context has read no text; call read(text) first")
        return self._mark

    def _on_device(self, ids: Tensor) -> Tensor:
        return ids.to(self.host.model.device)

    def _forward(self, ids: Tensor, cache: Cache) -> None:
        self.host.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _check_croppable(self, cache: Cache, aware: Tensor) -> None:
        if aware.shape[1] and any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            raise UnsupportedModel(
                f"question= cannot be removed from the state that {type(self.host.model).__name__} keeps; read the "
                "text without it"
            )
