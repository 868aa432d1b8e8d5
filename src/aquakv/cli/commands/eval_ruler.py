"""``aquakv eval ruler``: RULER's generated tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from aquakv.cli import measured, options
from aquakv.cli.tasked import Run, size
from aquakv.evaluation.ruler import KINDS
from aquakv.evaluation.tasks.ruler import Ruler


def ruler(
    model: options.Model,
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help=f"Of {', '.join(KINDS)}; may be repeated. [default: all]"),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length", help="Tokens of a prompt, question included; may be repeated. [default: 4096]"
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Prompts of each task and length.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Tokens of a reply. [default: RULER's, by task]"),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help=f"The text that hides needles: {options.DATA_HELP}")
    ] = "pydoc:test",
    data_dir: options.DataDir = None,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    batch_size: options.BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Score retrieval, tracing and aggregation over long prompts by the strings found in replies.

    The context is compressed before the question comes; the exact cache gets the same prompts.
    """
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    tasks = task or list(KINDS)
    new_tokens = {} if max_new_tokens is None else dict.fromkeys(tasks, max_new_tokens)
    result = run.measure(Ruler(tasks, length or None, samples, seed, new_tokens, data), "prompts")
    for row in result["rows"]:
        typer.echo(
            f"{row['task']:>15}, {row['length']} tokens: {100 * row['score']:.1f} %, "
            f"exact cache {100 * row['baseline_score']:.1f} %"
        )
    typer.echo(
        f"score {100 * result['score']:.1f} %, exact cache {100 * result['baseline_score']:.1f} %; "
        f"{size(result)}"
    )
