"""What all tests share: one thread, claims that assert and are recorded, and memory that is never clean by luck."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

if os.environ.get("FOVEATE_TYPECHECK"):  # before anything of foveate is imported
    from tests.support import typecheck

    typecheck.install()

from tests.support import claims

os.environ.setdefault("FOVEATE_MACHINE", "shipped")  # which engine `auto` picks must not hang on a calibration
torch.set_num_threads(1)  # tiny tensors on busy cores are several times slower with more


def pytest_collection_finish() -> None:
    """Let the garbage collector skip the tests themselves: 20,000 of them make each collection take a second."""
    gc.collect()
    gc.freeze()


class ClaimFixture(Protocol):
    """The type of the `claim` fixture, for annotations."""

    def __call__(
        self, statement: str, *, ours: float, baseline: float, better: Literal["higher", "lower"], baseline_name: str,
        margin: float = 0.0, seed: int | None = None,
    ) -> None: ...  # fmt: skip


@pytest.fixture
def claim(request: pytest.FixtureRequest) -> ClaimFixture:
    """Assert that ours is better than the baseline, by at least `margin`, and record it for the claims ledger.

    The system is the one that the test file is named after: `test_hip.py` speaks of `hip`.
    """
    path = Path(request.node.path)

    def check(
        statement: str, *, ours: float, baseline: float, better: Literal["higher", "lower"], baseline_name: str,
        margin: float = 0.0, seed: int | None = None,
    ) -> None:  # fmt: skip
        made = claims.Claim(
            path.stem.removeprefix("test_"), statement, float(ours), float(baseline), baseline_name, better,
            float(margin), seed, request.node.nodeid,
        )  # fmt: skip
        assert made.holds, str(made)
        if folder := os.environ.get(claims.VARIABLE):
            claims.record(made, Path(folder))

    return check


def _poison(x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fresh(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        ours = caller == "foveate" or caller.startswith("foveate.")
        return _poison(made) if ours and not made.is_meta else made

    return fresh


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory that Foveate asks for holds NaN (or the largest integer): reading it before writing shows."""
    _device_constructors()  # caches torch's own functions, before they are replaced
    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
