"""``aquakv eval drift``: a long generation, by how far predictions go from the exact cache's."""

from __future__ import annotations

from typing import Annotated

import typer

from aquakv.cli import measured, options
from aquakv.cli.tasked import Run, size
from aquakv.evaluation.tasks.drift import LongDrift


def drift(
    model: options.Model,
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    data: Annotated[
        str, typer.Option("--data", help=f"What is continued: {options.DATA_HELP}")
    ] = "pydoc:test",
    data_dir: options.DataDir = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of it.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate behind.")] = 4096,
    samples: Annotated[int, typer.Option("--samples", help="Texts.")] = 1,
    bin_tokens: Annotated[
        int, typer.Option("--bin-tokens", help="Positions that figures are averaged over.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of sampling; 0 takes the likeliest token.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    batch_size: options.BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Compare predictions with the exact cache's, position by position, of a text that this generates.

    Figures are at what follows the prompt; what is fed to both caches is the same.
    """
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    task = LongDrift(data, prompt_tokens, new_tokens, samples, bin_tokens, temperature, seed)
    result = run.measure(task, "texts")
    first, last = result["bins"][0], result["bins"][-1]
    growth = result["late_to_early"]
    typer.echo(
        f"KL {result['mean_kl']:.2e} nats over {result['tokens']} tokens, {first['mean_kl']:.2e} in the "
        f"first {first['end'] - first['start']}, {last['mean_kl']:.2e} in the last "
        f"{last['end'] - last['start']}"
        + ("" if growth is None else f"; last quarter {growth:.2f} times the first")
        + f"; top-1 agreement {100 * result['top1_agreement']:.2f} %; {size(result)}"
    )
