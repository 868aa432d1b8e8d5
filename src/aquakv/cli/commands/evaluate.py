"""``aquakv eval``: what a codec, or a competitor, costs, measured."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated, Any

import typer

from aquakv.cli import measured, options
from aquakv.cli.commands import grid, harness
from aquakv.cli.commands.eval_drift import drift
from aquakv.cli.commands.eval_needle import needle
from aquakv.cli.commands.eval_ruler import ruler
from aquakv.config import WindowConfig
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.pruned import Contestant, default_context, evaluate_pruning, pruning_fields
from aquakv.evaluation.quality import Quality, evaluate_quality
from aquakv.evaluation.results import (
    SCHEMA_VERSION,
    environment,
    pruned_quality_fields,
    quality_fields,
    write_json,
)
from aquakv.eviction import H2O, EvictionPolicy, SnapKV
from aquakv.files import require_writable

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
    if json_out is not None:
        require_writable(json_out, "result")
    policy = _policy(prune, keep, context, protocol)
    if policy is not None and baseline_name is not None:
        raise ConfigError("expected --prune or --baseline, got both: a competitor's cache evicts nothing")
    text = measured.CalibrationText(calibration_data, calibration_samples, calibration_seq_len, data_dir)
    subject = measured.Subject.of(codec, baseline_name, text)
    loaded_codec, method = subject.codec, subject.baseline
    subject.require_something_coded(seq_len)
    if method is not None and protocol is ProtocolChoice.single_pass:
        method.require_single_pass()
    loaded = options.load(model, dtype, device)
    options.require_length(seq_len, loaded)
    subject = subject.fitted(loaded)
    tokens = token_sequences([data], loaded.tokenizer, samples, seq_len, data_dir)
    window = WindowConfig() if loaded_codec is None else loaded_codec.config.window
    behind = context or default_context(seq_len, window)
    started = time.perf_counter()
    with options.progress_bar("Evaluating", "sequences") as report:
        if policy is None:
            results = evaluate_quality(
                loaded.model,
                tokens,
                {"measured": subject.method},
                protocol="streaming" if protocol is ProtocolChoice.streaming else "single-pass",
                batch_size=batch_size,
                progress=report,
            )
        else:
            results = evaluate_pruning(
                loaded.model,
                tokens,
                {"pruned": Contestant(loaded_codec, policy)},
                behind,
                batch_size=batch_size,
                progress=report,
            )
    elapsed = time.perf_counter() - started
    quality = next(iter(results.values()))
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": "eval perplexity",
        "model": loaded.name,
        **subject.fields(),
        "data": data,
        "seq_len": seq_len,
        "samples": samples,
        "protocol": protocol.value if policy is None else "pruned context",
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        **(quality_fields(quality) if policy is None else _pruned_fields(quality, policy, behind)),
        "elapsed_s": round(elapsed, 3),
        **environment(),
    }
    if json_out is not None:
        write_json(json_out, result)
    if policy is not None:
        bits = quality.bits_per_original_value
        typer.echo(
            f"perplexity {quality.perplexity:.4f} behind a pruned context, exact cache "
            f"{quality.baseline_perplexity:.4f} ({options.increase(quality)}); "
            f"KL {quality.mean_kl:.2e} nats; top-1 agreement {100 * quality.top1_agreement:.2f} %; "
            f"{bits:.3f} bits per value of all that was fed; {quality.tokens} tokens of {data}"
        )
        return
    if subject.method is None:
        typer.echo(
            f"perplexity {quality.perplexity:.4f} with the exact cache, {quality.tokens} tokens of {data}"
        )
        return
    typer.echo(
        f"perplexity {quality.perplexity:.4f}, exact cache {quality.baseline_perplexity:.4f} "
        f"({options.increase(quality)}); KL {quality.mean_kl:.2e} nats; "
        f"top-1 agreement {100 * quality.top1_agreement:.2f} %; {quality.bits_per_value:.3f} bits per value; "
        f"{quality.tokens} tokens of {data}"
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


def _pruned_fields(quality: Quality, policy: EvictionPolicy, context: int) -> dict[str, Any]:
    return {"pruning": pruning_fields(policy, context), **pruned_quality_fields(quality)}
