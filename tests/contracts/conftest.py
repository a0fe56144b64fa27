"""Every contract runs on poisoned memory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None: ...
