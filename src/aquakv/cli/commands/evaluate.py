"""``aquakv eval``: what a codec, or a competitor, costs, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aquakv.baselines import BASELINES, Baseline, baseline
from aquakv.cli import options
from aquakv.cli.commands.calibrate import DEFAULT_DATA
from aquakv.codec import ModelCodec
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.quality import evaluate_quality
from aquakv.evaluation.results import SCHEMA_VERSION, environment, file_sha256, quality_fields, write_json
from aquakv.files import require_writable
from aquakv.models.loading import LoadedModel

app = typer.Typer(help="Evaluate a codec or a competitor against the exact cache.", no_args_is_help=False)


class ProtocolChoice(StrEnum):
    """Ways to compute the same figures."""

    streaming = "streaming"
    single_pass = "single-pass"


@app.callback()
def _group() -> None:
    """Evaluate a codec or a competitor against the exact cache."""


@dataclass(frozen=True)
class _CalibrationText:
    """What competitors that need it are fitted to."""

    data: list[str]
    samples: int
    seq_len: int
    data_dir: Path | None

    def fitted(self, method: Baseline, loaded: LoadedModel) -> Baseline:
        """Return a method fitted to the model, if it needs that."""
        if not method.needs_fit:
            return method
        options.require_length(self.seq_len, loaded)
        tokens = token_sequences(self.data, loaded.tokenizer, self.samples, self.seq_len, self.data_dir)
        if options.messages.is_terminal:
            text = f"fitting {method.label} to {tokens.numel()} tokens"
            options.messages.print(f"[dim]{text}[/dim]", highlight=False)
        return method.fit(loaded.model, tokens)

    def record(self, method: Baseline) -> dict[str, Any]:
        """Return what a result says of a fitted method."""
        text = {"data": self.data, "samples": self.samples, "seq_len": self.seq_len}
        return {
            "name": method.name,
            "bits": method.bits,
            "source": method.source,
            **method.settings,
            "table_bytes": method.table_bytes,
            "calibration": text if method.needs_fit else None,
        }


@app.command("perplexity")
def perplexity(
    model: options.Model,
    codec: Annotated[
        Path | None,
        typer.Option("--codec", help="Codec file; without one the exact cache alone is measured."),
    ] = None,
    baseline_name: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="NAME[:BITS][+window]",
            help=f"A competitor in place of a codec: {', '.join(BASELINES)}; +window: with our exact tokens.",
        ),
    ] = None,
    data: Annotated[str, typer.Option("--data", help=options.DATA_HELP)] = "pydoc:test",
    data_dir: options.DataDir = None,
    seq_len: options.SeqLen = 2048,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences.")] = 8,
    protocol: Annotated[
        ProtocolChoice,
        typer.Option("--protocol", help="streaming: through the real cache; single-pass: the same, faster."),
    ] = ProtocolChoice.streaming,
    calibration_data: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration-data",
            help="Text for competitors that are fitted to the model first; repeat to mix in equal parts. "
            f"[default: {DEFAULT_DATA}]",
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option("--calibration-samples", min=1, help="Sequences of that text.")
    ] = 16,
    calibration_seq_len: Annotated[
        int, typer.Option("--calibration-seq-len", min=2, help="Tokens of each of these.")
    ] = 2048,
    batch_size: options.BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure perplexity, divergence and agreement against the exact cache, on the same tokens."""
    if json_out is not None:
        require_writable(json_out, "result")
    if codec is not None and baseline_name is not None:
        raise ConfigError("expected --codec or --baseline, got both; evaluate them one after the other")
    text = _CalibrationText(
        calibration_data or DEFAULT_DATA, calibration_samples, calibration_seq_len, data_dir
    )
    loaded_codec = None if codec is None else ModelCodec.load(codec)
    method = None if baseline_name is None else baseline(baseline_name)
    _require_something_coded(loaded_codec, method, seq_len)
    if method is not None and protocol is ProtocolChoice.single_pass:
        method.require_single_pass()
    loaded = options.load(model, dtype, device)
    options.require_length(seq_len, loaded)
    if method is not None:
        method = text.fitted(method, loaded)
        method.cache(loaded.model)  # what cannot be had is refused before anything is evaluated
    tokens = token_sequences([data], loaded.tokenizer, samples, seq_len, data_dir)
    measured = loaded_codec or method
    started = time.perf_counter()
    with options.progress_bar("Evaluating", "sequences") as report:
        results = evaluate_quality(
            loaded.model,
            tokens,
            {"measured": measured},
            protocol="streaming" if protocol is ProtocolChoice.streaming else "single-pass",
            batch_size=batch_size,
            progress=report,
        )
    elapsed = time.perf_counter() - started
    quality = next(iter(results.values()))
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": "eval perplexity",
        "model": loaded.name,
        "codec": None
        if codec is None or loaded_codec is None
        else {"file": codec.name, "preset": loaded_codec.config.preset, "sha256": file_sha256(codec)},
        "baseline": None if method is None else text.record(method),
        "data": data,
        "seq_len": seq_len,
        "samples": samples,
        "protocol": protocol.value,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        **quality_fields(quality),
        "elapsed_s": round(elapsed, 3),
        **environment(),
    }
    if json_out is not None:
        write_json(json_out, result)
    if measured is None:
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


def _require_something_coded(codec: ModelCodec | None, method: Baseline | None, seq_len: int) -> None:
    """Raise if a cache of so many tokens would hold no codes when the last of them is computed."""
    if codec is not None:
        name, coded = "the codec", codec.config.window.coded_tokens(seq_len - 1)
    elif method is not None:
        name, coded = f"baseline {method.name}", max(method.coded_tokens(seq_len - 1))
    else:
        return
    if not coded:
        raise ConfigError(
            f"--seq-len {seq_len} is too short: nothing would be compressed ({name} keeps sinks and the "
            "newest tokens exact); give longer sequences"
        )
