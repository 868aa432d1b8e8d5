"""``aquakv report``: one page from results, benchmarks, grids and codecs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquakv.evaluation.report import DEFAULT_TITLE, load, page
from aquakv.files import atomic_write, require_writable


def report(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT…",
            help="Results of eval and bench (JSON), grids (JSON lines), committed benchmarks, codec files.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")],
    title: Annotated[str, typer.Option("--title", help="Its heading.")] = DEFAULT_TITLE,
) -> None:
    """Write figures and tables of results as one HTML page that needs nothing else."""
    require_writable(out, "report")
    text = page(load(inputs), title)
    with atomic_write(out, "report") as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(f"{out}: {len(text.encode()) / 1024:.0f} KiB, one page; open it in a browser")
