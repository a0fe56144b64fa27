"""Attention sorting: move the documents that a model attends to to the end of its prompt, next to the question.

Attention Sorting Combats Recency Bias In Long Context Language Models (2023), arXiv 2310.01427. A model attends less to
what stands earlier, whatever it says, yet at the same place it attends more to a relevant document than to another. So
each round moves a relevant document later, where it gets more attention.

The release sorts without keeping the order of ties; here the sort is stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.host.hf.model import host
from foveate.steer.parts.document_attention import Layers, checked_layers, document_attention
from foveate.steer.parts.document_prompt import BuildPrompt, DocumentPrompt, PromptFormat
from foveate.steer.parts.head_table import Heads, checked_heads


@final
@dataclass(frozen=True, eq=False)
class SortedDocuments:
    """The result of `AttentionSorting.sort`.

    Args:
        order: numbers of the documents, in the order of the final prompt.
        prompt: the final prompt.
        orders: the order of the prompt that each round read.
        scores: the attention that each document received in each round, `(rounds, documents)`, by document.
    """

    order: tuple[int, ...]
    prompt: DocumentPrompt
    orders: tuple[tuple[int, ...], ...]
    scores: Float[Tensor, "rounds documents"]


@final
@dataclass(frozen=True, eq=False)
class AttentionSorting:
    """Sorts the documents of a prompt by the attention that they receive from the first token of the answer.

        AttentionSorting(rounds=3).order(model, tokenizer, documents, question)     # [4, 0, 2, 1, 3]
        AttentionSorting(rounds=3).answer(model, tokenizer, documents, question)    # from the sorted prompt

    Nothing is trained, and the model is unchanged. Cost: each round reads the whole prompt once, so that an answer
    takes `rounds + 1` times as long to begin; rounds end early if a round changes nothing. The wrong choice if the
    order of the documents has a meaning (a dialogue, the chapters of a book), if many questions share one cached
    prompt, or if the model attends no more to relevant documents than to others, which
    `foveate.steer.recency_profile` shows: the order that a retriever gives is then better.

    Args:
        rounds: number of times to read the prompt and sort; 0 keeps the order.
        best: where the document with the most attention goes: "last" (next to the question) or "first".
        top_k: number of documents of the final prompt, those with the most attention; None keeps all.
        layers, heads, normalise: what a document's score is averaged over; see `document_attention`. "none" sums over
            tokens, so that long documents get more.
        build: builds the prompt and finds its spans.
        chunk: tokens to read at once; None reads the prompt in one call.
    """

    rounds: int = 3
    best: Literal["last", "first"] = "last"
    top_k: int | None = None
    layers: Layers = "all"
    heads: Heads = None
    normalise: Literal["none", "length"] = "none"
    build: BuildPrompt = field(default_factory=PromptFormat)
    chunk: int | None = None

    def __post_init__(self) -> None:
        validate.count("rounds", self.rounds)
        validate.one_of("best", self.best, ("last", "first"))
        validate.one_of("normalise", self.normalise, ("none", "length"))
        for name in ("top_k", "chunk"):
            if getattr(self, name) is not None:
                validate.count(name, getattr(self, name), 1)
        if not callable(self.build):
            raise OptionError(f"build={shown(self.build)} must be a PromptFormat, or a function that builds a prompt")
        object.__setattr__(self, "heads", checked_heads(self.heads))
        object.__setattr__(self, "layers", checked_layers(self.layers))

    def order(
        self, model: object, tokenizer: PreTrainedTokenizerBase | None, documents: Sequence[Any], question: Any
    ) -> list[int]:  # fmt: skip
        """Return the numbers of the documents in their final order; see `sort`."""
        return list(self.sort(model, tokenizer, documents, question).order)

    def sort(
        self, model: object, tokenizer: PreTrainedTokenizerBase | None, documents: Sequence[Any], question: Any
    ) -> SortedDocuments:  # fmt: skip
        """Sort the documents.

        Args:
            model: a decoder.
            tokenizer: the model's tokenizer; None if `build` needs none.
            documents: texts, in the order of the first prompt.
            question: the question.
        """
        if isinstance(documents, str) or not len(documents):
            raise OptionError(f"documents must be a list of at least one document; got {shown(documents)}")
        order, orders, scores = list(range(len(documents))), [], []
        prompt = self._prompt(tokenizer, documents, order, question)
        for _ in range(self.rounds if len(order) > 1 else 0):
            attention = self._attention(model, prompt)
            orders.append(tuple(order))
            scores.append(torch.zeros_like(attention).index_copy_(0, torch.tensor(order), attention))
            after = [order[place] for place in by_attention(attention, self.best)]
            if after == order:
                break
            order = after
            prompt = self._prompt(tokenizer, documents, order, question)
        if self.top_k is not None and self.top_k < len(order):
            order = order[-self.top_k :] if self.best == "last" else order[: self.top_k]
            prompt = self._prompt(tokenizer, documents, order, question)
        rows = torch.stack(scores) if scores else torch.zeros(0, len(documents))
        return SortedDocuments(tuple(order), prompt, tuple(orders), rows)

    @torch.no_grad()
    def answer(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Any], question: Any,
        max_new_tokens: int = 36, **options: Any,
    ) -> str:  # fmt: skip
        """Sort the documents, and return the model's answer from the final prompt.

        Args:
            model, tokenizer, documents, question: see `sort`.
            max_new_tokens: the most tokens that the answer may have.
            options: of `model.generate`. Decoding is greedy unless they say otherwise.
        """
        ids = self.sort(model, tokenizer, documents, question).prompt.ids.to(host(model).model.device)
        if not options.get("do_sample"):
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **options}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    def _prompt(self, tokenizer: Any, documents: Sequence[Any], order: list[int], question: Any) -> DocumentPrompt:
        prompt = self.build(tokenizer, [documents[number] for number in order], question)
        if len(prompt.spans) != len(order):
            raise OptionError(f"build must return a span for each of {len(order)} documents; got {len(prompt.spans)}")
        return prompt

    def _attention(self, model: object, prompt: DocumentPrompt) -> Tensor:
        return document_attention(
            model, prompt.ids, prompt.spans, self.layers, self.heads, self.normalise, chunk=self.chunk
        )


def by_attention(attention: Float[Tensor, " n"], best: Literal["last", "first"] = "last") -> list[int]:
    """Return the places of documents sorted by attention, the highest last or first; ties keep their order."""
    return attention.argsort(stable=True, descending=best == "first").tolist()


def recency_profile(
    attention: Float[Tensor, "prompts places"], relevant: Int[Tensor, " prompts"]
) -> tuple[Float[Tensor, " places"], Float[Tensor, " places"]]:
    """Return the mean attention at each place of a prompt: that of relevant documents, and that of the others.

    Sorting can help where the first exceeds the second, place by place, and both grow towards the end.

    Args:
        attention: the attention that the documents of some prompts receive, in the order of the prompt.
        relevant: the place of each prompt's relevant document.

    Returns:
        Two profiles; a place that no document of the kind had is NaN.
    """
    if attention.dim() != 2 or relevant.shape != attention.shape[:1]:
        raise ShapeError(
            f"attention must be (prompts, places) and relevant (prompts,); got {shown(attention)}, {shown(relevant)}"
        )
    is_relevant = torch.arange(attention.shape[1], device=attention.device) == relevant[:, None].to(attention.device)
    nothing = attention.new_tensor(float("nan"))
    return (
        torch.where(is_relevant, attention, nothing).nanmean(0),
        torch.where(is_relevant, nothing, attention).nanmean(0),
    )
