"""The results of one look: tokens, measures by head and by token, maps of chosen heads, and roles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from foveate.bench.parts.plaindata import plain, write_atomic
from foveate.bench.parts.table_file import write_table
from foveate.lens.heads.roles import Role
from foveate.lens.survey import Survey
from foveate.lens.views.attention_view import AttentionView
from foveate.lens.views.head_map import HeadMap
from foveate.lens.views.joint_matrix import JointMatrix

FORMAT = "foveate.look/1"
_COLUMNS = {"model": str, "layer": int, "head": int, "measure": str, "value": float}
_OF_TEXTS = {"spread": float, "low": float, "high": float, "texts": int}


@dataclass(frozen=True, eq=False)
class Measured:
    """A measure of all heads; NaN for layers and heads that a lens does not see.

    Args:
        name: the measure's name.
        over: "queries" or "keys": the tokens that `values` belongs to.
        table: one number for each head, `(layers, heads)`.
        values: one number for each head and token, `(layers, heads, tokens)`.
    """

    name: str
    over: str
    table: Float[Tensor, "l h"]
    values: Float[Tensor, "l h n"]


@dataclass(frozen=True, eq=False)
class Views:
    """All heads of a text: the view of their maps, and the joint pictures of their queries and keys."""

    view: AttentionView
    joint: JointMatrix

    def save(self, folder: Path) -> None:
        """Write `view.html` and `joint.html`."""
        for path, page in zip(self.paths(folder), (self.view.html(), self.joint.html()), strict=True):
            write_atomic(path, page)

    @staticmethod
    def paths(folder: Path) -> tuple[Path, Path]:
        """Return the paths of both pages."""
        return folder / "view.html", folder / "joint.html"


@dataclass(frozen=True, eq=False)
class Over:
    """The texts of a file that measures are means over.

    Args:
        data: the file as the user named it.
        survey: the measures of its texts.
        tokens: the number of their tokens.
        notes: what was left out.
    """

    data: str
    survey: Survey
    tokens: int
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data: spreads and intervals by measure, as the means are."""
        low, high = self.survey.interval()
        parts = {"spread": self.survey.spread, "low": low, "high": high, "counted": self.survey.count}
        tables = {name: dict(zip(self.survey.names, part.tolist(), strict=True)) for name, part in parts.items()}
        return {
            "data": self.data, "texts": self.survey.texts, "data_tokens": self.tokens,
            "notes": list(self.notes), **tables,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Looked:
    """A text under a lens, or many texts of which one is shown.

    Args:
        model: the model as the user named it.
        tokens: the texts of all tokens; a part of a character is U+FFFD.
        prompt: the number of tokens that were read; the others were generated.
        measures: in the order in which they were asked for.
        maps: the weights of chosen heads.
        roles: the roles that heads have; None if they were not asked for.
        unseen: reasons by layer, for layers that a lens cannot see.
        settings: device, dtype and versions.
        views: all maps, queries and keys; None if they were not asked for.
        ids: the tokens.
        over: the texts that the tables of `measures` are means over, if they are many; `values` are those of the first.
    """

    model: str
    tokens: Sequence[str]
    prompt: int
    measures: Sequence[Measured]
    maps: Sequence[HeadMap] = ()
    roles: Sequence[Role] | None = None
    unseen: dict[int, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    views: Views | None = None
    ids: Sequence[int] = ()
    over: Over | None = None

    @property
    def layers(self) -> int:
        return self.measures[0].table.shape[0]

    @property
    def heads(self) -> int:
        return self.measures[0].table.shape[1]

    def to_json(self) -> str:
        """Return tokens, tables and roles as JSON; values of single tokens and maps are left out."""
        found: dict[str, Any] = {
            "format": FORMAT, "model": self.model, **self.settings, "layers": self.layers, "heads": self.heads,
            "prompt_tokens": self.prompt, "tokens": list(self.tokens),
            "measures": {measure.name: measure.table.tolist() for measure in self.measures},
            "roles": self.roles, "unseen": self.unseen,
        } | ({} if self.over is None else self.over.to_json())  # fmt: skip
        return json.dumps(plain(found), ensure_ascii=False, allow_nan=False) + "\n"

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer, head and measure."""
        if self.over is not None:
            return [{"model": self.model, **row} for row in self.over.survey.table()]
        return [
            {"model": self.model, "layer": layer, "head": head, "measure": measure.name, "value": value}
            for measure in self.measures
            for layer, line in enumerate(measure.table.tolist())
            for head, value in enumerate(line)
        ]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write `look.json`, and the rows as `look.parquet`, or as `look.csv` without pyarrow; return both paths."""
        columns = _COLUMNS if self.over is None else _COLUMNS | _OF_TEXTS
        table = folder / ("look.csv" if find_spec("pyarrow") is None else "look.parquet")
        return write_atomic(folder / "look.json", self.to_json()), write_table(self.rows(), columns, table)
