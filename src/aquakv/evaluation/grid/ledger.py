"""A file of rows, one JSON object a line, that is only ever appended to.

A process that is killed while it writes leaves a line without its end. The next one to write recognises it,
keeps it if it is a whole row and drops it if not; lines that were ended are never touched. Of several rows
with one key the last counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aquakv.errors import DataError, OutputError
from aquakv.evaluation.results import SCHEMA_VERSION
from aquakv.files import require_writable

Row = dict[str, Any]

#: What every line begins with, so that other files are told from torn rows.
_BEGINNING = b'{"schema_version": '


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, without a torn last one; none if there is no file.

    Raises
    ------
    DataError
        The file cannot be read, or a line is no row.
    """
    return _parse(path, _read(path))[0]


def latest_rows(rows: list[Row]) -> dict[str, Row]:
    """Return rows by key, the last of each."""
    return {row["key"]: row for row in rows}


class Ledger:
    """A file of rows, open for this process alone; see `Ledger.open`.

    Attributes
    ----------
    path
        The file.
    rows
        What it holds, in order.
    """

    def __init__(self, path: Path, rows: list[Row], descriptor: int) -> None:
        self.path, self.rows = path, rows
        self._descriptor = descriptor

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Ledger]:
        """Open or make a file, and keep other processes from writing to it meanwhile.

        Raises
        ------
        DataError
            The file is there and holds something else than rows; it is left alone.
        OutputError
            It cannot be written, or another process is writing to it.
        """
        require_writable(path, "results")
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"another process is writing to {path}; wait for it to end, or choose another file"
            ) from error
        except OSError as error:
            raise _failed(path, error) from error
        try:
            ledger = cls._mended(path)
            try:
                yield ledger
            finally:
                os.close(ledger._descriptor)
        finally:
            lock.release()

    @classmethod
    def _mended(cls, path: Path) -> Ledger:
        """Open a file; what is behind its last whole row is dropped, and that row's line is ended."""
        content = _read(path)
        rows, whole = _parse(path, content)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(descriptor, whole)
                os.lseek(descriptor, 0, os.SEEK_END)
                _write(descriptor, b"" if not whole or content[:whole].endswith(b"\n") else b"\n")
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise _failed(path, error) from error
        return cls(path, rows, descriptor)

    @property
    def latest(self) -> dict[str, Row]:
        """The rows that count, by key."""
        return latest_rows(self.rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row with its ``key``, on the disk when this returns.

        Raises
        ------
        OutputError
            It cannot be written; the file is as it was.
        ValueError
            A value is not JSON's.
        """
        row = {"schema_version": SCHEMA_VERSION, **row}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            _write(self._descriptor, line)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise _failed(self.path, error) from error
        self.rows.append(json.loads(line))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(path: Path, content: bytes) -> tuple[list[Row], int]:
    """Return the rows, and how many bytes hold them; what is behind is torn."""
    lines = content.splitlines(keepends=True)
    rows, whole = [], 0
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            is_torn = number == len(lines) and not line.endswith(b"\n")
            # A machine that lost its power may leave zeros in place of what was written.
            beginning = line.rstrip(b"\0")
            if is_torn and (beginning.startswith(_BEGINNING) or _BEGINNING.startswith(beginning)):
                break
            raise DataError(
                f"{path}, line {number}: expected a row of a grid, found something else; "
                "mend or remove the line, or choose another file"
            )
        rows.append(row)
        whole += len(line)
    return rows, whole


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("key"), str) and "status" in row
    return row if is_row and row.get("schema_version") == SCHEMA_VERSION else None


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
    os.fsync(descriptor)


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write results {path}: {error.strerror or error}; free space or choose another place"
    )
