"""``aquakv eval grid``: everything that one file asks for, into one file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aquakv.cli import options
from aquakv.evaluation.grid import (
    Cell,
    GridProgress,
    Ledger,
    cells_of,
    latest_rows,
    pending,
    read_grid,
    read_rows,
    run_grid,
)
from aquakv.evaluation.grid.config import GridModel
from aquakv.files import require_writable
from aquakv.models.loading import LoadedModel

#: Figures shown of a task that has no line of its own here.
_FIGURES = 3

#: Of tables in files.
_WIDTH = 200


def grid(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML: models, methods and tasks.")],
    out: Annotated[Path, typer.Option("--out", help="Rows are appended here, one JSON object a line.")],
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    dtype: Annotated[
        options.Dtype | None, typer.Option("--dtype", help="Load models in this, whatever the file says.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="PATTERN", help="Cells with this in their name; *, ? and […] work."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure anew what failed before.")
    ] = False,
    list_cells: Annotated[
        bool, typer.Option("--list", help="Print the cells with their state, and measure nothing.")
    ] = False,
) -> None:
    """Measure models by methods by tasks; what has a row already is skipped, and failures are rows too."""
    require_writable(out, "results")
    config = read_grid(config_file)
    cells = cells_of(config, only, None if dtype is None else dtype.value)
    if list_cells:
        _list(cells, latest_rows(read_rows(out)))
        return

    def load(model: GridModel) -> LoadedModel:
        return options.load(model.name, options.Dtype(model.dtype), device)

    with Ledger.open(out) as ledger:
        todo = pending(cells, ledger.latest, retry_failed)
        with options.progress_bar("Grid", "cells") as bar:

            def report(state: GridProgress) -> None:
                bar(state)
                if state.row is not None and state.cell is not None:
                    line = f"[{int(state.done)}/{state.total}] {_line(state.cell, state.row)}"
                    options.messages.print(line, markup=False, highlight=False, soft_wrap=True)

            run_grid(config, todo, ledger, load, data_dir=data_dir, progress=report)
        _summary(cells, ledger.latest, out)


def _list(cells: list[Cell], rows: dict[str, dict[str, Any]]) -> None:
    states = [rows[cell.key]["status"] if cell.key in rows else "to do" for cell in cells]
    for cell, state in zip(cells, states, strict=True):
        typer.echo(f"{state:6}  {cell.label}")
    counts = {state: states.count(state) for state in ("ok", "failed", "to do")}
    typer.echo(f"{len(cells)} cells: {', '.join(f'{count} {state}' for state, count in counts.items())}")


def _summary(cells: list[Cell], rows: dict[str, dict[str, Any]], out: Path) -> None:
    """Print a table of all cells, in the order of the grid."""
    table = Table(box=None, pad_edge=False)
    for name in ("model", "task", "method", "bits", "in all"):
        table.add_column(name, justify="right" if name in ("bits", "in all") else "left")
    table.add_column("result", overflow="fold")
    failed = 0
    for cell in cells:
        row = rows.get(cell.key)
        if row is None:
            continue
        failed += row["status"] == "failed"
        sizes = [_number(row.get(name)) for name in ("bits_per_value", "bits_per_value_total")]
        table.add_row(cell.model.name, cell.task.label, cell.method, *sizes, _result(cell, row))
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table, markup=False, highlight=False)
    typer.echo(f"{len(cells)} cells, {failed} failed; rows in {out}")


def _line(cell: Cell, row: dict[str, Any]) -> str:
    bits = f"{row['bits_per_value']:.3f} bits, " if row.get("bits_per_value") else ""
    return f"{cell.label}: {bits}{_result(cell, row)}"


def _result(cell: Cell, row: dict[str, Any]) -> str:
    """Return a row's most telling figures, or why it has none."""
    if row["status"] == "failed":
        return f"failed: {row['error_type']}: {row['error']}"
    if "relative_increase" in row:
        return (
            f"perplexity {row['perplexity']:.3f} ({100 * row['relative_increase']:+.2f} %), "
            f"KL {row['mean_kl']:.5f}, top-1 {100 * row['top1_agreement']:.2f} %"
        )
    known = {*cell.task.settings, "schema_version", "batch_size", "elapsed_s", "tokens"}
    figures = {
        name: value
        for name, value in row.items()
        if isinstance(value, float) and name not in known and not name.startswith("bits_per")
    }
    return ", ".join(f"{name} {_number(value)}" for name, value in list(figures.items())[:_FIGURES])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
