"""A run's output folder: it is checked before any work, and locked during the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from foveate.core.errors import OptionError

_LOCK = ".lock"


@contextmanager
def lock_folder(out: Path) -> Iterator[Path]:
    """Create the folder and lock it; folders that were created here and stay empty are removed again.

    Raises:
        OptionError: if it is a file, cannot be written to, or is in use by another run.
    """
    created = [path for path in (out, *out.parents) if not path.exists()]
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        _create(out)
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
        _remove(created, out)


def _create(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OptionError(f"out={out} is a file; it must be a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OptionError(f"out={out} is inside a file; it must be a folder") from None
    except OSError as error:
        raise OptionError(f"out={out} cannot be created: {error.strerror or error}") from None


def _remove(created: list[Path], out: Path) -> None:
    """Remove the created folders that are still empty."""
    for path in created:
        try:
            if path == out and [item.name for item in path.iterdir()] == [_LOCK]:
                (path / _LOCK).unlink()
            path.rmdir()
        except OSError:
            return  # it is not empty, or another process uses it
