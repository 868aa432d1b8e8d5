"""Open a model whose weights stay on disk but for the layer at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aquakv.errors import ModelError
from aquakv.models.adapter import ModelAdapter, adapt
from aquakv.models.checkpoint import CheckpointWeights
from aquakv.models.loading import DTYPES, load_config, load_tokenizer, quiet, resolve_device, resolve_model
from aquakv.models.skeleton import build_skeleton
from aquakv.models.weights import RandomWeights, StreamedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StreamedModel:
    """A model on disk, with its tokenizer.

    Attributes
    ----------
    adapter
        For `aquakv.calibrate`.
    tokenizer
        The model's own.
    name
        The ``MODEL`` argument as given.
    """

    adapter: ModelAdapter
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def model(self) -> PreTrainedModel:
        """The model without weights."""
        return self.adapter.model


def open_streamed(model: str, dtype: str = "auto", device: str | torch.device = "auto") -> StreamedModel:
    """Open a checkpoint for calibration without loading it.

    Takes what `load_model` does.

    Raises
    ------
    ModelError
        The model is missing, damaged or incomplete, or its weights are not in safetensors files.
    UnsupportedModelError
        Its weights cannot be read in parts, or it cannot be compressed correctly.
    """
    if dtype not in DTYPES:
        raise ModelError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}; choose one of them")
    place = resolve_device(str(device))
    path = resolve_model(model)
    with quiet():
        config = load_config(model, path)
        tokenizer = load_tokenizer(model, path)
        adapter = stream_directory(_directory(model, path), config, dtype, place)
    return StreamedModel(adapter, tokenizer, model)


def stream_directory(directory: Path, config: Any, dtype: str, device: torch.device) -> ModelAdapter:
    """Return the adapter of a model whose weights are read from a directory part by part."""
    reader = CheckpointWeights.open(directory)
    skeleton = build_skeleton(config, _dtype(dtype, config, reader), device)
    weights = StreamedWeights.of(skeleton, reader, device)
    reader.prepare(skeleton, weights.names)
    return adapt(skeleton, weights)


def open_without_weights(model: str, dtype: str, device: torch.device) -> ModelAdapter:
    """Return the adapter of a model of which only the configuration is read, to plan with.

    Raises
    ------
    ModelError
        There is no such model.
    UnsupportedModelError
        It cannot be compressed correctly.
    """
    path = resolve_model(model)
    with quiet():
        config = load_config(model, path)
        skeleton = build_skeleton(config, _dtype(dtype, config, None), device)
        return adapt(skeleton, StreamedWeights.of(skeleton, RandomWeights(), device))


def weight_bytes(model: str, dtype: str = "auto") -> int | None:
    """Return the bytes of a model's weights, told without loading them; None if that cannot be told.

    Of a local directory its files count, of a Hub id what its configuration says.
    """
    try:
        path = resolve_model(model)
        if Path(path).is_dir():
            return CheckpointWeights.open(Path(path)).size
        with quiet():
            config = load_config(model, path)
            kind = _dtype(dtype, config, None)
            skeleton = build_skeleton(config, kind, torch.device("cpu"))
        return sum(parameter.numel() for parameter in skeleton.parameters()) * kind.itemsize
    except (ModelError, ValueError):  # who loads it will say what is wrong
        return None


def _directory(name: str, path: str) -> Path:
    """Return where a model's files are; those of a Hub id are downloaded first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the Hub's errors share no base class
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"the weights of {name} could not be had from the Hub ({reason}); check the name and the "
            "connection, or give a local directory"
        ) from error


def _dtype(asked: str, config: Any, reader: CheckpointWeights | None) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    found = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    return found or (reader and reader.dtype()) or torch.float32
