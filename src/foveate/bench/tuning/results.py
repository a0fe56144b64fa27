"""The result of a search, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.bench.parts import printed
from foveate.bench.parts.plaindata import plain, write_atomic

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

FORMAT = "foveate.tuning/1"
_SHOWN = 12  # rows of the table


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Args:
        setting: what it is.
        share: bytes of its cache as a share of the full cache's, a mean over examples.
        lost: what it loses of the full cache's score, a mean over examples.
        examples: the examples that it was measured on.
        verdict: "holds", "loses too much", "cannot run: ...", or of the held-out test "passed" or "failed".
        held_out: whether the examples were held out.
    """

    setting: str
    share: float
    lost: float
    examples: int
    verdict: str
    held_out: bool = False


@dataclass(frozen=True)
class Tuning:
    """The cheapest setting that keeps enough of the full cache's score, and what is known of it.

    Args:
        model, task, metric: what was measured.
        keep: the share of the score to keep.
        level: the confidence.
        setting: the setting; "full cache" if none kept enough.
        recipe: its file.
        share: bytes of its cache as a share of the full cache's, on held-out examples.
        score, full_score: the mean scores of the setting and of the full cache on held-out examples.
        lost: the mean loss as a share of the full cache's score; below 0 for a gain.
        bound: the most that is lost, as such a share, with the confidence.
        is_certain: whether `bound` decided. If there are too few examples for that, the mean loss did.
        examples, held_out: the numbers of examples for the search and for the test.
        calls: answers of the model that were made in this run.
        notes: remarks for the reader.
        tried: all that was tried.
    """

    model: str
    task: str
    metric: str
    keep: float
    level: float
    setting: str
    recipe: str
    share: float
    score: float
    full_score: float
    lost: float
    bound: float
    is_certain: bool
    examples: int
    held_out: int
    calls: int
    notes: list[str] = field(default_factory=list)
    tried: list[Trial] = field(default_factory=list)

    def claim(self) -> str:
        """Return what is claimed, in a sentence or a few."""
        if self.setting == "full cache":
            # Without a setting that holds in the search, the held-out examples were read by the full cache alone.
            tested = any(trial.held_out for trial in self.tried)
            where = "on held-out examples" if tested else "in the search, so that none was tested on held-out examples"
            return f"No setting kept {self.keep:.1%} of the full cache's score {where}: use the full cache."
        first = (
            f"{self.setting} takes {self.share:.1%} of the full cache's bytes. On {self.held_out} held-out examples it "
            f"scores {self.score:.4g}, and the full cache {self.full_score:.4g}."
        )
        worst = "more than can be said" if math.isinf(self.bound) else f"at most {100 * max(0.0, self.bound):.1f} %"
        second = f"At {self.level:.0%} confidence it loses {worst} of the score on examples like these."
        if self.is_certain:
            return f"{first} {second}"
        return (
            f"{first} {second} There are too few held-out examples to show a loss of at most {1 - self.keep:.1%}; the "
            f"mean loss decided."
        )

    def __str__(self) -> str:
        return printed.plain(*self._shown())

    def _repr_html_(self) -> str:
        return printed.html(*self._shown())

    def _shown(self) -> Sequence[RenderableType]:
        return self.table(), "", self.claim(), *self.notes

    def table(self) -> Table:
        """Return a short table: what was tested on held-out examples, and of the search the cheapest that held.

        If none held, it has those of the search that lost least.
        """
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        table.add_column("setting", overflow="fold")
        for heading in ("bytes", "lost", "examples"):
            table.add_column(heading, justify="right")
        table.add_column("")
        searched = [one for one in self.tried if not one.held_out]
        held = sorted((one for one in searched if one.verdict == "holds"), key=lambda one: one.share)
        tested = [one for one in self.tried if one.held_out]
        # Where nothing held there is nothing else to show, and the reader has to know by how much each one missed.
        shown = held or sorted((one for one in searched if not math.isnan(one.lost)), key=lambda one: one.lost)
        for one in [*shown[: max(1, _SHOWN - len(tested))][::-1], *tested]:
            numbers = (
                "-" if math.isnan(one.share) else f"{one.share:.1%}",
                "-" if math.isnan(one.lost) else f"{one.lost:.4f}",
            )
            verdict = f"{one.verdict} (held out)" if one.held_out else one.verdict
            table.add_row(Text(one.setting), *numbers, str(one.examples), verdict)
        tries = "1 setting was tried" if len(self.tried) == 1 else f"{len(self.tried)} settings were tried"
        table.caption = f"{tries}; `lost` is the loss of score, a mean over examples."
        table.caption_justify = "left"
        return table

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **plain(self), "claim": self.claim()}, indent=1, allow_nan=False) + "\n"

    def save(self, path: Path) -> Path:
        return write_atomic(path, self.to_json())
