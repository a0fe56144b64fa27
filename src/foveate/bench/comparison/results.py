"""What one run of `compare` measured, as plain data: needs neither torch nor any other package.

A `Comparison` holds one `Row` per method and one `Answer` per example. It goes to `results.json` and back without loss,
with two exceptions, for which JSON has no token: NaN and infinity are written as `null` and read as NaN, and options
that are not plain data are written as their `str`. Intervals and ratios are worked out of the answers; the file has
them too, as each row's "derived", for other programs to read.
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

FORMAT = "foveate.comparison/2"
MEASURES = ("score", "cache_kept", "keys_read", "prefill_ms", "decode_ms", "memory_mb", "peak_mb")
TIMES = ("prefill_ms", "decode_ms")
PAIRS = 3  # fewer pairs of times say nothing about their ratio
_WIDE, _UNDECIDED = 2.0, 1.3  # how far an interval's ends may lie apart; where it has 1 inside, how far


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt, and what that took.

    Args:
        score: 0..1, or the loss; NaN where there is none.
        tokens: of the prompt.
        cache_kept, keys_read: as in `Row`, for this prompt.
        prefill_ms, decode_ms: as in `Row`, for this prompt.
        base_prefill_ms, base_decode_ms: what the baseline took for the same prompt, just before or after.
        error: why there is no answer; empty where there is one.
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


@dataclass(frozen=True)
class Row:
    """One method on the whole task.

    Args:
        method: its key in the catalogue.
        title: its name in words, for instance that of the paper.
        options: what it ran with; `arxiv`, where present, is shown as a link to the paper.
        score: mean score of the answers, 0..1 or the loss.
        cache_kept: share of the full cache's slots that were stored, 0..1, a mean over the prompts.
        keys_read: share of the visible keys read while decoding, 0..1, a mean over the prompts.
        prefill_ms: milliseconds to read one prompt, a median.
        decode_ms: milliseconds for each generated token, a median.
        prompt_mb: megabytes of tensors alive after the longest prompt, beyond the model's weights.
        answer_mb: the same after its answer.
        peak_mb: the most at any time.
        answers: one per example, in the order of the examples.
        error: why it has no results, or not all; empty where nothing went wrong.
    """

    method: str
    title: str
    options: dict
    score: float
    cache_kept: float
    keys_read: float
    prefill_ms: float
    decode_ms: float
    prompt_mb: float
    answer_mb: float
    peak_mb: float
    answers: list[Answer] = field(default_factory=list)
    error: str = ""

    @property
    def memory_mb(self) -> float:
        """What stays alive between calls: the larger of the two moments it is measured at."""
        return max(self.prompt_mb, self.answer_mb)

    @property
    def score_interval(self) -> Interval | None:
        """The 95 % interval of the mean score."""
        return intervals.of_scores([answer.score for answer in self.answers])

    @classmethod
    def failed(cls, method: str, title: str, error: str, options: dict | None = None) -> Row:
        """A row that says only why it has nothing to say."""
        return cls(method, title, options or {}, *[math.nan] * 8, error=error)

    @classmethod
    def summing(
        cls, method: str, title: str, options: dict, answers: list[Answer], memory: Sequence[float], error: str = ""
    ) -> Row:
        """The row of these answers. `memory` has megabytes after the prompt and the answer, and at most."""
        means = [_over(fmean, answers, name) for name in ("score", "cache_kept", "keys_read")]
        medians = [_over(median, answers, name) for name in TIMES]
        return cls(method, title, options, *means, *medians, *memory, answers, error)


class Ratio(NamedTuple):
    """A measure over the baseline's, and for times the 95 % interval of the median over pairs."""

    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the interval is narrow enough to say anything: what is 0.4 or 1.5 times as long is neither."""
        undecided = self.low < 1 < self.high and self.high > _UNDECIDED * self.low
        return not undecided and self.high <= _WIDE * self.low


@dataclass(frozen=True)
class Comparison:
    """Methods side by side in one run: append a `Row` to `rows` as each is measured.

    Args:
        length: of the prompts, or None where the task has no such setting.
        budget: share of the cache of each prompt that every method was asked to stay within.
        examples: how many prompts each method answered.
        versions: of the packages that ran, by name.
        baseline: key of the method that ratios refer to.
        metric: by which rule answers are scored, see `foveate.tasks.base.scores`, or "loss".
        batch: prompts that ran together.
        digest: of all that the answers hang on, the model's weights and the prompts among them.
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
        """The baseline's row, or None while it has not been measured."""
        return next((row for row in self.rows if row.method == self.baseline), None)

    def ratio(self, row: Row, measure: str) -> float | None:
        """`row`'s `measure` over the baseline's; None where either is missing, or a time's ratio is too unsure."""
        found = self.paired(row, measure)
        return found.value if found is not None and found.is_certain else None

    def paired(self, row: Row, measure: str) -> Ratio | None:
        """`ratio` with its interval, however wide. Times are compared prompt by prompt, others as they are."""
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
        """All that describes the run but for its results."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self) if item.name != "rows"}

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back."""
        rows = [{**plain(row), "derived": plain(self._derived(row))} for row in self.rows]
        return json.dumps({"format": FORMAT, **self.settings(), "rows": rows}, indent=1, allow_nan=False) + "\n"

    def _derived(self, row: Row) -> dict[str, Any]:
        ratios = {measure: self.paired(row, measure) for measure in MEASURES}
        return {
            "memory_mb": row.memory_mb,
            "score_interval": row.score_interval,
            "ratios": {name: None if ratio is None else ratio._asdict() for name, ratio in ratios.items()},
            "withheld": [name for name, ratio in ratios.items() if ratio is not None and not ratio.is_certain],
        }

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote; an `OptionError` names the first field that does not fit."""
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
        """Write `results.json`; whoever reads `path` sees the old file or the new one, never half of one."""
        return write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Comparison:
        """Read what `save` wrote; a missing or malformed file is an `OptionError` that names the file."""
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
