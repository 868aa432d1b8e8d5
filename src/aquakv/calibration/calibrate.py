"""Calibrate codecs: one pass over the layers, hidden states from the uncompressed model."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from aquakv._version import __version__
from aquakv.calibration.fit import CodecFit, Split
from aquakv.calibration.observe import Observer
from aquakv.calibration.plan import Plan
from aquakv.calibration.planner import TRIALS, Planner, fit_observation, needs_weights
from aquakv.codec import ModelCodec
from aquakv.codec.model import predictor_widths
from aquakv.config import CodecConfig
from aquakv.errors import ConfigError, DataError
from aquakv.models.adapter import ModelAdapter, adapt

#: Keys and values of all layers that are held at once to plan the allocation; beyond, a part must do.
MOST_OBSERVED_BYTES = 6 << 30

#: Trial fits that plan the allocation see at least this many tokens, and this many per predictor input (with
#: fewer, residuals look smaller than they are): all text would tell the water level hardly better.
PLAN_TOKENS = 32768
_PLAN_TOKENS_PER_INPUT = 24


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is.

    Attributes
    ----------
    done, total
        Batches processed, over all layers and sweeps.
    layer, num_layers
        The decoder layer at hand, and how many there are.
    """

    done: int
    total: int
    layer: int
    num_layers: int


def calibrate(
    model: PreTrainedModel,
    tokens: Tensor,
    config: CodecConfig,
    *,
    batch_size: int = 4,
    held_out: int | None = None,
    activation_device: str = "cpu",
    record: Mapping[str, Any] | None = None,
    progress: Callable[[CalibrationProgress], None] | None = None,
) -> ModelCodec:
    """Calibrate one codec; see `calibrate_many`."""
    codecs = calibrate_many(
        model,
        tokens,
        {"": config},
        batch_size=batch_size,
        held_out=held_out,
        activation_device=activation_device,
        record=record,
        progress=progress,
    )
    return codecs[""]


@torch.no_grad()
def calibrate_many(
    model: PreTrainedModel,
    tokens: Tensor,
    configs: Mapping[str, CodecConfig],
    *,
    batch_size: int = 4,
    held_out: int | None = None,
    activation_device: str = "cpu",
    record: Mapping[str, Any] | None = None,
    progress: Callable[[CalibrationProgress], None] | None = None,
) -> dict[str, ModelCodec]:
    """Calibrate several codecs in one pass over the model (arXiv:2501.19392 §3).

    At any time the exact keys and values of one layer are held, and for each codec the reconstructions of
    that layer and those before that its predictors read. Codecs that allocate bits over the whole model are
    planned first, on as many sequences as `MOST_OBSERVED_BYTES` of keys and values allow.

    Parameters
    ----------
    model
        The model; its weights and its device are left alone.
    tokens
        ``[sequences, seq_len]`` int64 token ids without padding.
    configs
        What to build, by name.
    batch_size
        Sequences that go through a layer at once.
    held_out
        Sequences kept from the fit, for the record's figures; an eighth of them, at least one, if None.
    activation_device
        ``cpu`` or ``model``: where hidden states, keys and values of all sequences wait.
    record
        Further entries for the codecs' calibration records, such as the data's name.
    progress
        Called after every batch of every sweep.

    Raises
    ------
    DataError
        Too few sequences or tokens, or sequences longer than the model takes.
    UnsupportedModelError
        The model cannot be compressed correctly.
    """
    adapter = adapt(model)
    sequences, seq_len = _check_tokens(tokens, adapter)
    held_out = max(1, sequences // 8) if held_out is None else held_out
    if not 1 <= held_out < sequences:
        raise DataError(f"expected between 1 and {sequences - 1} held-out sequences, got {held_out}")
    if activation_device not in ("cpu", "model"):
        raise ConfigError(f"activation_device: expected cpu or model, got {activation_device!r}")
    for name, config in configs.items():
        fitted = (sequences - held_out) * max(0, seq_len - config.window.sink_tokens)
        _check_enough(name, config, adapter.features, fitted)
    started = time.perf_counter()
    waiting = torch.device("cpu") if activation_device == "cpu" else adapter.device
    observed = _observed_sequences(adapter, tokens, configs)
    trial = _trial_batches(adapter, tokens[:observed], batch_size, configs)
    ticker = _Ticker.of(adapter, sequences, batch_size, (observed, trial), configs, progress)
    observer = Observer(adapter, batch_size, waiting, ticker, observed > 0, ticker.reach)
    fingerprint = adapter.fingerprint()
    plans: dict[str, Plan] = {}
    harm: list[dict[str, float]] | None = None
    stream = observer.walk(tokens)
    if observed:
        observations = list(observer.walk(tokens[:observed]))
        few = [observation.head(trial) for observation in observations]
        tried = sum(few[0].batch_sizes)
        planner = Planner(adapter, tokens, few, max(1, tried * held_out // sequences), ticker, ticker.reach)
        adaptive = {n: c for n, c in configs.items() if c.allocation.kind == "water-filling"}
        plans, harm = planner.plan(adaptive)
        if observed == sequences:
            stream = iter(observations)
    split = Split.of([len(batch) for batch in tokens.split(batch_size)], held_out)
    fits = {
        name: CodecFit(config, fingerprint, split, adapter.device, ticker, plans.get(name, Plan()))
        for name, config in configs.items()
    }
    for order, observation in enumerate(stream):
        ticker.reach(observation.layer)
        for fit in fits.values():
            fit_observation(fit, observation, None if harm is None else harm[order])
    shared = {
        **(record or {}),
        "sequences": sequences,
        "held_out_sequences": held_out,
        "seq_len": seq_len,
        "tokens": sequences * seq_len,
        "seconds": round(time.perf_counter() - started, 3),
        "device": _devices(adapter),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "versions": library_versions(),
    }
    return {name: fit.finish(shared) for name, fit in fits.items()}


@dataclass
class _Ticker:
    """Counts batches over all walks and sweeps."""

    total: int
    num_layers: int
    report: Callable[[CalibrationProgress], None] | None
    done: int = 0
    layer: int = 0

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        sequences: int,
        batch_size: int,
        planned: tuple[int, int],
        configs: Mapping[str, CodecConfig],
        report: Callable[[CalibrationProgress], None] | None,
    ) -> _Ticker:
        """Foresee how many ticks a calibration takes.

        ``planned`` are the sequences that are observed at once and the batches that trial fits see.
        """
        observed, trial = planned
        num_layers = adapter.compressed_layers[-1] + 1
        batches, few = -(-sequences // batch_size), -(-observed // batch_size)
        sweeps = CodecFit.SWEEPS * len(adapter.compressed_layers)
        adaptive = sum(config.allocation.kind == "water-filling" for config in configs.values())
        total = few * num_layers + trial * adaptive * TRIALS * sweeps + batches * len(configs) * sweeps
        if observed < sequences:
            total += batches * num_layers
        return cls(total, num_layers, report)

    def reach(self, layer: int) -> None:
        """Note that work on a layer begins."""
        self.layer = layer

    def __call__(self) -> None:
        self.done += 1
        if self.report is not None:
            self.report(CalibrationProgress(self.done, self.total, self.layer, self.num_layers))


def _observed_sequences(adapter: ModelAdapter, tokens: Tensor, configs: Mapping[str, CodecConfig]) -> int:
    """Return of how many sequences the keys and values of all layers are held at once, to plan with."""
    if not any(needs_weights(config) for config in configs.values()):
        return 0
    sequences, seq_len = tokens.shape
    itemsize = adapter.model.dtype.itemsize
    size = 2 * adapter.features * len(adapter.compressed_layers) * seq_len * itemsize
    return max(min(2, sequences), min(sequences, MOST_OBSERVED_BYTES // size))


def _trial_batches(
    adapter: ModelAdapter, observed: Tensor, batch_size: int, configs: Mapping[str, CodecConfig]
) -> int:
    """Return how many batches of the observed sequences, at least two sequences, trial fits see."""
    sequences, seq_len = observed.shape
    inputs = max(_most_inputs(config, adapter.features) for config in configs.values())
    wanted = -(-max(PLAN_TOKENS, _PLAN_TOKENS_PER_INPUT * inputs) // seq_len)
    return -(-min(sequences, max(2, wanted)) // batch_size)


def library_versions() -> dict[str, str]:
    """Return the versions of everything that can change a figure."""
    return {
        "aquakv": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _devices(adapter: ModelAdapter) -> str:
    """Return the names of the devices that compute, in order."""
    used = [adapter.device, *(adapter.layer_device(index) for index in range(len(adapter.layers)))]
    return ", ".join(dict.fromkeys(map(str, used)))


def _check_tokens(tokens: Tensor, adapter: ModelAdapter) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.shape[0] < 2:
        raise DataError(
            f"calibration tokens: expected at least 2 sequences of equal length, got {list(tokens.shape)}"
        )
    sequences, seq_len = tokens.shape
    adapter.require_length(seq_len)
    return sequences, seq_len


def _most_inputs(config: CodecConfig, features: int) -> int:
    """Return the number of inputs of a configuration's largest predictor."""
    return max(predictor_widths(config, features, config.predictor.history).values())


def _check_enough(name: str, config: CodecConfig, features: int, tokens: int) -> None:
    needed = max(1, _most_inputs(config, features))
    if tokens < needed:
        raise DataError(
            f"{name or config.preset}: expected at least {needed} calibration tokens beside held-out ones "
            f"and sinks (a predictor's number of inputs), got {tokens}; use more or longer sequences"
        )
