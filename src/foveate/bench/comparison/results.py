"""The results of one run of `compare`, as plain data without other packages.

A `Comparison` holds one `Row` per method, and a row one `Answer` per example. Saving to `results.json` and loading is
lossless with two exceptions, which JSON cannot express: NaN and infinity become `null` and load as NaN, and options
that are not plain data become their `str`. Intervals and ratios are computed from the answers; the file also has them,
as each row's "derived", for other programs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from foveate.bench.parts import intervals, plaindata
from foveate.bench.parts.intervals import Interval
from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS

__all__ = ["LOSS", "MEASURES", "Answer", "Comparison", "Ratio", "Row", "plain", "write_atomic"]

FORMAT = "foveate.comparison/3"
MEASURES = (
    "score",
    "agnostic_score",
    "answer_tokens",
    "cache_kept",
    "keys_read",
    "prefill_ms",
    "decode_ms",
    "memory_mb",
    "peak_mb",
)
TIMES = ("prefill_ms", "decode_ms")
PAIRS = 3  # the fewest pairs of times for a ratio
_WIDE, _UNDECIDED = 2.0, 1.3  # the largest ratio of an interval's ends, in general and if 1 is inside


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt, and its cost.

    Args:
        score: 0..1, or the loss; NaN if there is none.
        tokens: the tokens of the prompt.
        cache_kept, keys_read: as in `Row`, for this prompt.
        prefill_ms, decode_ms: as in `Row`, for this prompt.
        base_prefill_ms, base_decode_ms: the baseline's times for the same prompt, measured just before or after.
        answer_tokens: tokens of the output up to its end, for tasks that say where an output ends; else NaN.
        agnostic_output, agnostic_score: output and score where the method compressed the context without knowing the
            question; empty and NaN if the prompt has no such division.
        groups: the groups by which its benchmark reports scores, with commas between them, such as "easy, short".
        error: the reason of a missing answer; empty otherwise.
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
    groups: str = ""


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
    answer_tokens: float = math.nan
    agnostic_score: float = math.nan

    @property
    def memory_mb(self) -> float:
        """The live memory between calls, the larger of its two measurements."""
        return max(self.prompt_mb, self.answer_mb)

    @property
    def score_interval(self) -> Interval | None:
        """The 95 % interval of the mean score."""
        return intervals.of_scores([answer.score for answer in self.answers])

    def by_group(self) -> dict[str, dict[str, float]]:
        """Return the mean scores of each group of examples, see `Answer.groups`."""
        names = dict.fromkeys(name for answer in self.answers for name in answer.groups.split(", ") if name)
        chosen = {name: [each for each in self.answers if name in each.groups.split(", ")] for name in names}
        return {
            name: {measure: _over(fmean, answers, measure) for measure in ("score", "agnostic_score")}
            for name, answers in chosen.items()
        }

    @property
    def agnostic_interval(self) -> Interval | None:
        """The 95 % interval of the mean query-agnostic score."""
        return intervals.of_scores([answer.agnostic_score for answer in self.answers])

    @classmethod
    def failed(cls, method: str, title: str, error: str, options: dict | None = None) -> Row:
        """Create the row of a method without results, with the reason."""
        return cls(method, title, options or {}, error=error)

    @classmethod
    def summing(
        cls, method: str, title: str, options: dict, answers: list[Answer], memory: Sequence[float], error: str = ""
    ) -> Row:
        """Summarise answers as a row; `memory` has megabytes after the prompt, after the answer, and at the peak."""
        score, kept, read = (_over(fmean, answers, name) for name in ("score", "cache_kept", "keys_read"))
        prefill, decode = (_over(median, answers, name) for name in TIMES)
        prompt, answer, peak = memory
        written, agnostic = (_over(fmean, answers, name) for name in ("answer_tokens", "agnostic_score"))
        return cls(
            method, title, options, score, kept, read, prefill, decode, prompt, answer, peak, answers, error, written,
            agnostic,
        )  # fmt: skip


class Ratio(NamedTuple):
    """A measure divided by the baseline's, and for times the 95 % interval of the median over pairs."""

    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """True if the interval is narrow enough for a conclusion; 0.4 to 1.5 is neither faster nor slower."""
        undecided = self.low < 1 < self.high and self.high > _UNDECIDED * self.low
        return not undecided and self.high <= _WIDE * self.low


@dataclass(frozen=True)
class Comparison:
    """Methods side by side in one run; append a `Row` to `rows` as each is measured.

    Args:
        length: the length of the prompts; None if the task has no such setting.
        budget: the share of each prompt's cache that every method may use.
        examples: how many prompts each method answered.
        versions: the versions of the packages, by name.
        baseline: the key of the method to which ratios refer.
        metric: the score, one of `foveate.tasks.base.scores.SCORES`, or "loss".
        batch: how many prompts ran together.
        digest: the digest of all inputs, such as the model's weights and the prompts.
    """

    model: str
    task: str
    seed: int
    device: str
    dtype: str
    budget: float
    examples: int
    length: int | None
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    baseline: str = "full"
    metric: str = "begins"
    batch: int = 1
    digest: str = ""

    def base(self) -> Row | None:
        """Return the baseline's row, or None before it is measured."""
        return next((row for row in self.rows if row.method == self.baseline), None)

    def ratio(self, row: Row, measure: str) -> float | None:
        """Return `row`'s `measure` over the baseline's; None if either is missing, or a time's ratio is uncertain."""
        found = self.paired(row, measure)
        return found.value if found is not None and found.is_certain else None

    def paired(self, row: Row, measure: str) -> Ratio | None:
        """Return `ratio` with its interval, of any width. Times are compared per prompt, other measures directly."""
        if measure not in MEASURES:
            raise OptionError(f'measure="{measure}" must be one of {", ".join(MEASURES)}')
        if measure in TIMES:
            pairs = [(getattr(answer, measure), getattr(answer, f"base_{measure}")) for answer in row.answers]
            ratios = [time / base for time, base in pairs if time > 0 and base > 0]
            return Ratio(*intervals.of_median(ratios)) if len(ratios) >= PAIRS else None
        base = self.base()
        if base is None:
            return None
        value, reference = getattr(row, measure), getattr(base, measure)
        if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
            return None
        return Ratio(*[value / reference] * 3)

    def settings(self) -> dict[str, Any]:
        """Return all that describes the run, without its results."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self) if item.name != "rows"}

    def to_json(self) -> str:
        """Return one JSON object, which `from_json` reads."""
        rows = [{**plain(row), "derived": plain(self._derived(row))} for row in self.rows]
        return json.dumps({"format": FORMAT, **self.settings(), "rows": rows}, indent=1, allow_nan=False) + "\n"

    def _derived(self, row: Row) -> dict[str, Any]:
        ratios = {measure: self.paired(row, measure) for measure in MEASURES}
        return {
            "memory_mb": row.memory_mb,
            "score_interval": row.score_interval,
            "groups": row.by_group(),
            "ratios": {name: None if ratio is None else ratio._asdict() for name, ratio in ratios.items()},
            "withheld": [name for name, ratio in ratios.items() if ratio is not None and not ratio.is_certain],
        }

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what `to_json` wrote; an `OptionError` names the first invalid field."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"not valid JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise OptionError(f'not a comparison: "format" must be "{FORMAT}"')
        values = {name: value for name, value in content.items() if name != "format"}
        if isinstance(values.get("rows"), list):
            rows = values["rows"]
            values["rows"] = [
                {name: value for name, value in row.items() if name != "derived"} if isinstance(row, dict) else row
                for row in rows
            ]
        return plaindata.build(cls, values, {"list[Row]": Row, "list[Answer]": Answer})

    def save(self, path: str | os.PathLike) -> Path:
        """Write `results.json` atomically: a reader of `path` sees the old or the new file, never a part."""
        return write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Comparison:
        """Read what `save` wrote; for a missing or malformed file, an `OptionError` names it."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"cannot read results {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise OptionError(f"cannot read results {path}: not UTF-8 text") from None
        except OptionError as error:
            raise OptionError(f"cannot read results {path}: {error}") from None


def _over(summary: Any, answers: list[Answer], name: str) -> float:
    known = [value for answer in answers if math.isfinite(value := getattr(answer, name))]
    return summary(known) if known else math.nan
