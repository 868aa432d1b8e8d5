"""Write files all or nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aquakv.errors import OutputError


@contextmanager
def atomic_write(path: Path, what: str) -> Iterator[Path]:
    """Give a temporary neighbour of ``path`` to write to, and rename it over ``path`` at the end.

    Parameters
    ----------
    path
        The file to make or replace.
    what
        What the file is, for the message.

    Raises
    ------
    OutputError
        The operating system refuses (disk full, no such directory, no permission). Nothing half-written
        stays behind, and an older file stays as it was; so too if the block raises anything else.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {what} {path}: {reason}; free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(path: Path, what: str) -> None:
    """Raise `OutputError` now rather than after hours of work if ``path`` cannot be written."""
    if path.is_dir():
        raise OutputError(f"cannot write {what} {path}: it is a directory; give a file name")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {what} {path}: {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(
            f"cannot write {what} {path}: {path.parent} may not be written; choose another place"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
