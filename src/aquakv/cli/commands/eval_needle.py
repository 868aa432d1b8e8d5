"""``aquakv eval needle``: a number hidden in a long text, by where it is."""

from __future__ import annotations

from typing import Annotated

import typer

from aquakv.cli import measured, options
from aquakv.cli.tasked import Run, size
from aquakv.evaluation.tasks.needle import DEFAULT_DEPTHS, DEFAULT_LENGTHS, Needle

_LENGTHS = ", ".join(map(str, DEFAULT_LENGTHS))
_DEPTHS = ", ".join(f"{depth:g}" for depth in DEFAULT_DEPTHS)


def needle(
    model: options.Model,
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    data: Annotated[
        str, typer.Option("--data", help=f"The text: {options.DATA_HELP} Or noise: sentences, repeated.")
    ] = "pydoc:test",
    data_dir: options.DataDir = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            help=f"Tokens of a prompt, question included; may be repeated. [default: {_LENGTHS}, as far as "
            "the model goes]",
        ),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            "--depth",
            help=f"Where the number is, in per cent of the text; may be repeated. [default: {_DEPTHS}]",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Prompts of each length and depth.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of texts and numbers.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens of a reply.")] = 16,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    batch_size: options.BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Ask for a number that a sentence in a long text names, by length and depth.

    The text is compressed before the question comes; the exact cache gets the same prompts.
    """
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    task = Needle(data, length or None, depth or DEFAULT_DEPTHS, samples, seed, max_new_tokens)
    result = run.measure(task, "prompts")
    for cell in result["cells"]:
        typer.echo(
            f"{cell['length']:>7} tokens, {cell['depth']:>3g} % deep: accuracy {100 * cell['accuracy']:.0f} "
            f"%, exact cache {100 * cell['baseline_accuracy']:.0f} %; answer {cell['answer_nll']:.4f} nats a "
            f"token, exact cache {cell['exact_answer_nll']:.4f}"
        )
    typer.echo(
        f"accuracy {100 * result['accuracy']:.1f} %, exact cache {100 * result['baseline_accuracy']:.1f} %; "
        f"{size(result)}"
    )
