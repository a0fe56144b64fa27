"""The folder that a run writes to: refused before any work where it cannot serve, and one run's own while it lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from foveate.core.errors import OptionError

_LOCK = ".lock"


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Make the folder and hold it; a folder that we made, and that nothing was written to, is taken away again.

    Raises:
        OptionError: where it is a file, cannot be written to, or is another run's at the moment.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        _make(out)
        try:
            lock.acquire()
        except Timeout:
            raise OptionError(f"out={out} is in use by another run; wait for it, or name another folder") from None
        except OSError as error:
            raise OptionError(f"out={out} cannot be written to: {error.strerror or error}") from None
        try:
            yield out
        finally:
            lock.release()
    finally:
        _remove(made, out)


def _make(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OptionError(f"out={out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OptionError(f"out={out} lies inside a file; name a folder") from None
    except OSError as error:
        raise OptionError(f"out={out} cannot be made: {error.strerror or error}") from None


def _remove(made: list[Path], out: Path) -> None:
    """Take away what we made and left empty."""
    for path in made:
        try:
            if path == out and [item.name for item in path.iterdir()] == [_LOCK]:
                (path / _LOCK).unlink()
            path.rmdir()
        except OSError:
            return  # something is in it, or somebody else took it
