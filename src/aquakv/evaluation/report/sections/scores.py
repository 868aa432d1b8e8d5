"""Suites of tasks with scores: RULER, LongBench, GSM8K and the like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.chart import HALF, Axis, Figure, Point, Series, figure
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import Method, method_of, styles
from aquakv.evaluation.report.scales import bit_ticks, linear_ends, linear_ticks, log_ends
from aquakv.evaluation.report.section import Section, device_of, grouped, model_title, provenance
from aquakv.evaluation.report.tables import Column, table


def takes(record: Record) -> bool:
    """Say whether a row has a score on a task."""
    return record.number("score") is not None


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of scores, if there are any."""
    rows = [record for record in records if takes(record)]
    if not rows:
        return None
    groups = grouped(rows, lambda row: (row.text("model"), device_of(row)))
    return Section(
        "scores",
        "Tasks with scores",
        "Scores of whole tasks, higher is better, each beside the exact cache's on the same questions.",
        join([_group(members) for members in groups.values()]),
    )


def task_title(record: Record) -> str:
    """Return what tells tasks apart: name, subset, and length."""
    subset = record.text("subset", record.text("data"))
    name = record.text("task", record.text("command").removeprefix("eval "))
    parts = [name, subset if subset != name else ""]
    if "length" in record:
        parts.append(f"{formats.number(record.number('length'), 9)} tokens")
    return " ".join(filter(None, parts)) or "task not named"


class _Entry:
    """A method's scores by task."""

    def __init__(self, method: Method, rows: Sequence[Record]) -> None:
        self.method = method
        self.rows = {task_title(row): row for row in rows}
        self.bits = next((bits for row in rows if (bits := row.number("bits_per_value")) is not None), None)

    def score(self, task: str) -> float | None:
        row = self.rows.get(task)
        return None if row is None else row.number("score")

    def mean(self, tasks: Sequence[str]) -> float | None:
        scores = [self.score(task) for task in tasks]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if len(known) == len(tasks) else None


def _group(rows: Sequence[Record]) -> Markup:
    tasks = list(dict.fromkeys(map(task_title, rows)))
    found = [
        _Entry(method_of(members[0]), members)
        for members in grouped(rows, lambda row: method_of(row).label).values()
    ]
    if not any(entry.method.is_exact for entry in found):
        baseline = _baseline(rows)
        if baseline:
            found.append(baseline)
    found.sort(key=lambda entry: (entry.method.is_exact, entry.bits or 16.0))
    columns: list[Column[_Entry]] = [
        Column("cache", lambda entry: entry.method.label, numeric=False),
        Column("bits per value", lambda entry: entry.bits, lambda bits: formats.fixed(bits, 2)),
        *(Column(task, partial(_Entry.score, task=task), _score, "high") for task in tasks),
    ]
    if len(tasks) > 1:
        columns.append(Column("mean", lambda entry: entry.mean(tasks), _score, "high"))
    return tag(
        "section",
        tag("h3", model_title(rows[0])),
        _chart(found, tasks),
        table(
            "Scores by task; the mean only where all were run. ★ best of its column beside the exact cache.",
            columns,
            [(None, found)],
            judged=lambda entry: not entry.method.is_exact,
            strong=lambda entry: entry.method.ours,
        ),
        provenance(rows),
    )


def _baseline(rows: Sequence[Record]) -> _Entry | None:
    """Return the exact cache's scores as the rows of other methods have them."""
    known = [
        Record({**row.fields, "score": row["baseline_score"], "bits_per_value": None}, row.source)
        for row in rows
        if row.number("baseline_score") is not None
    ]
    return _Entry(Method("exact cache", "exact"), known) if known else None


def _chart(found: Sequence[_Entry], tasks: Sequence[str]) -> Markup | None:
    shown = [
        (entry, entry.bits, mean)
        for entry in found
        if not entry.method.is_exact and entry.bits and (mean := entry.mean(tasks)) is not None
    ]
    if len(shown) < 2:
        return None
    exact = next((entry.mean(tasks) for entry in found if entry.method.is_exact), None)
    least, most = log_ends(bits for _, bits, _ in shown)
    low, high = linear_ends([mean for *_, mean in shown] + ([exact] if exact is not None else []))
    families = grouped(shown, lambda item: item[0].method.family)
    look = styles(list(families))
    series = [
        Series(
            family,
            [
                Point(bits, mean, f"{entry.method.label}; {formats.fixed(bits, 2)} bits, {_score(mean)}")
                for entry, bits, mean in sorted(members, key=lambda item: item[1])
            ],
            look[family],
        )
        for family, members in families.items()
    ]
    name = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    caption = f"Score, {name}, against measured bits per value; higher is better."
    return tag(
        "div",
        figure(
            Figure(
                caption,
                series,
                Axis(
                    "bits per value", least, most, bit_ticks(least, most) or [least], formats.tick, log=True
                ),
                Axis(f"Score: {name}", low, high, linear_ticks(low, high), formats.tick),
                reference=None if exact is None else (exact, "exact cache, 16 bits"),
            ),
            caption,
            size=HALF,
        ),
        class_="charts",
    )


def _score(value: float) -> str:
    return formats.percent(value) if 0 <= value <= 1 else formats.fixed(value, 1)
