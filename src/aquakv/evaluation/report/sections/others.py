"""Rows of runs that failed, and rows that no other section takes."""

from __future__ import annotations

from collections.abc import Sequence

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import method_of
from aquakv.evaluation.report.section import Section, file_title, grouped, model_title, provenance
from aquakv.evaluation.report.tables import Column, table

#: What a table of other rows does not repeat.
_LEFT_OUT = frozenset(
    {"contestant", "method", "command", "device", "git_sha", "schema_version", "status", "elapsed_s"}
)
_MOST_COLUMNS = 12


def failed(record: Record) -> bool:
    """Say whether a run did not come to an end."""
    return record.get("status") == "failed"


def failures(records: Sequence[Record]) -> Section | None:
    """Return the section of failed runs, if there are any."""
    rows = [record for record in records if failed(record)]
    if not rows:
        return None
    columns: list[Column[Record]] = [
        Column("cache", lambda row: method_of(row).label, numeric=False),
        Column("model", model_title, numeric=False),
        Column("task", lambda row: row.text("task", formats.NONE), numeric=False),
        Column("error", lambda row: row.text("error", "not said"), numeric=False),
    ]
    body = join(table("Runs without a result.", columns, [(None, rows)]), provenance(rows))
    return Section("failed", "Runs that failed", "Nothing is known of these but the error.", body)


def remaining(records: Sequence[Record]) -> Section | None:
    """Return the section of all rows that are left, if there are any."""
    if not records:
        return None
    groups = grouped(records, lambda row: (row.source.name, tuple(_shown(row))))
    return Section(
        "other",
        "Other measurements",
        "Rows of benchmarks that have a shape of their own, as their files have them.",
        join([_group(rows, list(fields)) for (_, fields), rows in groups.items()]),
    )


def _shown(row: Record) -> list[str]:
    return [
        name
        for name, value in row.fields.items()
        if name not in _LEFT_OUT and isinstance(value, (str, int, float)) and not isinstance(value, bool)
    ][:_MOST_COLUMNS]


def _group(rows: Sequence[Record], fields: Sequence[str]) -> Markup:
    columns: list[Column[Record]] = [Column("row", lambda row: method_of(row).label, numeric=False)]
    for name in fields:
        numeric = all(row.number(name) is not None for row in rows)
        if numeric:
            value = lambda row, name=name: row.number(name)  # noqa: E731
            columns.append(Column(name.replace("_", " "), value, lambda number: formats.number(number, 4)))
        else:
            columns.append(
                Column(name.replace("_", " "), lambda row, name=name: row.text(name), numeric=False)
            )
    title = file_title(rows[0])
    return tag(
        "section", tag("h3", title), table(f"Rows of {title}.", columns, [(None, rows)]), provenance(rows)
    )
