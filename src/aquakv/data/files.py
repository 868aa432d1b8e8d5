"""Read documents from text and JSONL files, and say clearly where one is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aquakv.errors import DataError

# The first of these sets of fields that a record has makes its text; the fields are joined by the string.
_LAYOUTS = ((("text",), ""), (("context", "input"), "\n\n"), (("question", "answer"), "\n"))
_LAYOUT_NAMES = '"text", or "context" and "input" (LongBench), or "question" and "answer" (GSM8K)'


def read_text(path: Path) -> Iterator[str]:
    """Yield the file as one document, line ends and all; nothing when it is blank.

    Raises
    ------
    DataError
        The file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} could not be read ({error.strerror}); name a readable file") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected UTF-8 text in {path}, found other bytes at offset {error.start}; "
            "convert the file to UTF-8, or name another"
        ) from error
    if text.strip():
        yield text


def read_jsonl(path: Path) -> Iterator[str]:
    """Yield the text of each line's JSON object; blank lines and blank texts are passed over.

    Raises
    ------
    DataError
        The file cannot be read, or a line is not a JSON object with fields that make a text.
    """
    for where, record in read_records(path):
        text = record_text(record, where)
        if text.strip():
            yield text


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line's JSON object is, for messages, and the object; blank lines are passed over.

    Raises
    ------
    DataError
        The file cannot be read, or a line is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    where = f"line {number} of {path}"
                    yield where, _parse_line(line, where)
    except OSError as error:
        raise DataError(f"{path} could not be read ({error.strerror}); name a readable file") from error


def record_text(record: Mapping[str, object], where: str) -> str:
    """Join the fields of one record to the text it stands for.

    Raises
    ------
    DataError
        No known set of fields is there, or one of them is not text.
    """
    for fields, joint in _LAYOUTS:
        if fields[0] not in record:
            continue
        values = [record.get(field, "") for field in fields]
        for field, value in zip(fields, values, strict=True):
            if not isinstance(value, str):
                kind = type(value).__name__
                raise DataError(f'expected text in field "{field}" of {where}, found {kind}; mend the record')
        text = joint.join(value for value in values if value)  # type: ignore[misc]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"expected Unicode text in {where}, found half a surrogate pair; mend or drop the record"
            ) from error
        return text
    found = ", ".join(f'"{key}"' for key in list(record)[:8]) or "none"
    raise DataError(f"expected fields {_LAYOUT_NAMES} in {where}, found {found}; rename the fields")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 in {where}, found other bytes; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "nested too deeply or a number too long"
        raise DataError(
            f"expected one JSON object on {where}, found something else ({reason}); "
            "mend the line, or name the file .txt to read it as plain text"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"expected a JSON object on {where}, found {type(record).__name__}; "
            f"write it as an object with the fields {_LAYOUT_NAMES}"
        )
    return record
