"""Multiple-choice prompts, and what a head reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import ShapeError, shown
from foveate.lens.circuits.head_inputs import head_inputs
from foveate.lens.circuits.interventions import Head


@final
@dataclass(frozen=True, eq=False)
class LetterPrompts:
    """Multiple-choice prompts whose last token predicts the letter of the correct option.

    Args:
        ids: the prompts; shorter ones are padded on the left.
        labels: positions of the options' letters, in the order of the options.
        correct: the number of the correct option.
        contents: positions of the options' contents, one token each; None if unknown.
        attention_mask: 0 for padding.
    """

    ids: Int[Tensor, "b n"]
    labels: Int[Tensor, "b c"]
    correct: Int[Tensor, " b"]
    contents: Int[Tensor, "b c"] | None = None
    attention_mask: Int[Tensor, "b n"] | None = None

    def __post_init__(self) -> None:
        batch, n = self.ids.shape
        for name, at in (("labels", self.labels), ("contents", self.contents)):
            if at is not None and (at.ndim != 2 or len(at) != batch or int(at.min()) < 0 or int(at.max()) >= n):
                raise ShapeError(f"{name} must be positions (B={batch}, options) in 0..{n - 1}; got {shown(at)}")
        if self.labels.shape[1] < 2 or (self.contents is not None and self.contents.shape != self.labels.shape):
            raise ShapeError("labels must be at least two for each prompt, and contents as many")
        if self.correct.shape != (batch,) or not 0 <= int(self.correct.min()) <= int(self.correct.max()) < self.options:
            raise ShapeError(
                f"correct must be numbers (B={batch},) in 0..{self.options - 1}; got {shown(self.correct)}"
            )

    @property
    def options(self) -> int:
        return self.labels.shape[1]

    @property
    def letters(self) -> Int[Tensor, "b c"]:
        """The token of each option's letter."""
        return self.ids.gather(1, self.labels)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids} | (
            {} if self.attention_mask is None else {"attention_mask": self.attention_mask}
        )

    def lead(self, values: Float[Tensor, "b ... c"]) -> Float[Tensor, "b ..."]:
        """Return the value of the correct option less the mean of the others."""
        at = self.correct.to(values.device).view(-1, *[1] * (values.ndim - 1)).expand(*values.shape[:-1], 1)
        right = values.gather(-1, at)[..., 0]
        return right - (values.sum(-1) - right) / (self.options - 1)


@final
@dataclass(frozen=True, eq=False)
class LetterInputs:
    """The inputs of a head: the queries of the last token, and the keys and values of the labels."""

    q: Float[Tensor, "b d"]
    k: Float[Tensor, "b c d"]
    v: Float[Tensor, "b c dv"]


def letter_inputs(model: object, prompts: LetterPrompts, head: Head) -> LetterInputs:
    """Return a head's queries, keys and values of multiple-choice prompts, after the rotary embedding."""
    found = head_inputs(model, prompts.inputs, [head])
    rows = torch.arange(len(prompts.ids))[:, None]
    return LetterInputs(
        found["q", head][:, -1], found["k", head][rows, prompts.labels], found["v", head][rows, prompts.labels]
    )
