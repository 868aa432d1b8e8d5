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
from aquakv.calibration.fit import Batches, CodecFit, Split
from aquakv.calibration.walk import LayerWalk
from aquakv.codec import ModelCodec
from aquakv.config import CodecConfig
from aquakv.errors import ConfigError, DataError
from aquakv.models.adapter import ModelAdapter, adapt


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
    that layer and the one before.

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
    waiting = torch.device("cpu") if activation_device == "cpu" else model.device
    num_layers, batches = adapter.compressed_layers[-1] + 1, -(-sequences // batch_size)
    sweeps = CodecFit.SWEEPS * len(configs) * len(adapter.compressed_layers)
    done, layer_idx = 0, 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(CalibrationProgress(done, batches * (num_layers + sweeps), layer_idx, num_layers))

    walk = LayerWalk(adapter, tokens, batch_size, waiting)
    split = Split.of([hidden.shape[0] for hidden in walk.hidden], held_out)
    fingerprint = adapter.fingerprint()
    fits = {
        name: CodecFit(config, fingerprint, split, model.device, tick) for name, config in configs.items()
    }
    for layer_idx in range(num_layers):
        keys: dict[int, Batches] = {fit.config.window.sink_tokens: [] for fit in fits.values()}
        values: dict[int, Batches] = {sinks: [] for sinks in keys}
        for key_batch, value_batch in walk.advance(layer_idx, tick):
            for sinks in keys:
                keys[sinks].append(key_batch[:, sinks:].to(waiting))
                values[sinks].append(value_batch[:, sinks:].to(waiting))
        if layer_idx in adapter.compressed_layers:
            for fit in fits.values():
                sinks = fit.config.window.sink_tokens
                fit.fit_layer(keys[sinks], values[sinks])
    shared = {
        **(record or {}),
        "sequences": sequences,
        "held_out_sequences": held_out,
        "seq_len": seq_len,
        "tokens": sequences * seq_len,
        "seconds": round(time.perf_counter() - started, 3),
        "device": str(model.device),
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "versions": library_versions(),
    }
    return {name: fit.finish(shared) for name, fit in fits.items()}


def library_versions() -> dict[str, str]:
    """Return the versions of everything that can change a figure."""
    return {
        "aquakv": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _check_tokens(tokens: Tensor, adapter: ModelAdapter) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.shape[0] < 2:
        raise DataError(
            f"calibration tokens: expected at least 2 sequences of equal length, got {list(tokens.shape)}"
        )
    sequences, seq_len = tokens.shape
    adapter.require_length(seq_len)
    return sequences, seq_len


def _check_enough(name: str, config: CodecConfig, features: int, tokens: int) -> None:
    needed = features * len(config.predictor.value_inputs) if config.predictor.kind == "dense" else 1
    if tokens < needed:
        raise DataError(
            f"{name or config.preset}: expected at least {needed} calibration tokens beside held-out ones "
            f"and sinks (a predictor's number of inputs), got {tokens}; use more or longer sequences"
        )
