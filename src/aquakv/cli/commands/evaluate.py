"""``aquakv eval``: what a codec, or a competitor, costs, measured."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from aquakv.cli import measured, options
from aquakv.cli.commands import grid, harness
from aquakv.cli.commands.eval_drift import drift
from aquakv.cli.commands.eval_needle import needle
from aquakv.cli.commands.eval_ruler import ruler
from aquakv.cli.tasked import Run
from aquakv.config import WindowConfig
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.pruned import Contestant, default_context, evaluate_pruning, pruning_fields
from aquakv.evaluation.quality import evaluate_quality
from aquakv.evaluation.results import pruned_quality_fields, quality_fields
from aquakv.evaluation.tasks import Setting
from aquakv.eviction import H2O, EvictionPolicy, SnapKV

app = typer.Typer(help="Evaluate a codec or a competitor against the exact cache.", no_args_is_help=False)
harness.add_to(app)
app.command("needle")(needle)
app.command("ruler")(ruler)
app.command("drift")(drift)
app.command("grid")(grid.grid)


class ProtocolChoice(StrEnum):
    """Ways to compute the same figures."""

    streaming = "streaming"
    single_pass = "single-pass"


class PolicyChoice(StrEnum):
    """Policies that evict tokens."""

    h2o = "h2o"
    snapkv = "snapkv"


_POLICIES: dict[PolicyChoice, type[H2O] | type[SnapKV]] = {
    PolicyChoice.h2o: H2O,
    PolicyChoice.snapkv: SnapKV,
}


@app.callback()
def _group() -> None:
    """Evaluate a codec or a competitor against the exact cache."""


@app.command("perplexity")
def perplexity(
    model: options.Model,
    codec: measured.Codec = None,
    baseline_name: measured.BaselineName = None,
    data: Annotated[str, typer.Option("--data", help=options.DATA_HELP)] = "pydoc:test",
    data_dir: options.DataDir = None,
    seq_len: options.SeqLen = 2048,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences.")] = 8,
    protocol: Annotated[
        ProtocolChoice,
        typer.Option("--protocol", help="streaming: through the real cache; single-pass: the same, faster."),
    ] = ProtocolChoice.streaming,
    calibration_data: measured.CalibrationData = None,
    calibration_samples: measured.CalibrationSamples = 16,
    calibration_seq_len: measured.CalibrationSeqLen = 2048,
    prune: Annotated[
        PolicyChoice | None,
        typer.Option(
            "--prune", help="Evict tokens of each sequence's context; measures the tokens behind it only."
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep", help="With --prune: what stays: up to 1 a fraction (0.5), else so many tokens."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="With --prune: tokens of the context; about half by default."),
    ] = None,
    batch_size: options.BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure perplexity, divergence and agreement against the exact cache, on the same tokens."""
    policy = _policy(prune, keep, context, protocol)
    if policy is not None and baseline_name is not None:
        raise ConfigError("expected --prune or --baseline, got both: a competitor's cache evicts nothing")
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    run = Run(model, codec, baseline_name, text, data_dir, batch_size, dtype, device, json_out)
    subject = run.subject()
    subject.require_something_coded(seq_len)
    if subject.baseline is not None and protocol is ProtocolChoice.single_pass:
        subject.baseline.require_single_pass()
    loaded = run.load()
    options.require_length(seq_len, loaded)
    subject = subject.fitted(loaded)
    tokens = token_sequences([data], loaded.tokenizer, samples, seq_len, data_dir)

    window = WindowConfig() if subject.codec is None else subject.codec.config.window
    behind = context or default_context(seq_len, window)

    def evaluate(setting: Setting) -> dict[str, Any]:
        if policy is None:
            found = evaluate_quality(
                loaded.model,
                tokens,
                {subject.name: subject.method},
                protocol=protocol.value,
                batch_size=setting.batch_size,
                progress=setting.progress,
            )
            return quality_fields(found[subject.name])
        found = evaluate_pruning(
            loaded.model,
            tokens,
            {subject.name: Contestant(subject.codec, policy)},
            behind,
            batch_size=setting.batch_size,
            progress=setting.progress,
        )
        return {"pruning": pruning_fields(policy, behind), **pruned_quality_fields(found[subject.name])}

    settings = {
        "data": data,
        "seq_len": seq_len,
        "samples": samples,
        "protocol": protocol.value if policy is None else "pruned context",
    }
    result = run.result("perplexity", settings, loaded, subject, "sequences", evaluate)
    typer.echo(_line(result, subject.method is None and policy is None))


def _line(result: Mapping[str, Any], exact: bool) -> str:
    """Say the figures: of the exact cache alone, of a pruned context, or of a method."""
    perplexity = f"perplexity {result['perplexity']:.4f}"
    of = f"{result['tokens']} tokens of {result['data']}"
    if exact:
        return f"{perplexity} with the exact cache, {of}"
    if "pruning" in result:
        where = " behind a pruned context"
        bits = f"{result['bits_per_original_value']:.3f} bits per value of all that was fed"
    else:
        where, bits = "", f"{result['bits_per_value']:.3f} bits per value"
    increase = options.increase(result["relative_increase"], result["relative_increase_stderr"])
    return (
        f"{perplexity}{where}, exact cache "
        f"{result['baseline_perplexity']:.4f} ({increase}); KL {result['mean_kl']:.2e} nats; "
        f"top-1 agreement {100 * result['top1_agreement']:.2f} %; {bits}; {of}"
    )


def _policy(
    prune: PolicyChoice | None, keep: float | None, context: int | None, protocol: ProtocolChoice
) -> EvictionPolicy | None:
    """Return the policy that was asked for."""
    if prune is None:
        name = "--keep" if keep is not None else "--context"
        if keep is not None or context is not None:
            raise ConfigError(f"{name} goes with --prune h2o or --prune snapkv")
        return None
    if protocol is not ProtocolChoice.streaming:
        raise ConfigError("--prune evicts tokens of a real cache: it goes with --protocol streaming")
    share: float | int = 0.5 if keep is None else keep
    if share > 1:
        if share != int(share):
            raise ConfigError(f"--keep: expected a fraction up to 1 or a whole number of tokens, got {keep}")
        share = int(share)
    return _POLICIES[prune](keep=share)
