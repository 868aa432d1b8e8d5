"""Texts that every Python carries: the language reference in ``pydoc_data`` and the library's source.

Both are split into train and test by a hash of the document's name, and given in the order of another
hash, so that the first few documents are varied and the same everywhere. The texts themselves differ a
little between Python versions.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from aquakv.errors import DataError

SPLITS = ("train", "test")

_TRAIN_PERCENT = 60
# Directories of tests, of data written as code, of generated files, and of what pip put there.
_SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_SMALLEST_BYTES = 500
_LARGEST_BYTES = 300_000


def pydoc_documents(split: str) -> Iterator[str]:
    """Yield the topics of ``pydoc_data.topics`` that belong to `split`.

    Raises
    ------
    DataError
        This Python comes without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "expected pydoc_data in this Python's standard library, found none; use a Python with its full "
            "standard library, or name a text file"
        ) from error
    for name in _of_split(list(topics), split):
        if topics[name].strip():
            yield topics[name]


def stdlib_documents(split: str) -> Iterator[str]:
    """Yield the standard library's source files that belong to `split`.

    Raises
    ------
    DataError
        This Python's standard library has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {path.relative_to(root).as_posix(): path for path in _source_files(root)}
    if not found:
        raise DataError(
            f"expected Python source files in the standard library at {root}, found none; use a Python with "
            "its full standard library, or name a text file"
        )
    for name in _of_split(list(found), split):
        try:
            text = found[name].read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text


def _source_files(root: Path) -> Iterator[Path]:
    """Walk over the files worth reading."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not _is_skipped(name)]
        for name in names:
            if not name.endswith(".py") or _is_skipped(name):
                continue
            path = Path(directory, name)
            try:
                size = path.stat().st_size
            except OSError:
                continue
            if not path.is_symlink() and _SMALLEST_BYTES <= size <= _LARGEST_BYTES:
                yield path


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED_DIRECTORIES or name.startswith(_SKIPPED_PREFIXES)


def _of_split(names: list[str], split: str) -> list[str]:
    """Keep the names of one split, in the order of their hashes."""
    is_train = split == "train"
    kept = [name for name in names if (_hash(f"split:{name}") % 100 < _TRAIN_PERCENT) == is_train]
    return sorted(kept, key=_hash)


def _hash(text: str) -> int:
    # A file name need not be valid Unicode; its own bytes always are something to hash.
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest(), "big")
