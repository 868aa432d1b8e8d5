"""Time and memory of calibration, on random weights of known shapes or on a model.

With random weights only time and memory mean something; the codec does not.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aquakv.calibration import calibrate_many
from aquakv.calibration.forecast import choose_waiting, forecast
from aquakv.calibration.group import Group
from aquakv.calibration.observe import Waiting
from aquakv.calibration.progress import Report
from aquakv.calibration.workload import workload_of
from aquakv.config import CodecConfig
from aquakv.evaluation.bench import Row
from aquakv.evaluation.shapes import shape_config
from aquakv.models.adapter import ModelAdapter, adapt
from aquakv.models.skeleton import build_skeleton
from aquakv.models.weights import Part, RandomWeights, StreamedWeights

#: Vocabulary of the Llama 3 models: embedding and head count here.
_VOCABULARY = 128256

#: Phases of the sweep that counts, which may go on side by side.
_SWEEP = ("observe", "fit", "fit, beside observing")


@dataclass(frozen=True)
class CalibrationBench:
    """What is calibrated.

    Attributes
    ----------
    contestant, shape
        How rows name it.
    adapter
        The model.
    tokens
        ``[sequences, seq_len]`` int64.
    config
        The codec.
    batch_size, offload, overlap
        As for `calibrate_many`.
    total_layers
        Layers of the whole model, of which ``adapter`` may have the first ones only.
    data
        What the tokens are.
    """

    contestant: str
    shape: str
    adapter: ModelAdapter
    tokens: Tensor
    config: CodecConfig
    batch_size: int
    offload: str
    total_layers: int
    overlap: bool | None = None
    data: str = "random tokens"

    def run(self, report: Report | None = None) -> list[Row]:
        """Calibrate once; return a row for every phase, and one for the whole."""
        device = self.adapter.device
        rate = matmul_rate(device, self.adapter.model.dtype)
        work = workload_of(
            self.adapter,
            len(self.tokens),
            self.tokens.shape[1],
            {"": self.config},
            self.batch_size,
            Group.current(device).size,
            self.total_layers,
        )
        waiting = choose_waiting(work, self.offload, self.overlap)
        foreseen = forecast(work, waiting)
        timings: dict[str, Any] = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        calibrate_many(
            self.adapter,
            self.tokens,
            {"": self.config},
            batch_size=self.batch_size,
            offload=waiting.name,
            overlap=waiting.overlap,
            progress=report,
            timings=timings,
            planned_layers=self.total_layers,
        )
        seconds = time.perf_counter() - started
        phases: dict[str, float] = timings["phases"]
        setting = self._setting(waiting)
        # Side by side, a phase's time is not that of its operations; the two together have theirs.
        shared = _SWEEP if waiting.overlap else ()
        rows = [
            {
                **setting,
                "phase": phase,
                **_speed(spent, None if phase in shared else foreseen.flop.get(phase), rate),
            }
            for phase, spent in phases.items()
        ]
        rows.append({**setting, "phase": "rest", "seconds": seconds - sum(phases.values())})
        rows += [
            {**setting, "phase": f"layer {layer}: {phase}", "seconds": spent}
            for (layer, phase), spent in timings["layers"].items()
            if phase in _SWEEP
        ]
        measured = {
            "peak_device_bytes": _peak_device(device),
            "peak_host_bytes": peak_host_bytes(),
            "predicted_device_bytes": foreseen.total("device"),
            "predicted_host_bytes": foreseen.total("host"),
            "matmul_tflops": rate / 1e12,
            "waited_for_weights_seconds": getattr(self.adapter.weights, "waited", None),
        }
        sweep = sum(phases.get(phase, 0.0) for phase in _SWEEP)
        operations = sum(foreseen.flop.get(phase, 0.0) for phase in _SWEEP)
        measured["sweep_of_matmul_rate"] = _speed(sweep, operations, rate).get("of_matmul_rate")
        whole = project(timings, seconds, len(self.adapter.layers), self.total_layers)
        total = {
            **setting,
            "phase": "total",
            **_speed(seconds, sum(foreseen.flop.values()), rate),
            **measured,
            "projected_total_seconds": sum(whole.values()),
            "projected_seconds": whole,
        }
        return [*rows, total]

    def _setting(self, waiting: Waiting) -> Row:
        return {
            "contestant": self.contestant,
            "shape": self.shape,
            "preset": self.config.preset,
            "data": self.data,
            "layers": len(self.adapter.layers),
            "total_layers": self.total_layers,
            "sequences": len(self.tokens),
            "seq_len": self.tokens.shape[1],
            "batch_size": self.batch_size,
            "offload": waiting.name,
            "overlap": waiting.overlap,
            "dtype": str(self.adapter.model.dtype).removeprefix("torch."),
        }


def project(timings: Mapping[str, Any], seconds: float, layers: int, total: int) -> dict[str, float]:
    """Return the seconds of each phase for a model of ``total`` layers, from those of its first ``layers``.

    A phase's time at a layer is that by the clock, whatever went on beside it. The first layer counts once
    (it has no predictors and waits for the embedding), the last once (nothing is observed beside its fit),
    and the mean of those between, if there are any, for all others; errors are sent through all layers
    behind theirs, so that harm grows with the square.
    """
    if layers == total:
        return {**timings["phases"], "rest": seconds - sum(timings["phases"].values())}
    found = {}
    for phase, spent in timings["phases"].items():
        own = {layer: s for (layer, name), s in timings["layers"].items() if name == phase}
        if phase == "plan: harm":
            found[phase] = spent * total * (total + 1) / (layers * (layers + 1))
        else:
            first, last = own.get(0, 0.0), own.get(layers - 1, 0.0)
            between = [own.get(layer, 0.0) for layer in range(1, layers - 1)] or [last]
            found[phase] = first + last + sum(between) / len(between) * (total - 2)
    found["rest"] = seconds - sum(timings["phases"].values())
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second that large matrix products reach here, the median of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(7):
        _wait(device)
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        _wait(device)
        times.append((time.perf_counter() - started) / 4)
    return 2.0 * size**3 / sorted(times[2:])[2]


def synthetic(shape: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> ModelAdapter:
    """Return a model whose random weights are made layer by layer when they are wanted."""
    skeleton = build_skeleton(shape_config(shape, layers, vocab_size=_VOCABULARY), dtype, device)
    return adapt(skeleton, StreamedWeights.of(skeleton, RandomWeights(), device))


def write_synthetic(
    shape: str, layers: int | None, dtype: torch.dtype, device: torch.device, directory: Path
) -> None:
    """Write a checkpoint of random weights, a file for every layer; one that is complete is left alone."""
    index = directory / "model.safetensors.index.json"
    config = shape_config(shape, layers, vocab_size=_VOCABULARY, dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["LlamaForCausalLM"]
    if index.is_file() and json.loads((directory / "config.json").read_text()) == json.loads(
        config.to_json_string()
    ):
        return
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    skeleton = build_skeleton(config, dtype, device)
    weights = StreamedWeights.of(skeleton, RandomWeights(), device)
    files: dict[str, str] = {}
    parts: list[Part] = ["input", *range(config.num_hidden_layers), "output"]
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        with weights.holding(part):
            state = skeleton.state_dict()
            save_file(
                {key: state[key].cpu() for key in weights.tensors_of(part)},
                directory / name,
                metadata={"format": "pt"},
            )
        files.update(dict.fromkeys(weights.tensors_of(part), name))
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def peak_host_bytes() -> int:
    """Return the most memory that this process has had so far; file contents that it mapped count too."""
    try:
        # Unlike what getrusage says, it does not begin with the size of the process that started this one.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_device(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _speed(seconds: float, flop: float | None, rate: float) -> Row:
    if not flop or not seconds:
        return {"seconds": seconds}
    return {
        "seconds": seconds,
        "flop": flop,
        "tflops": flop / seconds / 1e12,
        "of_matmul_rate": flop / seconds / rate,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
