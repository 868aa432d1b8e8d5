"""What ``aquakv calibrate --dry-run`` prints: the plan, before any weight is read."""

from __future__ import annotations

import torch
import typer
from rich.console import Console
from rich.table import Table

from aquakv.calibration.forecast import Forecast, choose_waiting, forecast, free_bytes, ways_to_wait
from aquakv.calibration.workload import Workload, workload_of
from aquakv.cli import options
from aquakv.config import CodecConfig
from aquakv.errors import ResourceError
from aquakv.evaluation import shapes
from aquakv.evaluation.bench_calibrate import matmul_rate, synthetic
from aquakv.models.adapter import ModelAdapter
from aquakv.models.loading import resolve_device
from aquakv.models.streaming import open_without_weights

#: Parts of the rate of large matrix products that phases reach: the forward pass of that in the model's
#: dtype, fits of that in float32. On a GPU from benchmarks/results/calibrate-h200.json.
_FORWARD_PART = 0.65
_FIT_PART = {"cuda": 0.7, "cpu": 0.3}

#: What disks are taken to read, bytes a second.
_DISK_RATE = 1e9


def show_plan(
    model: str,
    config: CodecConfig,
    samples: int,
    seq_len: int,
    batch_size: int,
    stream: bool | None,
    offload: str,
    overlap: bool | None,
    dtype: options.Dtype,
    device: str,
) -> None:
    """Print what is resident where, the operations, and the time that they will take here.

    Raises
    ------
    ResourceError
        There is too little memory.
    """
    place = resolve_device(device)
    adapter = _opened(model, dtype, place)
    adapter.require_length(seq_len)
    work = workload_of(
        adapter, samples, seq_len, {"": config}, batch_size, streamed=_streams(adapter, stream)
    )
    refused: ResourceError | None = None
    try:
        waiting = choose_waiting(work, offload, overlap)
    except ResourceError as error:  # said after the plan that shows why
        waiting, refused = ways_to_wait(work, offload, overlap)[-1], error
    found = forecast(work, waiting)
    console = Console(width=100, soft_wrap=True)
    console.print(_memory(found, work))
    console.print(_time(found, work, adapter.model.dtype, waiting.overlap))
    if refused is not None:
        raise refused
    beside = ", each layer fitted while the next one is observed" if waiting.overlap else ""
    typer.echo(f"offload {waiting.name}, {'streamed' if work.streamed else 'loaded as a whole'}{beside}")


def _opened(model: str, dtype: options.Dtype, place: torch.device) -> ModelAdapter:
    if model.startswith(shapes.PREFIX):
        kind = torch.bfloat16 if dtype is options.Dtype.auto else getattr(torch, dtype.value)
        return synthetic(model.removeprefix(shapes.PREFIX), None, kind, place)
    return open_without_weights(model, dtype.value, place)


def _streams(adapter: ModelAdapter, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    on_device, on_host = free_bytes(adapter.device)
    size = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
    return size > options.STREAM_FROM * (on_device or on_host)


def _memory(found: Forecast, work: Workload) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("in memory at the fullest moment")
    for title in ("where", "GiB"):
        table.add_column(title, justify="right")
    names = {"device": work.device.type, "host": "host"}
    for item in found.items:
        table.add_row(item.what, names[item.where], f"{item.size / 2**30:.2f}")
    for where in ("device", "host"):
        table.add_row("[bold]in all[/bold]", names[where], f"{found.total(where) / 2**30:.2f}")
    return table


def _time(found: Forecast, work: Workload, dtype: torch.dtype, overlap: bool) -> Table:
    forward = _FORWARD_PART * matmul_rate(work.device, dtype)
    fitting = _FIT_PART.get(work.device.type, 0.3) * matmul_rate(work.device, torch.float32)
    table = Table(box=None, header_style="bold")
    table.add_column("to do")
    for title in ("TFLOP", "minutes"):
        table.add_column(title, justify="right")
    sweeps = {"plan": 0.0, "main": 0.0}
    for phase, flop in found.flop.items():
        spent = flop / (fitting if phase.endswith("fit") else forward)
        sweeps["plan" if phase.startswith("plan") else "main"] += spent
        table.add_row(phase, f"{flop / 1e12:,.1f}", f"{spent / 60:.1f}")
    seconds = sum(sweeps.values())
    if found.read_bytes:
        reading = found.read_bytes / _DISK_RATE
        table.add_row(
            f"reading {found.read_bytes / 2**30:.1f} GiB at {_DISK_RATE / 1e9:.0f} GB/s, meanwhile",
            "",
            f"{reading / 60:.1f}",
        )
        one = work.model_bytes / _DISK_RATE
        seconds = sum(max(spent, one) for spent in sweeps.values() if spent)
    # Side by side the two share a device: only what a fit pauses is saved, which nobody can tell beforehand.
    bound = ", at most" if overlap else ""
    table.add_row(
        f"[bold]in all{bound}[/bold]", f"{sum(found.flop.values()) / 1e12:,.1f}", f"{seconds / 60:.1f}"
    )
    return table
