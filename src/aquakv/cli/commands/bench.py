"""``aquakv bench``: time and memory of caches, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from aquakv.cli import options
from aquakv.cli.commands import bench_calibrate
from aquakv.codec import ModelCodec
from aquakv.config import CodecConfig, preset
from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation import shapes
from aquakv.evaluation.bench import WARM_UP, Row, bench_decode, bench_encode, bench_memory
from aquakv.evaluation.results import SCHEMA_VERSION, environment, file_sha256, write_json
from aquakv.files import require_writable
from aquakv.models.loading import resolve_device

app = typer.Typer(help="Time and memory against the exact cache.", no_args_is_help=False)

Codecs = Annotated[list[Path], typer.Option("--codec", help="Codec file; may be given several times.")]
Contexts = Annotated[
    list[int] | None,
    typer.Option("--context", min=1, help="Tokens in the cache; may be given several times. Default: 1024."),
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Sequences at once.")]
KeepLatents = Annotated[
    bool, typer.Option("--keep-latents", help="Also measure caches that keep latents beside the codes.")
]


class Kernels(StrEnum):
    """Values of ``--backend``, which are those of `aquakv.kernels.backend.Backend`."""

    auto = "auto"
    torch = "torch"
    triton = "triton"
    hopper = "hopper"


BackendOption = Annotated[
    Kernels,
    typer.Option("--backend", help="What attends to codes and reconstructs, in all caches but exact."),
]
Data = Annotated[str, typer.Option("--data", help=options.DATA_HELP)]


app.command("calibrate")(bench_calibrate.calibrate)


@app.callback()
def _group() -> None:
    """Time and memory against the exact cache."""


@app.command("decode")
def decode(
    model: options.Model,
    codec: Codecs,
    context: Contexts = None,
    rows: Rows = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that are timed.")] = 20,
    keep_latents: KeepLatents = False,
    backend: BackendOption = Kernels.auto,
    data: Data = "pydoc:test",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Time single decode steps: exact cache, general and fused path in turn, predictions compared."""
    _require_writable(json_out)
    _run(
        "decode",
        _loaded(model, codec, data, data_dir, dtype, device),
        context,
        rows,
        steps + WARM_UP,
        lambda loaded, codecs, tokens, contexts, report: bench_decode(
            loaded, codecs, tokens, contexts, steps, report, keep_latents, backend.value
        ),
        {"step, ms": "median_ms", "to exact": "ratio_to_exact", "KL, nats": "mean_kl"},
        json_out,
        backend,
    )


@app.command("encode")
def encode(
    model: options.Model,
    codec: Codecs,
    context: Contexts = None,
    rows: Rows = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Prefills that are timed.")] = 5,
    data: Data = "pydoc:test",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Time prefills, and tell what encoding adds to them."""
    _require_writable(json_out)
    _run(
        "encode",
        _loaded(model, codec, data, data_dir, dtype, device),
        context,
        rows,
        0,
        lambda loaded, codecs, tokens, contexts, report: bench_encode(
            loaded, codecs, tokens, contexts, repeats, report
        ),
        {"prefill, ms": "median_ms", "tokens/s": "tokens_per_second", "to exact": "ratio_to_exact"},
        json_out,
    )


@app.command("memory")
def memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="'demo', a directory, a Hugging Face id; or, of random weights, one of "
            f"{', '.join(shapes.PREFIX + name for name in shapes.SHAPES)}.",
        ),
    ],
    codec: Annotated[
        list[Path] | None, typer.Option("--codec", help="Codec file; may be given several times.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            min=1,
            help="Tokens in the cache; may be given several times. Default: 1024, on a GPU up to 131072.",
        ),
    ] = None,
    rows: Rows = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Decode steps. Default: 130 on a GPU, else 2.")
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option("--prefill-chunk", min=1, help="Tokens that are fed at once before.")
    ] = 2048,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Layers of a model of random weights.")
    ] = None,
    preset_name: Annotated[
        str, typer.Option("--preset", help="Preset of the codec made for random weights.")
    ] = "decode",
    bits: Annotated[float | None, typer.Option("--bits", help="Bits per value of that codec.")] = None,
    keep_latents: KeepLatents = False,
    backend: BackendOption = Kernels.auto,
    data: Data = "pydoc:test",
    data_dir: options.DataDir = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    json_out: options.Json = None,
) -> None:
    """Measure what caches hold, and the most that prefill and decode steps take, scratch included."""
    _require_writable(json_out)
    if model.startswith(shapes.PREFIX):
        if codec:
            raise ConfigError("--codec: a model of random weights gets a codec of its own; give --preset")
        subject = _random(model, layers, preset(preset_name, bits), dtype, device)
    elif not codec:
        raise ConfigError("--codec: expected a codec file, got none (see aquakv calibrate)")
    elif layers is not None:
        raise ConfigError(f"--layers: expected a model of random weights ({shapes.PREFIX}NAME), got {model}")
    else:
        subject = _loaded(model, codec, data, data_dir, dtype, device)
    count = steps or (130 if subject.on_gpu else 2)
    if context is None and subject.on_gpu:
        longest = options.longest(subject.model) or 1 << 17
        context = [min(1 << power, longest - count) for power in range(10, 18)]
    _run(
        "memory",
        subject,
        context,
        rows,
        count,
        partial(
            bench_memory,
            steps=count,
            prefill_chunk=prefill_chunk,
            keep_latents=keep_latents,
            backend=backend.value,
        ),
        {
            "held, bytes": "held_bytes",
            "to exact": "held_ratio_to_exact",
            "prefill peak": "prefill_peak_bytes",
            "decode peak": "peak_bytes",
            "peak to exact": "peak_ratio_to_exact",
            **({"latents, bytes": "latent_bytes"} if keep_latents else {}),
        },
        json_out,
        backend,
    )


def _require_writable(json_out: Path | None) -> None:
    if json_out is not None:
        require_writable(json_out, "result")


@dataclass(frozen=True)
class _Subject:
    """What is measured.

    Attributes
    ----------
    name, model
        The model, and what it is called.
    codecs
        By name.
    described
        What results say of them.
    data
        What the tokens are, for results.
    tokens
        From rows and length, ``[rows, length]`` token ids.
    """

    name: str
    model: PreTrainedModel
    codecs: dict[str, ModelCodec]
    described: list[dict[str, Any]]
    data: str
    tokens: Callable[[int, int], Tensor]

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.model.device.type == "cuda"


def _loaded(
    model: str, files: list[Path], data: str, data_dir: Path | None, dtype: options.Dtype, device: str
) -> _Subject:
    """Load a model and codec files."""
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"--codec: expected files of different names, got {', '.join(names)}")
    codecs = {name: ModelCodec.load(path) for name, path in zip(names, files, strict=True)}
    loaded = options.load(model, dtype, device)
    described = [
        {
            "contestant": name,
            "file": path.name,
            "preset": codecs[name].config.preset,
            "sha256": file_sha256(path),
        }
        for name, path in zip(names, files, strict=True)
    ]
    return _Subject(
        loaded.name,
        loaded.model,
        codecs,
        described,
        data,
        lambda rows, length: token_sequences([data], loaded.tokenizer, rows, length, data_dir),
    )


def _random(
    model: str, layers: int | None, config: CodecConfig, dtype: options.Dtype, device: str
) -> _Subject:
    """Make a model of random weights and a codec for it."""
    place = resolve_device(device)
    kind = torch.bfloat16 if dtype is options.Dtype.auto else getattr(torch, dtype.value)
    built = shapes.random_model(model.removeprefix(shapes.PREFIX), layers=layers, dtype=kind, device=place)
    options.messages.print("[dim]calibrating a codec for random weights[/dim]", highlight=False)
    codec = shapes.stand_in_codec(built, config)
    return _Subject(
        f"{model}, {built.config.num_hidden_layers} layers, random weights",
        built,
        {config.preset: codec},
        [{"contestant": config.preset, "file": None, "preset": config.preset, "sha256": None}],
        "random tokens",
        lambda rows, length: shapes.random_tokens(built, rows, length),
    )


def _run(
    command: str,
    subject: _Subject,
    contexts: list[int] | None,
    rows: int,
    more: int,
    measure: Callable[..., list[Row]],
    columns: dict[str, str],
    json_out: Path | None,
    backend: Kernels = Kernels.auto,
) -> None:
    """Measure with ``more`` tokens than the longest context, print a table, write the file."""
    chosen = sorted(set(contexts or [1024]))
    length = max(chosen) + more
    options.require_length(length, subject)
    tokens = subject.tokens(rows, length)
    with options.progress_bar("Measuring", "measurements") as report:
        found = measure(subject.model, subject.codecs, tokens, chosen, report=report)
    if json_out is not None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "command": f"bench {command}",
            "model": subject.name,
            "codecs": subject.described,
            "data": subject.data,
            "backend": backend.value,
            **environment(),
            "rows": found,
        }
        write_json(json_out, content)
    Console(width=160, soft_wrap=True).print(_table(found, columns))


def _table(rows: list[Row], columns: dict[str, str]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("context", justify="right")
    table.add_column("cache")
    for title in (*columns, "bits per value"):
        table.add_column(title, justify="right")
    for row in rows:
        figures = [_number(row[key]) for key in (*columns.values(), "bits_per_value")]
        table.add_row(f"{row['context']:,}", row["contestant"], *figures)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
