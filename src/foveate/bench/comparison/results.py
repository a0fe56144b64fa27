"""The results of one run of `compare`, as plain data without other packages.

A `Comparison` holds one `Row` per method, and a row one `Answer` per example. Saving to `results.json` and loading is
lossless with two exceptions, which JSON cannot express: NaN and infinity become `null` and load as NaN, and options
that are not plain data become their `str`. Intervals and ratios are computed from the answers; the file also has them,
as each row's "derived", for other programs.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from foveate.bench.comparison.measured import MEASURES, Measured, Ratio
from foveate.bench.comparison.rows import PAIRS, TIMES, Answer, LookedUp, Row
from foveate.bench.known import FULL, PACKED
from foveate.bench.parts import plaindata, printed
from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.core.errors import OptionError
from foveate.tasks.base.scores import LOSS

__all__ = [
    "LOSS", "MEASURES", "PAIRS", "TIMES", "Answer", "Comparison", "LookedUp", "Ratio", "Row", "plain",
    "write_atomic",
]  # fmt: skip

FORMAT = "foveate.comparison/3"
EARLIER = "foveate.comparison/2"  # one budget, and no `lost`


@dataclass(frozen=True)
class Comparison(Measured):
    """Methods side by side in one run; append a `Row` to `rows` as each is measured. It prints as a table.

    Args:
        model, task, seed, device, dtype, budgets, examples, length, versions, rows, baseline, metric, batch: see
            `Measured`.
        digest: the digest of all inputs.
    """

    def __str__(self) -> str:
        """Return the table that `foveate compare` prints."""
        from foveate.bench.comparison.table import render

        return printed.plain(render(self))

    def _repr_html_(self) -> str:
        from foveate.bench.comparison.table import render

        return printed.html(render(self))

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
