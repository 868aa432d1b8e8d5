"""Tables whose best figures are marked, in bold and by a star."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from aquakv.evaluation.report.formats import NONE
from aquakv.evaluation.report.markup import Markup, tag

Row = TypeVar("Row")

#: Columns from which on a table is set closer.
_MANY = 8


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column.

    Attributes
    ----------
    title
        Its head.
    value
        A row's number, or its text in columns that are not ``numeric``; None leaves the cell without one.
    text
        How a number is written.
    best
        Whether low or high numbers are better; None marks none.
    numeric
        Numbers are aligned to the right.
    """

    title: str
    value: Callable[[Row], float | str | None]
    text: Callable[[float], str] = str
    best: Literal["low", "high"] | None = None
    numeric: bool = True

    def written(self, row: Row) -> str:
        """Return a cell's text."""
        value = self.value(row)
        if value is None:
            return NONE
        return value if isinstance(value, str) else self.text(value)


def best_cells(column: Column[Row], rows: Sequence[Row]) -> set[int]:
    """Return which rows are the best of a column: none of one number only, several if they look equal.

    Rows whose figures are written alike are level: what a table does not show it does not judge.
    """
    numbers = {
        index: value for index, row in enumerate(rows) if isinstance(value := column.value(row), (int, float))
    }
    if column.best is None or len(numbers) < 2:
        return set()
    pick = min if column.best == "low" else max
    winner = column.text(pick(numbers.values()))
    found = {index for index, value in numbers.items() if column.text(value) == winner}
    return set() if len(found) == len(numbers) else found


def table(
    caption: str,
    columns: Sequence[Column[Row]],
    groups: Sequence[tuple[str | None, Sequence[Row]]],
    *,
    judged: Callable[[Row], bool] = lambda _row: True,
    strong: Callable[[Row], bool] = lambda _row: False,
) -> Markup:
    """Return a table in a box that scrolls by itself, its first column held in place.

    Parameters
    ----------
    caption
        What the table shows.
    columns
        The first one names the rows.
    groups
        Rows below a heading, or None; the best of each group are marked.
    judged
        Rows that compete; the others, such as the exact cache, are never marked.
    strong
        Rows whose names are emphasised.
    """
    head = tag(
        "tr",
        [tag("th", column.title, scope="col", class_="n" if column.numeric else None) for column in columns],
    )
    bodies = []
    for title, rows in groups:
        competing = [row for row in rows if judged(row)]
        best = {
            (id(column), id(competing[index]))
            for column in columns
            for index in best_cells(column, competing)
        }
        lines = []
        if title is not None:
            lines.append(
                tag(
                    "tr", tag("th", tag("span", title), scope="rowgroup", colspan=len(columns)), class_="band"
                )
            )
        for row in rows:
            name = tag("th", columns[0].written(row), scope="row", class_="strong" if strong(row) else None)
            cells = [_cell(column, row, (id(column), id(row)) in best) for column in columns[1:]]
            lines.append(tag("tr", name, cells))
        bodies.append(tag("tbody", lines))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("span", caption)),
            tag("thead", head),
            bodies,
            class_="dense" if len(columns) > _MANY else None,
        ),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )


def _cell(column: Column[Row], row: Row, best: bool) -> Markup:
    text = column.written(row)
    kind = ("n" if column.numeric else "") + (" best" if best else "")
    if not best:
        return tag("td", text, class_=kind or None)
    star = tag("span", "★", class_="star", aria_label="best", role="img")
    return tag("td", tag("b", text), star, class_=kind.strip())
