"""``aquakv eval longbench|gsm8k|lm-eval``: tasks of lm-eval through a method's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aquakv.cli import measured, options
from aquakv.cli.tasked import Run
from aquakv.evaluation.harness import GSM8K_VARIANTS, LONGBENCH_TASKS
from aquakv.evaluation.harness.installed import quiet_harness
from aquakv.evaluation.tasks import GSM8K, LmEval, LongBench, Setting
from aquakv.evaluation.tasks.harness import HarnessTask

_Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task. [default: all]")]
_MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=2,
        help="Tokens of a prompt and its answer at most. [default: what the model takes]",
    ),
]
_MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Tokens of an answer. [default: what the task says]"),
]
_PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        min=1,
        help="Feed prompts in parts of so many tokens; later ones attend to codes of earlier ones. "
        "[default: in one pass, as generate does]",
    ),
]
_Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the model's chat template.")]
_BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Prompts at once; competitors take one at a time.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to a group."""
    app.command("longbench")(longbench)
    app.command("gsm8k")(gsm8k)
    app.command("lm-eval")(lm_eval)


def longbench(
    model: options.Model,
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help=f"One or more of {', '.join(LONGBENCH_TASKS)}; or all. [default: multi_news]",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="JSONL in LongBench's format, in place of --data-dir.")
    ] = None,
    data_dir: options.DataDir = None,
    limit: _Limit = None,
    max_length: _MaxLength = None,
    max_new_tokens: _MaxNewTokens = None,
    prefill_chunk: _PrefillChunk = None,
    chat: _Chat = False,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    batch_size: _BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure LongBench's scores beside those of the exact cache, on the same prompts."""
    names = _names(tasks or ["multi_news"])
    task = LongBench(
        limit=limit,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        chat=chat,
        tasks=names,
        file=None if file is None else str(file),
    )
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    data = [str(file)] if file is not None else [f"longbench/{name}" for name in task.names]
    _run(task, run, data)


def gsm8k(
    model: options.Model,
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    variant: Annotated[
        str, typer.Option("--variant", help=f"How questions are asked: {', '.join(GSM8K_VARIANTS)}.")
    ] = "gsm8k_cot",
    data_dir: options.DataDir = None,
    limit: _Limit = None,
    max_length: _MaxLength = None,
    max_new_tokens: _MaxNewTokens = None,
    prefill_chunk: _PrefillChunk = None,
    chat: _Chat = False,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    batch_size: _BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure how many of GSM8K's questions are answered, beside the exact cache, on the same prompts."""
    task = GSM8K(
        limit=limit,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        chat=chat,
        variant=variant,
    )
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    _run(task, run, ["gsm8k:test"])


def lm_eval(
    model: options.Model,
    tasks: Annotated[
        list[str], typer.Option("--tasks", help="As lm-eval names them; repeat, or separate by commas.")
    ],
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    data_dir: options.DataDir = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A directory with more tasks in lm-eval's format.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in each prompt.")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option("--protocol", help="For likelihoods: streaming, or single-pass, the same, faster."),
    ] = "streaming",
    limit: _Limit = None,
    max_length: _MaxLength = None,
    max_new_tokens: _MaxNewTokens = None,
    prefill_chunk: _PrefillChunk = None,
    chat: _Chat = False,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    batch_size: _BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure any of lm-eval's tasks beside the exact cache; lm-eval gets their documents from the Hub."""
    names = _names(tasks)
    chosen: Any = protocol  # checked by the task
    task = LmEval(
        limit=limit,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        prefill_chunk=prefill_chunk,
        protocol=chosen,
        chat=chat,
        tasks=names,
        num_fewshot=num_fewshot,
        include_path=None if include_path is None else str(include_path),
    )
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    _run(task, run, list(names))


def _names(given: list[str]) -> tuple[str, ...]:
    return tuple(name.strip() for part in given for name in part.split(",") if name.strip())


def _run(task: HarnessTask, run: Run, data: list[str]) -> None:
    """Measure what was asked for, print a line for every task and one for all."""
    with quiet_harness():  # before the model is loaded: a task may be missing
        tasks = task.load(Setting(run.data_dir, run.batch_size))
    fields = run.measure(
        task,
        "requests",
        lambda loaded, methods, setting: task.run(tasks, loaded, methods, setting),
        data=data,
    )
    exact_alone = run.codec is None and run.baseline is None
    for name, part in fields["tasks"].items():
        typer.echo(_line(name, part, exact_alone))
    if len(fields["tasks"]) > 1:
        typer.echo(_line("mean of tasks", {**fields, "metric": "score"}, exact_alone))
    if not exact_alone:
        typer.echo(_size(fields))


def _line(name: str, fields: dict[str, Any], exact_alone: bool) -> str:
    what = f"{name}: {fields['metric']} {fields['score']:.4f}"
    if exact_alone:
        return f"{what} with the exact cache, {fields['samples']} samples"
    error = fields.get("score_difference_stderr")
    difference = f"{fields['score'] - fields['baseline_score']:+.4f}"
    difference += "" if error is None else f" ± {error:.4f}"
    same = fields.get("same_answers")
    alike = "" if same is None else f", {100 * same:.0f} % of answers the same"
    exact = f"exact cache {fields['baseline_score']:.4f} ({difference})"
    return f"{what}, {exact}{alike}; {fields['samples']} samples"


def _size(fields: dict[str, Any]) -> str:
    bits = fields["bits_per_value"]
    if bits is None:
        return (
            "nothing was compressed: all prompts are shorter than what stays exact; these are scores of the "
            "exact cache"
        )
    total = fields["bits_per_value_total"]
    whole = "" if total is None else f", {total:.3f} with exact tokens"
    return f"{bits:.3f} bits per value{whole}; {fields['tokens']} tokens of prompts"
