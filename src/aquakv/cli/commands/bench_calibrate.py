"""``aquakv bench calibrate``: time and memory of calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from aquakv.cli import options
from aquakv.config import preset
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation import shapes
from aquakv.evaluation.bench import Row
from aquakv.evaluation.bench_calibrate import CalibrationBench, synthetic, write_synthetic
from aquakv.evaluation.results import SCHEMA_VERSION, environment, write_json
from aquakv.files import require_writable
from aquakv.models.loading import resolve_device
from aquakv.models.streaming import open_streamed, stream_directory


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="'demo', a directory, a Hugging Face id; or, of random weights, one of "
            f"{', '.join(shapes.PREFIX + name for name in shapes.SHAPES)}.",
        ),
    ],
    samples: Annotated[int, typer.Option("--samples", min=2, help="Sequences.")] = 256,
    seq_len: options.SeqLen = 8192,
    batch_size: options.BatchSize = 4,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=2, help="First layers of random weights; the rest is projected."),
    ] = None,
    from_disk: Annotated[
        Path | None,
        typer.Option("--from-disk", help="Write random weights to this directory first, and read them back."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Read layer by layer, or load the whole model.")
    ] = True,
    preset_name: Annotated[str, typer.Option("--preset", help="Preset.")] = "decode",
    bits: Annotated[float | None, typer.Option("--bits", help="Mean bits per value.")] = None,
    offload: options.Offload = "auto",
    overlap: options.Overlap = None,
    data: Annotated[str, typer.Option("--data", help=options.DATA_HELP)] = "pydoc:train",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the other contestants' rows of an existing --json file.")
    ] = False,
) -> None:
    """Time a calibration by phase, with its peak memory and what was predicted of it."""
    if json_out is not None:
        require_writable(json_out, "result")
    config, place = preset(preset_name, bits), resolve_device(device)
    if model.startswith(shapes.PREFIX):
        shape = model.removeprefix(shapes.PREFIX)
        kind = torch.bfloat16 if dtype is options.Dtype.auto else getattr(torch, dtype.value)
        total = shapes.shape_config(shape).num_hidden_layers
        if from_disk is not None:
            options.messages.print("[dim]writing random weights[/dim]", highlight=False)
            write_synthetic(shape, layers, kind, place, from_disk)
            found = shapes.shape_config(shape, layers)
            adapter = stream_directory(from_disk, _saved_config(from_disk), "auto", place)
            assert adapter.config.hidden_size == found.hidden_size
            contestant = f"{shape} from disk"
        else:
            adapter = synthetic(shape, layers, kind, place)
            contestant = f"{shape} made on the fly"
        tokens, text = shapes.random_tokens(adapter.model, samples, seq_len), "random tokens"
    elif layers is not None or from_disk is not None:
        raise ConfigError(
            f"--layers, --from-disk: expected random weights ({shapes.PREFIX}NAME), got {model}"
        )
    else:
        opened = open_streamed(model, dtype.value, device) if stream else options.load(model, dtype, device)
        adapter = opened.adapter
        tokens, text = token_sequences([data], opened.tokenizer, samples, seq_len, data_dir), data
        shape, total = model, len(adapter.layers)
        contestant = f"{model} {'streamed' if stream else 'in memory'}"
    if overlap is not None:
        contestant += ", side by side" if overlap else ", one after the other"
    bench = CalibrationBench(
        contestant, shape, adapter, tokens, config, batch_size, offload, total, overlap, text
    )
    with options.progress_bar("Calibrating", "batches") as report:
        rows = bench.run(report)
    if json_out is not None:
        kept = _other_rows(json_out, contestant) if add else []
        write_json(
            json_out, {"schema_version": SCHEMA_VERSION, **environment(), "rows": [*kept, *rows]}, "benchmark"
        )
    Console(width=120, soft_wrap=True).print(_table(rows))
    _summary(rows[-1])


def _saved_config(directory: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory)


def _other_rows(path: Path, contestant: str) -> list[Row]:
    """Return the rows of a result file that are not one contestant's."""
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if row["contestant"] != contestant]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--add: expected a benchmark's results in {path}; give another --json") from error


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("phase")
    for title in ("seconds", "TFLOP/s", "of matmul rate"):
        table.add_column(title, justify="right")
    for row in rows:
        if row["phase"].startswith("layer "):
            continue
        rate, part = row.get("tflops"), row.get("of_matmul_rate")
        table.add_row(
            row["phase"],
            f"{row['seconds']:.1f}",
            "–" if rate is None else f"{rate:.1f}",
            "–" if part is None else f"{100 * part:.0f} %",
        )
    return table


def _summary(total: Row) -> None:
    gib = 2**30
    if total["peak_device_bytes"] is not None:
        typer.echo(
            f"device memory: {total['peak_device_bytes'] / gib:.2f} GiB at most, "
            f"{total['predicted_device_bytes'] / gib:.2f} GiB predicted"
        )
    typer.echo(f"host memory: {total['peak_host_bytes'] / gib:.2f} GiB at most")
    typer.echo(
        f"whole model ({total['total_layers']} layers): {total['projected_total_seconds'] / 60:.1f} minutes"
    )
