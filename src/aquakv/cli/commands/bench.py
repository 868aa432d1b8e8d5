"""``aquakv bench``: time and memory of caches, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aquakv.cli import options
from aquakv.codec import ModelCodec
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.bench import WARM_UP, Row, bench_decode, bench_encode, bench_memory
from aquakv.evaluation.results import SCHEMA_VERSION, environment, file_sha256, write_json
from aquakv.files import require_writable

app = typer.Typer(help="Time and memory against the exact cache.", no_args_is_help=False)

Codecs = Annotated[list[Path], typer.Option("--codec", help="Codec file; may be given several times.")]
Contexts = Annotated[
    list[int] | None,
    typer.Option("--context", min=1, help="Tokens in the cache; may be given several times. Default: 1024."),
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Sequences at once.")]
Data = Annotated[str, typer.Option("--data", help=options.DATA_HELP)]


@app.callback()
def _group() -> None:
    """Time and memory against the exact cache."""


@app.command("decode")
def decode(
    model: options.Model,
    codec: Codecs,
    context: Contexts = None,
    rows: Rows = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that are timed.")] = 20,
    data: Data = "pydoc:test",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Time single decode steps: exact cache, general and fused path in turn, predictions compared."""
    bench = _Bench("decode", model, codec, context, rows, data, data_dir, dtype, device, json_out)
    bench.run(
        steps + WARM_UP,
        lambda loaded, codecs, tokens, contexts, report: bench_decode(
            loaded, codecs, tokens, contexts, steps, report
        ),
        {"step, ms": "median_ms", "to exact": "ratio_to_exact", "KL, nats": "mean_kl"},
    )


@app.command("encode")
def encode(
    model: options.Model,
    codec: Codecs,
    context: Contexts = None,
    rows: Rows = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Prefills that are timed.")] = 5,
    data: Data = "pydoc:test",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Time prefills, and tell what encoding adds to them."""
    bench = _Bench("encode", model, codec, context, rows, data, data_dir, dtype, device, json_out)
    bench.run(
        0,
        lambda loaded, codecs, tokens, contexts, report: bench_encode(
            loaded, codecs, tokens, contexts, repeats, report
        ),
        {"prefill, ms": "median_ms", "tokens/s": "tokens_per_second", "to exact": "ratio_to_exact"},
    )


@app.command("memory")
def memory(
    model: options.Model,
    codec: Codecs,
    context: Contexts = None,
    rows: Rows = 1,
    data: Data = "pydoc:test",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure what caches hold, and the most that a decode step takes, scratch included."""
    bench = _Bench("memory", model, codec, context, rows, data, data_dir, dtype, device, json_out)
    bench.run(
        1,
        bench_memory,
        {
            "held, bytes": "held_bytes",
            "to exact": "held_ratio_to_exact",
            "peak, bytes": "peak_bytes",
            "peak to exact": "peak_ratio_to_exact",
        },
    )


class _Bench:
    """What the commands share: loading before, table and file afterwards."""

    def __init__(
        self,
        name: str,
        model: str,
        codecs: list[Path],
        contexts: list[int] | None,
        rows: int,
        data: str,
        data_dir: Path | None,
        dtype: options.Dtype,
        device: str,
        json_out: Path | None,
    ) -> None:
        if json_out is not None:
            require_writable(json_out, "result")
        names = [path.stem for path in codecs]
        if len(set(names)) < len(names):
            raise ConfigError(f"--codec: expected files of different names, got {', '.join(names)}")
        self.codecs = {name: ModelCodec.load(path) for name, path in zip(names, codecs, strict=True)}
        self.files = dict(zip(names, codecs, strict=True))
        self.name, self.contexts, self.rows = name, sorted(set(contexts or [1024])), rows
        self.data, self.data_dir, self.json_out = data, data_dir, json_out
        self.loaded = options.load(model, dtype, device)

    def run(self, more: int, measure: Callable[..., list[Row]], columns: dict[str, str]) -> None:
        """Measure with ``more`` tokens than the longest context, print a table, write the file."""
        length = max(self.contexts) + more
        options.require_length(length, self.loaded)
        tokens: Tensor = token_sequences([self.data], self.loaded.tokenizer, self.rows, length, self.data_dir)
        with options.progress_bar("Measuring", "measurements") as report:
            rows = measure(self.loaded.model, self.codecs, tokens, self.contexts, report=report)
        if self.json_out is not None:
            write_json(self.json_out, self._content(rows))
        Console(width=140, soft_wrap=True).print(_table(rows, columns))

    def _content(self, rows: list[Row]) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "command": f"bench {self.name}",
            "model": self.loaded.name,
            "codecs": [
                {
                    "contestant": name,
                    "file": path.name,
                    "preset": self.codecs[name].config.preset,
                    "sha256": file_sha256(path),
                }
                for name, path in self.files.items()
            ],
            "data": self.data,
            **environment(),
            "rows": rows,
        }


def _table(rows: list[Row], columns: dict[str, str]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("context", justify="right")
    table.add_column("cache")
    for title in (*columns, "bits per value"):
        table.add_column(title, justify="right")
    for row in rows:
        figures = [_number(row[key]) for key in (*columns.values(), "bits_per_value")]
        table.add_row(f"{row['context']:,}", row["contestant"], *figures)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
