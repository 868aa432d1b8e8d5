"""``aquakv calibrate``: from a model and text to a codec file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquakv.calibration import calibrate as run_calibration
from aquakv.cli import options
from aquakv.config import PRESETS, preset
from aquakv.data import describe, token_sequences
from aquakv.files import require_writable

#: Texts that are on every machine with Python, and unlike each other.
DEFAULT_DATA = ["pydoc:train", "stdlib:train"]


def calibrate(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", help="Codec file to write (.safetensors).")],
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
    offload: options.Offload = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
) -> None:
    """Fit a codec to a model, in one pass over its layers."""
    config = preset(preset_name, bits)
    require_writable(out, "codec")
    sources = data or DEFAULT_DATA
    loaded = options.load(model, dtype, device)
    options.require_length(seq_len, loaded)
    tokens = token_sequences(sources, loaded.tokenizer, samples, seq_len, data_dir)
    record = {"model": loaded.name, "data": [vars_of(source, data_dir) for source in sources], "seed": None}
    with options.progress_bar("Calibrating", "batches") as report:
        codec = run_calibration(
            loaded.model,
            tokens,
            config,
            batch_size=batch_size,
            offload=offload,
            record=record,
            progress=report,
        )
    codec.save(out)
    explained = [layer["keys"]["explained_variance"] for layer in codec.calibration["layers"][1:]]
    predicted = f", keys predicted to {100 * sum(explained) / len(explained):.0f} %" if explained else ""
    typer.echo(
        f"{out}: {config.preset}, {codec.bits_per_value:.3f} bits per value{predicted}, "
        f"{tokens.numel()} tokens in {codec.calibration['seconds']:.0f} s"
    )


def vars_of(source: str, data_dir: Path | None) -> dict[str, str | int]:
    """Return a data source's name, size and hash for the record."""
    summary = describe(source, data_dir)
    return {
        "name": source,
        "documents": summary.documents,
        "characters": summary.characters,
        "sha256": summary.sha256,
    }
