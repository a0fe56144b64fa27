"""The rows of a comparison and their answers, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from foveate.bench.parts import intervals
from foveate.bench.parts.intervals import Interval

TIMES = ("prefill_ms", "decode_ms")
PAIRS = 3  # the fewest pairs of times for a ratio


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt, and its cost.

    Args:
        score: 0..1, or the loss; NaN if there is none.
        tokens: the tokens of the prompt.
        cache_kept, keys_read: as in `Row`, for this prompt.
        prefill_ms, decode_ms: as in `Row`, for this prompt.
        base_prefill_ms, base_decode_ms: the baseline's times for the same prompt, measured just before or after.
        error: the reason of a missing answer; empty otherwise.
        answer_tokens: tokens of the output up to its end, for tasks that say where an output ends; else NaN.
        agnostic_output, agnostic_score: output and score where the method compressed the context without knowing the
            question; empty and NaN if the prompt has no such division.
    """

    prompt: str
    expected: str
    output: str
    score: float
    tokens: int = 0
    cache_kept: float = math.nan
    keys_read: float = math.nan
    prefill_ms: float = math.nan
    decode_ms: float = math.nan
    base_prefill_ms: float = math.nan
    base_decode_ms: float = math.nan
    error: str = ""
    answer_tokens: float = math.nan
    agnostic_output: str = ""
    agnostic_score: float = math.nan


@dataclass(frozen=True)
class LookedUp:
    """The slots that the full cache looked up on an example that it solves, and the share that a method had dropped.

    Args:
        example: the index of the example.
        solved: 1 if the method solves it too, 0 if it breaks it.
        mass: the attention mass that a query of the answer puts on distant slots, summed over all heads, a mean.
        dropped: the share of that mass whose slots the same heads did not see under the method; NaN if it is unknown.
        slots: the slots with the most mass, each as `position: text`.
        heads: by `layer.head`, the heads with the most mass, with that mass and the share of it that was dropped.
    """

    example: int
    solved: int
    mass: float
    dropped: float
    slots: list[str]
    heads: dict


@dataclass(frozen=True)
class Row:
    """One method on the whole task.

    Args:
        method: the method's key in the catalogue.
        title: its title, such as that of the paper.
        options: its settings; `arxiv`, if present, is shown as a link to the paper.
        score: the mean score of the answers, 0..1 or the loss.
        cache_kept: the stored share of the full cache's slots, 0..1, a mean over the prompts.
        keys_read: the share of the visible keys read while decoding, 0..1, a mean over the prompts.
        prefill_ms: milliseconds to read one prompt, a median.
        decode_ms: milliseconds per generated token, a median.
        prompt_mb: megabytes of live tensors after the longest prompt, beyond the model's weights.
        answer_mb: the same after its answer.
        peak_mb: the peak of the same.
        answers: one per example, in the order of the examples.
        error: the reason of missing results; empty if there are none missing.
        budget: the share of each prompt's cache that the method may use; NaN for methods that take no budget.
        lost: what the full cache looked up and the method dropped, on the examples that were read for it; see
            `foveate.bench.comparison.lost`.
        answer_tokens: the mean length of the outputs, see `Answer`.
        agnostic_score: the mean query-agnostic score, see `Answer`.
    """

    method: str
    title: str
    options: dict
    score: float = math.nan
    cache_kept: float = math.nan
    keys_read: float = math.nan
    prefill_ms: float = math.nan
    decode_ms: float = math.nan
    prompt_mb: float = math.nan
    answer_mb: float = math.nan
    peak_mb: float = math.nan
    answers: list[Answer] = field(default_factory=list)
    error: str = ""
    budget: float = math.nan
    lost: list[LookedUp] = field(default_factory=list)
    answer_tokens: float = math.nan
    agnostic_score: float = math.nan

    @property
    def id(self) -> tuple[str, float | None]:
        """The method and its budget, which identify a row."""
        return self.method, self.budget if math.isfinite(self.budget) else None

    @property
    def memory_mb(self) -> float:
        """The live memory between calls, the larger of its two measurements."""
        return max(self.prompt_mb, self.answer_mb)

    @property
    def score_interval(self) -> Interval | None:
        """The 95 % interval of the mean score."""
        return intervals.of_scores([answer.score for answer in self.answers])

    @property
    def agnostic_interval(self) -> Interval | None:
        """The 95 % interval of the mean query-agnostic score."""
        return intervals.of_scores([answer.agnostic_score for answer in self.answers])

    @classmethod
    def failed(cls, method: str, title: str, error: str, options: dict | None = None, budget: float = math.nan) -> Row:
        """Create the row of a method without results, with the reason."""
        return cls(method, title, options or {}, error=error, budget=budget)

    @classmethod
    def summing(
        cls, method: str, title: str, options: dict, answers: list[Answer], memory: Sequence[float], error: str = "",
        budget: float = math.nan,
    ) -> Row:  # fmt: skip
        """Summarise answers as a row; `memory` has megabytes after the prompt, after the answer, and at the peak."""
        score, kept, read = (_over(fmean, answers, name) for name in ("score", "cache_kept", "keys_read"))
        prefill, decode = (_over(median, answers, name) for name in TIMES)
        prompt, answer, peak = memory
        written, agnostic = (_over(fmean, answers, name) for name in ("answer_tokens", "agnostic_score"))
        return cls(
            method, title, options, score, kept, read, prefill, decode, prompt, answer, peak, answers, error, budget,
            answer_tokens=written, agnostic_score=agnostic,
        )  # fmt: skip


def _over(summary: Any, answers: list[Answer], name: str) -> float:
    known = [value for answer in answers if math.isfinite(value := getattr(answer, name))]
    return summary(known) if known else math.nan
