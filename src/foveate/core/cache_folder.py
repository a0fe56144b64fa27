"""The user's folder for what Foveate may compute again: converted models, captured tensors, a machine's rates."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache() -> Path:
    """Return the user's cache folder of Foveate."""
    if named := os.environ.get("FOVEATE_CACHE"):
        return Path(named).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "foveate"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "foveate"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "foveate"
