"""Fit one codec, layer by layer, in a closed loop: predictors read reconstructions, never exact values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aquakv.codec import AffinePredictor, LayerCodec, ModelCodec, ModelFingerprint, TensorCodec
from aquakv.codec.model import build_tensor_codec, predictor_widths
from aquakv.config import CodecConfig
from aquakv.numerics import StreamingMoments, ridge

Batches = list[Tensor]


@dataclass(frozen=True)
class Split:
    """Which sequences of each batch are fitted; the others are held out.

    Attributes
    ----------
    fitted
        For every batch, how many of its first sequences are fitted.
    """

    fitted: tuple[int, ...]

    @classmethod
    def of(cls, batch_sizes: Sequence[int], held_out: int) -> Split:
        """Hold out the last ``held_out`` sequences."""
        left = sum(batch_sizes) - held_out
        fitted = []
        for size in batch_sizes:
            fitted.append(max(0, min(size, left)))
            left -= size
        return cls(tuple(fitted))


@dataclass
class _HeldOut:
    """Sums of squares over held-out tokens."""

    total: float = 0.0
    residual: float = 0.0
    error: float = 0.0

    def figures(self) -> dict[str, float]:
        """Return fractions of the held-out variance."""
        total = max(self.total, 1e-30)
        return {
            "explained_variance": 1 - self.residual / total,
            "reconstruction_error": self.error / total,
        }


@dataclass
class CodecFit:
    """A codec in the making.

    Attributes
    ----------
    config, fingerprint
        What is being built, and for which model.
    split
        Fitted and held-out sequences.
    device
        Where the arithmetic runs.
    on_batch
        Called after each batch of each sweep (progress).
    layers, record
        The finished layers, and their held-out figures.
    """

    config: CodecConfig
    fingerprint: ModelFingerprint
    split: Split
    device: torch.device
    on_batch: Callable[[], None]
    layers: list[LayerCodec] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)
    _previous: dict[str, Batches] = field(default_factory=dict)

    #: Sweeps over the batches that `fit_layer` makes, for whoever counts progress.
    SWEEPS = 4

    def fit_layer(self, keys: Batches, values: Batches) -> None:
        """Fit the next layer.

        Parameters
        ----------
        keys, values
            Batches ``[sequences, tokens, num_kv_heads * head_dim]`` without the sink tokens, in any float
            dtype, on any device; keys before rotary embedding.
        """
        index = len(self.layers)
        widths = predictor_widths(self.config, self.fingerprint.features, index)
        key_inputs = [self._previous["keys"]] if widths["keys"] else []
        key_codec, key_hat, key_figures = self._fit_tensor(index, keys, key_inputs)
        available = {"keys": key_hat, "previous_values": self._previous.get("values", [])}
        chosen = self.config.predictor.value_inputs if widths["values"] else ()
        value_inputs = [available[name] for name in chosen]
        value_codec, value_hat, value_figures = self._fit_tensor(index, values, value_inputs)
        self._previous = {"keys": key_hat, "values": value_hat}
        layer = LayerCodec(key_codec, value_codec, self.config.predictor.value_inputs)
        self.layers.append(layer)
        self.record.append(
            {
                "layer": self.fingerprint.compressed_layers[index],
                "bits_per_value": 8 * layer.bytes_per_token / (2 * layer.features),
                "keys": key_figures,
                "values": value_figures,
            }
        )

    def finish(self, calibration: dict[str, Any]) -> ModelCodec:
        """Return the codec, on the CPU, with a calibration record that ends with the figures by layer."""
        layers = tuple(layer.to("cpu") for layer in self.layers)
        record = {**calibration, "layers": self.record}
        return ModelCodec(self.config, self.fingerprint, layers, record)

    def _fit_tensor(
        self, index: int, targets: Batches, inputs: list[Batches]
    ) -> tuple[TensorCodec, Batches, dict[str, float]]:
        mean, predictor = self._regress(targets, inputs)
        offset = torch.zeros_like(mean) if self.config.predictor.kind == "none" else mean
        codec = build_tensor_codec(self.config, self.fingerprint.features, index, offset, predictor)
        codec = codec.to(self.device)
        held_out = _HeldOut()
        reconstructions: Batches = []
        for number, batch in enumerate(targets):
            centred = self._rows(batch).float() - codec.mean
            sources = tuple(self._rows(source[number]).float() for source in inputs)
            prediction = codec.predict(centred, sources)
            residual = centred - prediction
            _, hat = codec.encode_residual(residual, prediction)
            first = self.split.fitted[number] * batch.shape[1]
            held_out.total += _square_sum(centred[first:] + codec.mean - mean)
            held_out.residual += _square_sum(residual[first:])
            held_out.error += _square_sum(centred[first:] - hat[first:])
            reconstructions.append(hat.view(batch.shape).to(device=batch.device, dtype=batch.dtype))
            self.on_batch()
        return codec, reconstructions, held_out.figures()

    def _regress(self, targets: Batches, inputs: list[Batches]) -> tuple[Tensor, AffinePredictor | None]:
        """Return the targets' mean over the fitted sequences, and the predictor of what is left of them."""
        in_features = sum(source[0].shape[-1] for source in inputs)
        moments = StreamingMoments(in_features, self.fingerprint.features, self.device)
        for number, batch in enumerate(targets):
            fitted = self.split.fitted[number]
            if fitted:
                y = self._rows(batch[:fitted])
                blocks = [self._rows(source[number][:fitted]) for source in inputs]
                moments.update(torch.cat(blocks, -1) if blocks else y.new_empty(y.shape[0], 0), y)
            self.on_batch()
        mean = moments.mean_y.float()
        if not inputs:
            return mean, None
        fitted_map = ridge(moments, self.config.predictor.ridge)
        bias = (fitted_map.bias.double() - moments.mean_y).float()
        return mean, AffinePredictor(fitted_map.weight.to(torch.bfloat16), bias)

    def _rows(self, batch: Tensor) -> Tensor:
        return batch.to(self.device).flatten(0, 1)


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))
