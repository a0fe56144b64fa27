"""AttnRank: put the most relevant documents at the places of a prompt that the model attends to most.

Attention Basin: Why Contextual Position Matters in Large Language Models (2025), arXiv 2508.05128. A model attends to
the first and the last of several delimited items more than to those between, whatever they say: a basin. Its profile
is measured once; later prompts are put in order by it, without a further pass.

There is no release. The matching of ranks is the paper's. The layers to average over and the normalisation of each
prompt are reconstructed, so that they are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.steer.parts.document_attention import Layers, checked_layers, document_attention
from foveate.steer.parts.document_prompt import BuildPrompt, DocumentPrompt, PromptFormat
from foveate.steer.parts.head_table import Heads, checked_heads

#: `progress(step, steps, note)`.
Progress = Callable[[int, int, str], None]


@final
@dataclass(frozen=True, eq=False)
class AttnRank:
    """Orders documents so that relevance and a model's preference for places have the same ranks.

        rank = AttnRank.calibrate(model, tokenizer, documents, questions, items=10, samples=100)    # once
        rank.arrange(found, relevance)          # for each prompt: no pass of the model

    Nothing is trained, and the model is unchanged. Cost: `samples` prompts to calibrate, then a sort. The wrong choice
    if relevance is unknown (`AttentionSorting` reads it from the model), or if the profile is flat, which
    `basin_index` shows.

    Args:
        profile: the share of attention that each place of a prompt gets, `(k,)`; see `position_profile`. For another
            number of documents it is resampled linearly.
    """

    profile: Float[Tensor, " k"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "profile", _profile(self.profile))

    @classmethod
    def calibrate(
        cls, model: object, tokenizer: PreTrainedTokenizerBase | None, documents: Sequence[Any],
        questions: Sequence[Any], *, items: int, samples: int = 500, build: BuildPrompt | None = None,
        layers: Layers = "all", heads: Heads = None, query: Literal["last", "question"] = "last",
        per: Literal["sum", "mean"] = "sum", chunk: int | None = None, generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> Self:  # fmt: skip
        """Measure a model's profile on prompts of documents drawn at random, in random order; labels are not needed.

        Args:
            model: a decoder.
            tokenizer: the model's tokenizer; None if `build` needs none.
            documents: at least `items` documents of the kind that later prompts hold.
            questions: one is drawn for each prompt.
            items: documents of a prompt.
            samples: number of prompts.
            build: builds a prompt; None is `PromptFormat()`.
            layers, heads, query, per, chunk: see `position_profile`.
            generator: draws documents and questions.
            progress: called after each prompt.
        """
        validate.count("items", items, 1)
        validate.count("samples", samples, 1)
        if len(documents) < items or not len(questions):
            raise OptionError(
                f"documents must be at least items={items} and questions at least one; got {len(documents)} and "
                f"{len(questions)}"
            )
        make = PromptFormat() if build is None else build

        def prompts() -> Iterator[DocumentPrompt]:
            for done in range(samples):
                chosen = torch.randperm(len(documents), generator=generator)[:items].tolist()
                question = questions[int(torch.randint(len(questions), (), generator=generator))]
                yield make(tokenizer, [documents[number] for number in chosen], question)
                if progress is not None:
                    progress(done + 1, samples, "prompts")

        return cls(position_profile(model, prompts(), layers, query, per, heads=heads, chunk=chunk))

    def order(self, relevance: Float[Tensor, " k"] | Sequence[float]) -> Int[Tensor, " k"]:
        """Return the number of the document for each place: the most relevant for the place with most attention, etc.

        Ties keep their order.

        Args:
            relevance: a score for each document, from any retriever; higher is more relevant.
        """
        scores = torch.as_tensor(relevance, dtype=torch.float64)
        if scores.dim() != 1 or not len(scores) or not bool(scores.isfinite().all()):
            raise ShapeError(f"relevance must be finite numbers (k,), one for each document; got {shown(relevance)}")
        places = self.resampled(len(scores)).profile.argsort(descending=True, stable=True)
        return torch.empty_like(places).index_copy_(0, places, scores.argsort(descending=True, stable=True))

    def arrange(self, documents: Sequence[Any], relevance: Float[Tensor, " k"] | Sequence[float]) -> list[Any]:
        """Return the documents in the order of `order`."""
        order = self.order(relevance)
        if len(documents) != len(order):
            raise ShapeError(f"documents and relevance must have one length; got {len(documents)} and {len(order)}")
        return [documents[number] for number in order.tolist()]

    def resampled(self, items: int) -> Self:
        """Return the same profile for another number of items: linear between places, from first to last."""
        validate.count("items", items, 1)
        if items == len(self.profile):
            return self
        profile = self.profile.expand(2) if len(self.profile) == 1 else self.profile
        shape = F.interpolate(profile[None, None], size=items, mode="linear", align_corners=True)[0, 0]
        return type(self)(shape / shape.sum())


def position_profile(
    model: object,
    prompts: Iterable[DocumentPrompt],
    layers: Layers = "all",
    query: Literal["last", "question"] = "last",
    per: Literal["sum", "mean"] = "sum",
    *,
    heads: Heads = None,
    chunk: int | None = None,
) -> Float[Tensor, " k"]:
    """Return the mean share of attention that each place of a prompt gets from its end; the shares add up to 1.

    Each prompt counts once: the attention of its documents is divided by their sum. Prompts should hold their
    documents in random order, so that what these say averages out.

    Args:
        model: a decoder.
        prompts: prompts of the same number of documents.
        layers: the layers to average over; the basin shows best in "shallow" ones.
        query: "last" is the last token of the prompt, "question" the mean over all tokens after the last document.
        per: "sum" adds up a document's tokens; "mean" divides by their number, for documents of unequal lengths.
        heads, chunk: see `document_attention`.
    """
    validate.one_of("per", per, ("sum", "mean"))
    layers, heads = checked_layers(layers), checked_heads(heads)
    shares: list[Tensor] = []
    normalise: Literal["none", "length"] = "none" if per == "sum" else "length"
    for prompt in prompts:
        attention = document_attention(
            model, prompt.ids, prompt.spans, layers, heads, normalise, query=query, chunk=chunk
        ).double()
        if shares and len(attention) != len(shares[0]):
            raise OptionError(f"prompts must hold equally many documents; got {len(shares[0])} and {len(attention)}")
        if not float(attention.sum()) > 0:
            raise OptionError("prompts: the documents of one receive no attention in the chosen layers")
        shares.append(attention / attention.sum())
    if not shares:
        raise OptionError("prompts must hold at least one prompt; got none")
    return torch.stack(shares).mean(0)


def basin_index(profile: Float[Tensor, " k"] | Sequence[float]) -> float:
    """Return how much more attention the first and the last place get than those between, on average.

    It is positive for a basin, near 0 for a flat profile, and negative where the middle gets most.
    """
    found = _profile(profile)
    if len(found) < 3:
        raise ShapeError(f"profile must have at least three places; got {len(found)}")
    return float((found[0] + found[-1]) / 2 - found[1:-1].mean())


def _profile(profile: Tensor | Sequence[float]) -> Float[Tensor, " k"]:
    found = torch.as_tensor(profile, dtype=torch.float64).cpu()
    if found.dim() != 1 or not len(found) or not bool(found.isfinite().all()) or bool((found < 0).any()):
        raise ShapeError(f"profile must be numbers (k,), none below 0; got {shown(profile)}")
    return found
