"""Read what a report is made of: results, committed benchmarks, grids' lines and codec files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aquakv.codec import ModelCodec
from aquakv.errors import DataError
from aquakv.evaluation.results import SCHEMA_VERSION

#: What a file says of all its rows; a row's own word goes first.
_COMMON = ("command", "model", "codec", "baseline", "data", "seq_len", "protocol", "device", "git_sha")

_WHAT = "a result of aquakv eval, bench or grid (JSON or JSON lines) or a codec file"


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes
    ----------
    name
        Of the file, without its folder.
    device, git_sha
        What they were measured on, and with which commit; None if the file does not say.
    versions
        Of libraries, by name.
    note
        What the file says beside.
    """

    name: str
    device: str | None = None
    git_sha: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class Record:
    """One row, with what its file says of all rows."""

    fields: Mapping[str, Any]
    source: Source

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default where it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def text(self, name: str, default: str = "") -> str:
        """Return a field as text; lists are joined by commas."""
        value = self.get(name, default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return ", ".join(map(str, value))
        return str(value)

    def number(self, name: str) -> float | None:
        """Return a field as a number; None where it is missing, null, or none."""
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value)


@dataclass(frozen=True)
class CodecFigures:
    """What a codec file says of itself.

    Attributes
    ----------
    name
        Of the file.
    preset, architecture
        The codec's preset, and the model that it is for.
    bits_per_value
        Of the codes, by the codec's own account.
    layers
        Held-out figures, layer by layer.
    calibration
        The rest of the calibration record.
    """

    name: str
    preset: str
    architecture: str
    bits_per_value: float
    layers: Sequence[Mapping[str, Any]]
    calibration: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Everything that was read, in the order it was given."""

    records: Sequence[Record]
    codecs: Sequence[CodecFigures]

    @property
    def sources(self) -> list[Source]:
        """The files that rows come from, each once."""
        return list({id(record.source): record.source for record in self.records}.values())


def load(paths: Iterable[Path]) -> Inputs:
    """Read files of any of the kinds that a report takes.

    Raises
    ------
    DataError
        A file is missing, damaged, or of no kind that is known.
    CodecFileError
        A codec file is damaged.
    """
    records: list[Record] = []
    codecs: list[CodecFigures] = []
    for path in dict.fromkeys(paths):
        try:
            if _is_codec(path):
                codecs.append(_codec(path))
            else:
                records.extend(_records(path, path.read_bytes()))
        except OSError as error:
            raise DataError(f"{path} could not be read ({error.strerror}); name {_WHAT}") from error
    return Inputs(records, codecs)


def _is_codec(path: Path) -> bool:
    """Say whether this is a safetensors file: eight bytes of length, then a JSON header."""
    with path.open("rb") as file:
        start = file.read(9)
        total = file.seek(0, 2)
    header = int.from_bytes(start[:8], "little")
    return path.suffix == ".safetensors" or (start[8:] == b"{" and 0 < header < total)


def _codec(path: Path) -> CodecFigures:
    codec = ModelCodec.load(path)
    record = dict(codec.calibration)
    layers = record.pop("layers", [])
    return CodecFigures(
        path.name, codec.config.preset, codec.fingerprint.architecture, codec.bits_per_value, layers, record
    )


def _records(path: Path, content: bytes) -> Iterator[Record]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"expected {_WHAT}, got other bytes in {path}") from None
    if not text.strip():
        raise DataError(f"{path} is empty; name {_WHAT}")
    try:
        whole = _parse(text)
    except ValueError as error:
        lines = text.splitlines()
        if path.suffix != ".jsonl" and (len(lines) < 2 or not _parses(lines[0])):
            raise DataError(
                f"expected JSON in {path}, found something else ({error}); name {_WHAT}"
            ) from None
        yield from _lines(path, lines)
        return
    yield from _of_object(whole, path.name, str(path))


def _lines(path: Path, lines: Sequence[str]) -> Iterator[Record]:
    """Read JSON lines; rows that were measured alike share a source."""
    sources: dict[str, Source] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            content = _parse(line)
        except ValueError as error:
            raise DataError(
                f"expected one JSON object on {where}, found something else ({error}); mend or drop the line"
            ) from None
        for record in _of_object(content, path.name, where):
            key = json.dumps([record.source.device, record.source.git_sha, record.source.versions])
            yield Record(record.fields, sources.setdefault(key, record.source))


def _of_object(content: Any, name: str, where: str) -> Iterator[Record]:
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object in {where}, found {type(content).__name__}; name {_WHAT}")
    version = content.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where} has results of schema version {version!r}, this version of aquakv reads "
            f"{SCHEMA_VERSION}; measure again or upgrade"
        )
    rows = content.get("rows", [content])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"expected rows as JSON objects in {where}, found something else; name {_WHAT}")
    if "rows" not in content and not _is_result(content):
        found = ", ".join(list(content)[:6]) or "no fields"
        raise DataError(f"expected {_WHAT}, got other JSON in {where} ({found})")
    versions = content.get("versions")
    source = Source(
        name,
        _string(content.get("device")),
        _string(content.get("git_sha")),
        {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        _string(content.get("note")),
    )
    common = {key: content[key] for key in _COMMON if key in content}
    for row in rows:
        fields = {**common, **row}
        task = fields.get("task")
        if isinstance(task, dict):  # a grid's settings; what was measured goes first
            fields = {**{k: v for k, v in task.items() if k not in ("name", "task")}, **fields}
            fields["task"] = task.get("name", task.get("task"))
        yield Record(fields, source)


def _is_result(content: Mapping[str, Any]) -> bool:
    """Say whether an object without rows is the result of one evaluation, or one row of a grid."""
    return "command" in content or {"model", "status"} <= set(content) or "contestant" in content


def _parse(text: str) -> Any:
    def refuse(constant: str) -> float:
        raise ValueError(f"the number {constant}")

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"the number {number}")
        return value

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parses(line: str) -> bool:
    try:
        return isinstance(_parse(line), dict)
    except ValueError:
        return False


def _string(value: object) -> str | None:
    return None if value is None else str(value)
