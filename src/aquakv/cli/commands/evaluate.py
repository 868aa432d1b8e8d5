"""``aquakv eval``: what a codec costs, measured."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aquakv.cli import options
from aquakv.codec import ModelCodec
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.quality import evaluate_quality
from aquakv.evaluation.results import SCHEMA_VERSION, environment, file_sha256, quality_fields, write_json
from aquakv.files import require_writable

app = typer.Typer(help="Evaluate a codec against the exact cache.", no_args_is_help=False)


class ProtocolChoice(StrEnum):
    """Ways to compute the same figures."""

    streaming = "streaming"
    single_pass = "single-pass"


@app.callback()
def _group() -> None:
    """Evaluate a codec against the exact cache."""


@app.command("perplexity")
def perplexity(
    model: options.Model,
    codec: Annotated[
        Path | None,
        typer.Option("--codec", help="Codec file; without one the exact cache alone is measured."),
    ] = None,
    data: Annotated[str, typer.Option("--data", help=options.DATA_HELP)] = "pydoc:test",
    data_dir: options.DataDir = None,
    seq_len: options.SeqLen = 2048,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences.")] = 8,
    protocol: Annotated[
        ProtocolChoice,
        typer.Option("--protocol", help="streaming: through the real cache; single-pass: the same, faster."),
    ] = ProtocolChoice.streaming,
    batch_size: options.BatchSize = 1,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure perplexity, divergence and agreement against the exact cache, on the same tokens."""
    if json_out is not None:
        require_writable(json_out, "result")
    loaded_codec = None if codec is None else ModelCodec.load(codec)
    if loaded_codec is not None and not loaded_codec.config.window.coded_tokens(seq_len - 1):
        raise ConfigError(
            f"--seq-len {seq_len} is too short: nothing would be compressed (the codec keeps sinks and the "
            "newest tokens exact); give longer sequences"
        )
    loaded = options.load(model, dtype, device)
    options.require_length(seq_len, loaded)
    tokens = token_sequences([data], loaded.tokenizer, samples, seq_len, data_dir)
    codecs = {} if loaded_codec is None else {"codec": loaded_codec}
    started = time.perf_counter()
    with options.progress_bar("Evaluating", "sequences") as report:
        results = evaluate_quality(
            loaded.model,
            tokens,
            codecs or {"exact": None},
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
    if loaded_codec is None:
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
