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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from foveate.bench.comparison.rows import PAIRS, TIMES, Answer, LookedUp, Row
from foveate.bench.known import FULL, PACKED
from foveate.bench.parts import intervals, plaindata
from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS

__all__ = [
    "LOSS", "MEASURES", "PAIRS", "TIMES", "Answer", "Comparison", "LookedUp", "Ratio", "Row", "plain",
    "write_atomic",
]  # fmt: skip

FORMAT = "foveate.comparison/3"
EARLIER = "foveate.comparison/2"  # one budget, and no `lost`
MEASURES = (
    "score", "agnostic_score", "answer_tokens", "cache_kept", "keys_read", "prefill_ms", "decode_ms", "memory_mb",
    "peak_mb",
)  # fmt: skip
_WIDE, _UNDECIDED = 2.0, 1.3  # the largest ratio of an interval's ends, in general and if 1 is inside


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
        budgets: the shares of each prompt's cache that the methods may use, in ascending order.
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
    budgets: list[float]
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

    def at(self, budget: float) -> Comparison:
        """Return the part with one budget: its rows, and those of methods that take none, such as the baseline."""
        rows = [row for row in self.rows if row.id[1] in (None, budget)]
        return replace(self, budgets=[budget], rows=rows)

    def parts(self) -> list[Comparison]:
        """Return the parts of all budgets."""
        return [self.at(budget) for budget in self.budgets] if len(self.budgets) > 1 else [self]

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
        if not isinstance(content, dict) or content.get("format") not in (FORMAT, EARLIER):
            raise OptionError(f'not a comparison: "format" must be "{FORMAT}"')
        values = {name: value for name, value in content.items() if name != "format"}
        if isinstance(values.get("rows"), list):
            values["rows"] = [_without_derived(row) for row in values["rows"]]
        if content["format"] == EARLIER:
            values = _upgraded(values)
        kinds = {"list[Row]": Row, "list[Answer]": Answer, "list[LookedUp]": LookedUp}
        return plaindata.build(cls, values, kinds)

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


def _without_derived(row: Any) -> Any:
    return {name: value for name, value in row.items() if name != "derived"} if isinstance(row, dict) else row


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an earlier format's file in the present format."""
    budget, rows = values.get("budget"), values.get("rows")
    found = {name: value for name, value in values.items() if name != "budget"}
    if isinstance(rows, list):
        found["rows"] = [_upgraded_row(row, budget) if isinstance(row, dict) else row for row in rows]
    return {**found, "budgets": [budget]}


def _upgraded_row(row: dict[str, Any], budget: Any) -> dict[str, Any]:
    answers, own = row.get("answers"), None if row.get("method") in (FULL, PACKED) else budget
    if isinstance(answers, list):
        new = {"answer_tokens": None, "agnostic_output": "", "agnostic_score": None}
        row = {**row, "answers": [{**new, **each} if isinstance(each, dict) else each for each in answers]}
    return {"answer_tokens": None, "agnostic_score": None, **row, "budget": own, "lost": []}
