"""Ctrl-C and SIGTERM as a wish to stop, which work under way grants at the next point where nothing is lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Called, it says whether a stop is wished for. Use it in a `with`; a second Ctrl-C there stops at once."""

    def __init__(self) -> None:
        self._wished = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._wished

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python gives nobody its signals
            self._before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._wished:
            raise KeyboardInterrupt
        self._wished = True
