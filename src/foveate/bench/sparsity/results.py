"""The results of `foveate bench sparse`, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from foveate.bench.parts.plaindata import build, plain, write_atomic
from foveate.core.errors import OptionError

FORMAT = "foveate.sparse/1"
#: The file in the output folder.
RESULTS = "sparse.json"


@dataclass(frozen=True)
class SparseRow:
    """An operator at one length.

    Args:
        operator: its key.
        length: queries and keys.
        pattern: "causal self" or "self"; the dense attention that it is compared with has the same.
        engine: the engine that `auto` chose.
        chosen: the share of the visible pairs that it attends to.
        ms, dense_ms: the median milliseconds of a call, and of fused dense attention in the same rounds.
        speedup: the median of the rounds' ratios of both times; below 1, dense attention is faster.
        speedup_low, speedup_high: its interval, of 95 % if there are enough rounds, else of all rounds.
        ideal: the speed-up if only the chosen pairs cost time: 1 / `chosen`.
        error: the difference of its output and dense attention's on real inputs, as a share of the latter's norm; NaN
            if they are shorter.
        note: the reason why it did not run; then all numbers are NaN.
    """

    operator: str
    length: int
    pattern: str = ""
    engine: str = ""
    chosen: float = nan
    ms: float = nan
    dense_ms: float = nan
    speedup: float = nan
    speedup_low: float = nan
    speedup_high: float = nan
    ideal: float = nan
    error: float = nan
    note: str = ""

    @property
    def ratio(self) -> float:
        """The achieved speed-up over the ideal one."""
        return self.speedup / self.ideal


@dataclass(frozen=True)
class Sparse:
    """Sparse operators against fused dense attention.

    Args:
        settings: what the times depend on.
        rows: the operators by length.
    """

    settings: dict
    rows: list[SparseRow] = field(default_factory=list)

    def to_json(self) -> str:
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        return json.dumps({"format": FORMAT, "settings": self.settings, "rows": plain(rows)}, indent=1) + "\n"

    def save(self, folder: Path) -> Path:
        return write_atomic(folder / RESULTS, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Sparse:
        """Read what `save` wrote.

        Raises:
            OptionError: if it cannot be read.
        """
        try:
            content: Any = json.loads(path.read_text("utf-8"))
            if content["format"] != FORMAT:
                raise OptionError(f'"format" must be "{FORMAT}"')
            rows = [{name: value for name, value in row.items() if name != "ratio"} for row in content["rows"]]
            return build(cls, {"settings": content["settings"], "rows": rows}, {"list[SparseRow]": SparseRow})
        except (OSError, OptionError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"{path} cannot be read ({error}); --fresh replaces it") from None
