"""``aquakv calibrate``: from a model and text to a codec file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from aquakv.calibration import CalibrationProgress, RunStore
from aquakv.calibration import calibrate as run_calibration
from aquakv.calibration.forecast import free_bytes
from aquakv.calibration.group import Group, join, leave
from aquakv.cli import options
from aquakv.cli.dry_run import show_plan
from aquakv.cli.progress_log import progress_log
from aquakv.config import PRESETS, preset
from aquakv.data import describe, token_sequences
from aquakv.errors import ConfigError
from aquakv.files import require_writable
from aquakv.models.loading import LoadedModel, resolve_device
from aquakv.models.streaming import StreamedModel, open_streamed, weight_bytes

#: Texts that are on every machine with Python, and unlike each other.
DEFAULT_DATA = ["pydoc:train", "stdlib:train"]


def calibrate(
    model: options.Model,
    out: Annotated[Path | None, typer.Option("--out", help="Codec file to write (.safetensors).")] = None,
    preset_name: Annotated[str, typer.Option("--preset", help=f"One of: {', '.join(PRESETS)}.")] = "decode",
    bits: Annotated[
        float | None, typer.Option("--bits", help="Mean bits per value; the preset's own if not given.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", help=f"{options.DATA_HELP} Repeat to mix in equal parts. [default: {DEFAULT_DATA}]"
        ),
    ] = None,
    data_dir: options.DataDir = None,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Sequences.")] = 32,
    seq_len: options.SeqLen = 2048,
    batch_size: options.BatchSize = 4,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read the model from disk layer by layer, or load it. [default: read what would fill more "
            "than half of the memory]",
        ),
    ] = None,
    offload: options.Offload = "auto",
    overlap: options.Overlap = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same calibration was interrupted.")
    ] = False,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints/--no-checkpoints", help="Keep finished layers in OUT.partial until all are done."
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it takes, in memory and time, and stop.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option("--log", help="Append a JSON line for every layer and phase to this file.")
    ] = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
) -> None:
    """Fit a codec to a model, in one pass over its layers."""
    config = preset(preset_name, bits)
    if dry_run:
        show_plan(model, config, samples, seq_len, batch_size, stream, offload, overlap, dtype, device)
        return
    if out is None:
        raise ConfigError("--out: expected a codec file to write, got none (or --dry-run to see the plan)")
    require_writable(out, "codec")
    if resume and not checkpoints:
        raise ConfigError("--resume needs checkpoints; leave out --no-checkpoints")
    place = join(resolve_device(device))
    try:
        sources = data or DEFAULT_DATA
        opened = _open(model, stream, dtype, place)
        options.require_length(seq_len, opened)
        tokens = token_sequences(sources, opened.tokenizer, samples, seq_len, data_dir)
        record = {"model": opened.name, "data": [vars_of(one, data_dir) for one in sources], "seed": None}
        store = RunStore(out.with_name(out.name + ".partial"), resume) if checkpoints else None
        first = Group.current(place).rank == 0
        with _reports(log, first) as report:
            codec = run_calibration(
                opened.adapter,
                tokens,
                config,
                batch_size=batch_size,
                offload=offload,
                overlap=overlap,
                record=record,
                progress=report,
                store=store,
            )
        if first:
            codec.save(out)
        if store is not None:
            store.discard()
    finally:
        leave()
    if not first:
        return
    explained = [layer["keys"]["explained_variance"] for layer in codec.calibration["layers"][1:]]
    predicted = f", keys predicted to {100 * sum(explained) / len(explained):.0f} %" if explained else ""
    typer.echo(
        f"{out}: {config.preset}, {codec.bits_per_value:.3f} bits per value{predicted}, "
        f"{tokens.numel()} tokens in {codec.calibration['seconds']:.0f} s"
    )


def _open(
    model: str, stream: bool | None, dtype: options.Dtype, place: torch.device
) -> LoadedModel | StreamedModel:
    """Load a model, or open it to be read layer by layer."""
    if stream is None:
        on_device, on_host = free_bytes(place)
        size = weight_bytes(model, dtype.value)
        stream = size is not None and size > options.STREAM_FROM * (on_device or on_host)
    if stream:
        return open_streamed(model, dtype.value, str(place))
    return options.load(model, dtype, str(place))


@contextlib.contextmanager
def _reports(log: Path | None, first: bool) -> Iterator[Callable[[CalibrationProgress], None] | None]:
    """Show progress, and log it; in one of several processes only."""
    if not first:
        yield None
        return
    with options.progress_bar("Calibrating", "batches") as show, progress_log(log) as note:

        def report(state: CalibrationProgress) -> None:
            show(state)
            note(state)

        yield report


def vars_of(source: str, data_dir: Path | None) -> dict[str, str | int]:
    """Return a data source's name, size and hash for the record."""
    summary = describe(source, data_dir)
    return {
        "name": source,
        "documents": summary.documents,
        "characters": summary.characters,
        "sha256": summary.sha256,
    }
