"""Needles in haystacks: how often an answer is found, by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aquakv.evaluation.report import formats
from aquakv.evaluation.report.load import Record
from aquakv.evaluation.report.markup import Markup, join, tag
from aquakv.evaluation.report.names import method_of
from aquakv.evaluation.report.section import Section, device_of, grouped, model_title, provenance
from aquakv.evaluation.report.tables import Column, table

#: Accuracy, or part of the scale, from which on text on the colour is light.
_DARK = 0.55

Cell = Mapping[str, Any]


def takes(record: Record) -> bool:
    """Say whether a row has cells by length and depth."""
    cells = record.get("cells")
    return (
        isinstance(cells, list)
        and bool(cells)
        and all(
            isinstance(cell, dict) and _ok(cell.get("length")) and _ok(cell.get("depth")) for cell in cells
        )
    )


def section(records: Sequence[Record]) -> Section | None:
    """Return the section of heat maps, if there are any."""
    rows = [record for record in records if takes(record)]
    if not rows:
        return None
    groups = grouped(rows, lambda row: (row.text("model"), device_of(row), row.text("task", "needle")))
    return Section(
        "needle",
        "Needle in a haystack",
        "A fact is hidden in a long text and asked for. Columns are lengths of the text in tokens, rows are "
        "the depth at which the fact stands. The number is the part of answers that are right, in percent; "
        "the second map is how many nats the right answer loses against the exact cache.",
        join([_group(members) for members in groups.values()]),
    )


def _group(rows: Sequence[Record]) -> Markup:
    maps, losses = [], []
    loss = max(
        (value for row in rows for cell in row["cells"] if (value := _loss(cell)) is not None), default=0
    )
    for row in rows:
        label = method_of(row).label
        bits = row.number("bits_per_value")
        head = label if bits is None else f"{label}, {formats.fixed(bits, 2)} bits per value"
        maps.append(_heat_map(row["cells"], f"{head}: right answers, %", _accuracy, _whole_percent, "heat"))
        if any(_loss(cell) is not None for cell in row["cells"]) and not method_of(row).is_exact:
            scale = loss or 1.0
            losses.append(
                _heat_map(
                    row["cells"],
                    f"{head}: nats lost on the answer",
                    lambda cell, scale=scale: None if (lost := _loss(cell)) is None else lost / scale,
                    lambda part, scale=scale: formats.fixed(part * scale, 2),
                    "harm",
                )
            )
    columns: list[Column[Record]] = [
        Column("cache", lambda row: method_of(row).label, numeric=False),
        Column(
            "bits per value", lambda row: row.number("bits_per_value"), lambda bits: formats.fixed(bits, 2)
        ),
        Column("right answers", lambda row: _mean(row, _accuracy), formats.percent, "high"),
        Column("worst cell", lambda row: _worst(row), formats.percent, "high"),
        Column("nats lost, mean", lambda row: _mean(row, _loss), lambda v: formats.fixed(v, 3), "low"),
    ]
    return tag(
        "section",
        tag("h3", f"{model_title(rows[0])}, {rows[0].text('task', 'needle')}"),
        tag("div", maps, class_="charts maps"),
        tag("div", losses, class_="charts maps") if losses else None,
        table(
            "All lengths and depths together. ★ best of its column.",
            columns,
            [(None, rows)],
            judged=lambda row: not method_of(row).is_exact,
            strong=lambda row: method_of(row).ours,
        ),
        provenance(rows),
    )


def _heat_map(cells: Sequence[Cell], caption: str, part: Any, text: Any, kind: str) -> Markup:
    """Return a table whose cells are coloured by a part of one."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    found = {(cell["length"], cell["depth"]): part(cell) for cell in cells}
    head = [tag("th", formats.tokens(length), scope="col") for length in lengths]
    lines = []
    for depth in depths:
        row = []
        for length in lengths:
            value = found.get((length, depth))
            if value is None:
                row.append(tag("td", formats.NONE))
                continue
            share = min(max(float(value), 0.0), 1.0)
            row.append(
                tag(
                    "td",
                    text(value),
                    style=f"--part:{100 * share:.0f}%",
                    class_="hot" if share > _DARK else None,
                )
            )
        lines.append(tag("tr", tag("th", _whole_percent(depth), "\u00a0%", scope="row"), row))
    corner = tag("td", "depth", class_="corner")
    return tag(
        "figure",
        tag(
            "div",
            tag(
                "table",
                tag("caption", caption),
                tag("thead", tag("tr", corner, head)),
                tag("tbody", lines),
                class_=f"map {kind}",
            ),
            class_="scroll",
            role="region",
            aria_label=caption,
            tabindex=0,
        ),
        class_="half",
    )


def _whole_percent(part: float) -> str:
    # Depths come as parts or as percents.
    return formats.fixed(part if part > 1 else 100 * part, 0)


def _accuracy(cell: Cell) -> float | None:
    value = cell.get("accuracy")
    return None if value is None or not _ok(value) else float(value)


def _loss(cell: Cell) -> float | None:
    ours, exact = cell.get("answer_nll"), cell.get("exact_answer_nll")
    return float(ours - exact) if _ok(ours) and _ok(exact) else None  # type: ignore[operator]


def _mean(row: Record, figure: Any) -> float | None:
    values = [value for cell in row["cells"] if (value := figure(cell)) is not None]
    return sum(values) / len(values) if values else None


def _worst(row: Record) -> float | None:
    return min((value for cell in row["cells"] if (value := _accuracy(cell)) is not None), default=None)


def _ok(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
