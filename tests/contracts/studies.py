"""Every study of the catalogue, and a small one that the contract tries the base class on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from foveate.core.catalog import systems
from foveate.studies.base.report import Curve, Finding, Plot
from foveate.studies.base.study import Study, study_of

STUDIES: dict[str, type[Study]] = {row.key: study_of(row.key) for row in systems(room="studies")}


@dataclass(frozen=True)
class Coins(Study):
    """A study for tests: the share of heads among thrown coins."""

    throws: int = 1000

    def measure(self, generator: torch.Generator) -> Iterator[Finding | Plot]:
        thrown = torch.randint(2, (self.throws,), generator=generator).double()
        shares = thrown.cumsum(0) / torch.arange(1, self.throws + 1)
        yield Finding("Coins are fair.", "share of heads: 0.5", shares[-1].item(), 0.5, "equal", 0.05, "of the throws")
        shown = shares[:10].tolist()
        curve = Curve("heads", range(1, len(shown) + 1), shown, [0.5] * len(shown))
        yield Plot("Heads", "throws", "share", [curve])
        yield Finding("Coins fall.", "all of them", 1.0, 1.0, "higher")
