"""Turn a ``DATA`` argument of the command line into documents.

The grammar is ``pydoc:train|test``, ``stdlib:train|test``, ``wikitext2:validation|test``,
``longbench/TASK``, ``gsm8k:test``, or the path of a text or ``.jsonl`` file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aquakv.data.files import read_jsonl, read_text
from aquakv.data.hub import hub_gsm8k, hub_longbench, hub_wikitext2
from aquakv.data.python_texts import SPLITS as PYTHON_SPLITS
from aquakv.data.python_texts import pydoc_documents, stdlib_documents
from aquakv.errors import DataError

DATA_DIR_VARIABLE = "AQUAKV_DATA_DIR"

_OPTIONS = (
    "pydoc:train, pydoc:test, stdlib:train, stdlib:test, wikitext2:validation, wikitext2:test, "
    "longbench/TASK, gsm8k:test, or the path of a text or .jsonl file"
)
_SPLITS = {
    "pydoc": PYTHON_SPLITS,
    "stdlib": PYTHON_SPLITS,
    "wikitext2": ("validation", "test"),
    "gsm8k": ("test",),
}
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class DataSource:
    """One source of documents.

    Attributes
    ----------
    spec
        The ``DATA`` argument as given.
    identity
        Equal for two sources that hold the same documents, however they were spelled.
    documents
        Starts a fresh pass over the documents, in an order that never changes. Reads as it goes, so
        taking the first few is cheap.
    """

    spec: str
    identity: str
    documents: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class DataSummary:
    """What a source held, for the record of a run.

    Attributes
    ----------
    name
        The ``DATA`` argument.
    documents, characters
        How many there are.
    sha256
        Of the documents' UTF-8 bytes, each document closed by a zero byte.
    """

    name: str
    documents: int
    characters: int
    sha256: str


def load_texts(spec: str, data_dir: str | Path | None = None) -> list[str]:
    """Return a source's documents, unaltered.

    Parameters
    ----------
    spec
        A ``DATA`` argument. A text file is one document, a line of JSONL is one document.
    data_dir
        Where named sets lie, as ``wikitext2/test.txt``, ``longbench/TASK.jsonl``, ``gsm8k/test.jsonl``;
        ``None`` reads the environment variable AQUAKV_DATA_DIR, and without that the Hub.

    Raises
    ------
    DataError
        The source is unknown, missing, unreadable or holds no text.
    """
    documents = list(open_source(spec, data_dir).documents())
    if not documents:
        raise DataError(f"expected text in {spec}, found none; name another source: {_OPTIONS}")
    return documents


def describe(spec: str, data_dir: str | Path | None = None) -> DataSummary:
    """Count and hash a source's documents; see `load_texts` for arguments and errors."""
    digest = hashlib.sha256()
    documents = load_texts(spec, data_dir)
    for document in documents:
        digest.update(document.encode("utf-8"))
        digest.update(b"\0")
    return DataSummary(spec, len(documents), sum(map(len, documents)), digest.hexdigest())


def open_source(spec: str, data_dir: str | Path | None = None) -> DataSource:
    """Find a source without reading it through; see `load_texts` for arguments and errors."""
    if not isinstance(spec, str) or not spec.strip():
        raise DataError(f"expected a data source, got {spec!r}; name one of: {_OPTIONS}")
    name, colon, split = spec.partition(":")
    if colon and name in _SPLITS:
        return _named_source(spec, name, split, data_dir)
    if spec in _SPLITS:
        raise DataError(f"{spec} needs a split; name one of: {_spelled(spec)}")
    if spec == "longbench" or spec.startswith("longbench/"):
        return _longbench_source(spec, data_dir)
    return _file_source(spec)


def _spelled(name: str) -> str:
    return ", ".join(f"{name}:{split}" for split in _SPLITS[name])


def _named_source(spec: str, name: str, split: str, data_dir: str | Path | None) -> DataSource:
    if split not in _SPLITS[name]:
        raise DataError(f"{name} has no split {split!r}; name one of: {_spelled(name)}")
    if name == "pydoc":
        return DataSource(spec, spec, lambda: pydoc_documents(split))
    if name == "stdlib":
        return DataSource(spec, spec, lambda: stdlib_documents(split))
    if name == "wikitext2":
        return _from_directory_or_hub(
            spec, data_dir, f"wikitext2/{split}.txt", read_text, lambda: hub_wikitext2(split)
        )
    return _from_directory_or_hub(
        spec, data_dir, f"gsm8k/{split}.jsonl", read_jsonl, lambda: hub_gsm8k(split)
    )


def named_file(spec: str, relative: str, data_dir: str | Path | None = None) -> Path | None:
    """Return the file of a named set below the data directory, or None where there is no such directory.

    Raises
    ------
    DataError
        There is a data directory, without that file.
    """
    root = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE) or None
    if root is None:
        return None
    path = Path(root) / relative
    if not _is_file(path):
        raise DataError(
            f"expected {spec} at {path}, found no such file; put it there, or leave out --data-dir and "
            f"{DATA_DIR_VARIABLE} to fetch it from the Hub"
        )
    return path


def _longbench_source(spec: str, data_dir: str | Path | None) -> DataSource:
    task = spec.removeprefix("longbench").removeprefix("/")
    if not _TASK.fullmatch(task):
        raise DataError(f"expected longbench/TASK with a task's name like multi_news, got {spec!r}")
    return _from_directory_or_hub(
        spec, data_dir, f"longbench/{task}.jsonl", read_jsonl, lambda: hub_longbench(task)
    )


def _from_directory_or_hub(
    spec: str,
    data_dir: str | Path | None,
    relative: str,
    read: Callable[[Path], Iterator[str]],
    fetch: Callable[[], Iterator[str]],
) -> DataSource:
    """Read `relative` below the data directory where there is one, else fetch from the Hub."""
    path = named_file(spec, relative, data_dir)
    if path is None:
        return DataSource(spec, spec, fetch)
    return DataSource(spec, str(path.resolve()), lambda: read(path))


def _file_source(spec: str) -> DataSource:
    path = Path(spec)
    if spec.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise DataError(f"no home directory is known for {spec}; give the whole path") from error
    if not _is_file(path):
        found = "a directory" if path.is_dir() else "no such file"
        raise DataError(f"expected a data source, found {found}: {spec}; name one of: {_OPTIONS}")
    read = read_jsonl if path.suffix.lower() == ".jsonl" else read_text
    return DataSource(spec, str(path.resolve()), lambda: read(path))


def _is_file(path: Path) -> bool:
    """Say whether something readable like a file is there; pipes count, directories do not."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False
