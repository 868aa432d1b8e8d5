"""A whole model's codec: one `LayerCodec` per compressed layer, and what it needs to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquakv.codec.allocation import allocate
from aquakv.codec.file import read_codec_file, write_codec_file
from aquakv.codec.fingerprint import ModelFingerprint
from aquakv.codec.layer import LayerCodec, TensorCodec
from aquakv.codec.predictor import AffinePredictor
from aquakv.codec.quantizer import build_quantizer
from aquakv.codec.transform import build_transform
from aquakv.config import CodecConfig, from_dict, to_dict
from aquakv.errors import CodecFileError, ConfigError

Kind = str
KINDS: tuple[Kind, ...] = ("keys", "values")


@dataclass(frozen=True)
class ModelCodec:
    """The codec of a model's KV cache.

    Attributes
    ----------
    config
        The choices it was built from.
    fingerprint
        The model it belongs to.
    layers
        One codec per compressed layer, in order. Layer *i* reads layer *i - 1*'s reconstruction; whoever
        walks the layers carries it.
    calibration
        Record of the calibration: data, tokens, seed, figures by layer, library versions.
    """

    config: CodecConfig
    fingerprint: ModelFingerprint
    layers: tuple[LayerCodec, ...]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    _placed: dict[tuple[int, torch.device], LayerCodec] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def bits_per_value(self) -> float:
        """Bits that the codes and scales of one value take, averaged over layers."""
        stored = sum(layer.bytes_per_token for layer in self.layers)
        return 8 * stored / (2 * self.fingerprint.features * len(self.layers))

    def layer_on(self, index: int, device: torch.device) -> LayerCodec:
        """Return a layer's codec on a device; every cache of this codec shares the copy."""
        key = (index, device)
        if key not in self._placed:
            self._placed[key] = self.layers[index].to(device)
        return self._placed[key]

    def save(self, path: str | Path) -> None:
        """Write the codec to one ``.safetensors`` file, all or nothing.

        Raises
        ------
        OutputError
            The file cannot be written; nothing is left behind, an older file stays as it was.
        """
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                codec: TensorCodec = getattr(layer, kind)
                tensors[f"layers.{index}.{kind}.mean"] = codec.mean
                if codec.predictor is not None:
                    tensors[f"layers.{index}.{kind}.predictor.weight"] = codec.predictor.weight
                    tensors[f"layers.{index}.{kind}.predictor.bias"] = codec.predictor.bias
        header = {
            "config": to_dict(self.config),
            "fingerprint": to_dict(self.fingerprint),
            "calibration": to_dict(dict(self.calibration)),
        }
        write_codec_file(Path(path), header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> ModelCodec:
        """Read a codec file onto the CPU.

        Raises
        ------
        CodecFileError
            The file is missing, truncated, altered or not a codec. No file content is ever executed.
        """
        header, tensors = read_codec_file(Path(path))
        try:
            config = from_dict(CodecConfig, header["config"], "config")
            fingerprint = from_dict(ModelFingerprint, header["fingerprint"], "fingerprint")
            layers = _layers_from_tensors(config, fingerprint, dict(tensors))
        except ConfigError as error:
            raise CodecFileError(f"{path}: not a codec this version can use: {error}") from error
        if not isinstance(header["calibration"], dict):
            raise CodecFileError(f"{path}: expected an object under 'calibration' in the aquakv header")
        return cls(config, fingerprint, layers, header["calibration"])


def predictor_widths(config: CodecConfig, features: int, layer: int) -> dict[Kind, int]:
    """Return how many features each predictor of a layer reads; 0 where there is no predictor."""
    if config.predictor.kind != "dense" or layer == 0:
        return dict.fromkeys(KINDS, 0)
    return {"keys": features, "values": features * len(config.predictor.value_inputs)}


def build_tensor_codec(
    config: CodecConfig, features: int, layer: int, mean: Tensor, predictor: AffinePredictor | None
) -> TensorCodec:
    """Assemble the codec of one layer's keys or values from what was fitted (mean and predictor)."""
    transform = build_transform(config.transform, features).to(mean.device)
    widths = allocate(config.allocation, features, is_first_layer=layer == 0)
    quantizer = build_quantizer(config.quantizer, features, transform.group_size, widths)
    return TensorCodec(mean, predictor, transform, quantizer)


def _layers_from_tensors(
    config: CodecConfig, fingerprint: ModelFingerprint, tensors: dict[str, Tensor]
) -> tuple[LayerCodec, ...]:
    features = fingerprint.features
    if features < 1 or not fingerprint.compressed_layers:
        raise ConfigError(f"fingerprint: expected at least one feature and one layer, got {fingerprint}")
    if len(fingerprint.layer_hashes) != len(fingerprint.compressed_layers):
        raise ConfigError("fingerprint: expected one layer hash per compressed layer")

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise ConfigError(f"tensor {name} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ConfigError(
                f"tensor {name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"tensor {name} holds numbers that are not finite")
        return tensor

    layers = []
    for index in range(len(fingerprint.compressed_layers)):
        codecs = {}
        for kind, width in predictor_widths(config, features, index).items():
            name = f"layers.{index}.{kind}"
            mean = take(f"{name}.mean", (features,), torch.float32)
            predictor = None
            if width:
                predictor = AffinePredictor(
                    take(f"{name}.predictor.weight", (width, features), torch.bfloat16),
                    take(f"{name}.predictor.bias", (features,), torch.float32),
                )
            codecs[kind] = build_tensor_codec(config, features, index, mean, predictor)
        layers.append(LayerCodec(codecs["keys"], codecs["values"], config.predictor.value_inputs))
    if tensors:
        raise ConfigError(f"unexpected tensor {sorted(tensors)[0]!a}")
    return tuple(layers)
