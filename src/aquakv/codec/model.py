"""A whole model's codec: one `LayerCodec` per compressed layer, and what it needs to be trusted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from aquakv.codec.allocation import equal_widths
from aquakv.codec.entropy import (
    ALPHABET,
    MAX_LEVEL,
    NUM_CLASSES,
    NUM_TABLES,
    EntropyModel,
    EntropyQuantizer,
    most_levels,
)
from aquakv.codec.file import (
    CODEC_FILE,
    VERSION_WITHOUT_SAMPLES,
    FileKind,
    content_digest,
    header_text,
    read_file,
    write_file,
)
from aquakv.codec.fingerprint import ModelFingerprint
from aquakv.codec.guard import OutlierGuard
from aquakv.codec.latent import LatentStep, latent_steps
from aquakv.codec.layer import LayerCodec, TensorCodec
from aquakv.codec.pages import with_page_layouts
from aquakv.codec.predictor import AffinePredictor
from aquakv.codec.quantizer import build_quantizer
from aquakv.codec.scalar import ScalarQuantizer
from aquakv.codec.transform import LinearTransform, build_transform
from aquakv.config import CodecConfig, from_dict, to_dict
from aquakv.errors import CodecFileError, ConfigError, InputError
from aquakv.numerics.pages import FIELD_COLUMNS

Derived = TypeVar("Derived")
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
        One codec per compressed layer, in order, each with the form in which it keeps codes. Layer *i* reads
        layer *i - 1*'s reconstruction; whoever walks the layers carries it.
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
    _steps: dict[tuple[int, torch.device], LatentStep] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        layers = with_page_layouts(self.layers, self.fingerprint.num_kv_heads)
        object.__setattr__(self, "layers", layers)

    @property
    def bits_per_value(self) -> float:
        """Bits that the codes and scales of one value take, averaged over layers, with the codec's window.

        An expectation for entropy-coded layers, from text that calibration held out.
        """
        block = self.config.window.block_tokens
        stored = sum(layer.kept_bytes_per_token(block) for layer in self.layers)
        return 8 * stored / (2 * self.fingerprint.features * len(self.layers))

    def layer_on(self, index: int, device: torch.device) -> LayerCodec:
        """Return a layer's codec on a device; every cache of this codec shares the copy."""
        key = (index, device)
        if key not in self._placed:
            self._placed[key] = self.layers[index].to(device)
        return self._placed[key]

    def latent_step_on(self, index: int, device: torch.device) -> LatentStep:
        """Return the step from layer ``index``'s latent to the next one's on a device, made once.

        Raises
        ------
        ConfigError
            See `latent_steps`.
        """
        key = (index, device)
        if key not in self._steps:
            pair = [self.layer_on(number, device) for number in (index, index + 1)]
            self._steps[key] = latent_steps(pair)[0]
        return self._steps[key]

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """Return what ``make`` returned when first asked for ``key``: what others derive from this codec."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def save(self, path: str | Path) -> None:
        """Write the codec to one ``.safetensors`` file, all or nothing.

        Raises
        ------
        OutputError
            The file cannot be written; nothing is left behind, an older file stays as it was.
        """
        write_file(Path(path), self._file_kind, *self.content())

    @property
    def _file_kind(self) -> FileKind:
        """How files of this codec are written: with the version that it had when it was read."""
        if self.fingerprint.layer_samples:
            return CODEC_FILE
        return replace(CODEC_FILE, version=VERSION_WITHOUT_SAMPLES)

    def content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file of this codec holds: entries of its header, and tensors by name."""
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            tensors.update(layer_tensors(layer, index))
        fingerprint = to_dict(self.fingerprint)
        if not self.fingerprint.layer_samples:  # as files of version 4 have it
            del fingerprint["layer_samples"]
        header = {
            "config": to_dict(self.config),
            "fingerprint": fingerprint,
            "calibration": to_dict(dict(self.calibration)),
        }
        return header, tensors

    @property
    def digest(self) -> str:
        """The checksum that a file of this codec carries (64 hex digits), to know the codec by."""

        def make() -> str:
            header, tensors = self.content()
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            return content_digest(header_text(self._file_kind, header), plain)

        return self.derived("digest", make)

    @classmethod
    def load(cls, path: str | Path) -> ModelCodec:
        """Read a codec file onto the CPU.

        Raises
        ------
        CodecFileError
            The file is missing, truncated, altered or not a codec. No file content is ever executed.
        """
        header, tensors = read_file(Path(path), CODEC_FILE)
        codec = cls.from_content(header, tensors, str(path))
        version = header["format_version"]
        if version != codec._file_kind.version:
            there = "missing" if version == CODEC_FILE.version else "unexpected"
            raise CodecFileError(
                f"{path}: in format version {version} the key fingerprint.layer_samples is {there}; "
                f"{CODEC_FILE.if_other_version}"
            )
        return codec

    @classmethod
    def from_content(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> ModelCodec:
        """Return the codec of which `content` says this; ``where`` it was found, for messages.

        Raises
        ------
        CodecFileError
            It is not a codec's.
        """
        try:
            config = from_dict(CodecConfig, header["config"], "config")
            told = header["fingerprint"]
            if isinstance(told, Mapping):  # files of version 4 have no samples
                told = {"layer_samples": [], **told}
            fingerprint = from_dict(ModelFingerprint, told, "fingerprint")
            codec = cls(config, fingerprint, _layers_from_tensors(config, fingerprint, dict(tensors)))
            _require_shared_widths(codec)
        except ConfigError as error:
            raise CodecFileError(f"{where}: not a codec this version can use: {error}") from error
        if not isinstance(header["calibration"], dict):
            raise CodecFileError(f"{where}: expected an object under 'calibration' in the aquakv header")
        return replace(codec, calibration=header["calibration"])


def _require_shared_widths(codec: ModelCodec) -> None:
    for index, layer in enumerate(codec.layers):
        for kind in KINDS:
            pages = getattr(layer, kind).pages
            if pages is not None and not pages.is_uniform:
                raise ConfigError(
                    f"tensor layers.{index}.{kind}.widths: expected one width for each field of "
                    f"{FIELD_COLUMNS} coefficients of a head's keys, or of the values"
                )


def predictor_widths(config: CodecConfig, features: int, layer: int) -> dict[Kind, int]:
    """Return how many features each predictor of a layer reads; 0 where there is no predictor."""
    predictor = config.predictor
    if predictor.kind != "linear":
        return dict.fromkeys(KINDS, 0)
    reach = min(layer, predictor.history)
    own = int("keys" in predictor.value_inputs and (layer > 0 or predictor.first_layer_values))
    earlier = len(predictor.value_inputs) - int("keys" in predictor.value_inputs)
    return {
        "keys": features * len(predictor.key_inputs) * reach,
        "values": features * (own + earlier * reach),
    }


def layer_tensors(layer: LayerCodec, index: int) -> dict[str, Tensor]:
    """Return what a file holds of the codec of compressed layer ``index``, and of what all layers share."""
    tensors = {
        f"layers.{index}.{kind}.{name}": tensor
        for kind in KINDS
        for name, tensor in _tensors_of(getattr(layer, kind)).items()
    }
    quantizer = layer.keys.quantizer
    if isinstance(quantizer, EntropyQuantizer):
        tensors["entropy.frequencies"] = quantizer.model.frequencies
        tensors["entropy.points"] = quantizer.model.points
    return tensors


def build_published_codec(
    config: CodecConfig,
    features: int,
    layer: int,
    mean: Tensor,
    predictor: AffinePredictor | None,
    guard: OutlierGuard | None = None,
) -> TensorCodec:
    """Assemble the codec of one layer's keys or values whose transform and quantiser are not fitted."""
    transform = build_transform(config.transform, features).to(mean.device)
    widths = equal_widths(config.allocation, features, is_first_layer=layer == 0)
    quantizer = build_quantizer(config.quantizer, features, transform.group_size, widths)
    return TensorCodec(mean, predictor, transform, quantizer, guard)


def _tensors_of(codec: TensorCodec) -> dict[str, Tensor]:
    tensors = {"mean": codec.mean}
    if codec.predictor is not None:
        names = ("weight",) if codec.predictor.rank is None else ("down", "up")
        for name, factor in zip(names, codec.predictor.factors, strict=True):
            tensors[f"predictor.{name}"] = factor
        tensors["predictor.bias"] = codec.predictor.bias
    if isinstance(codec.transform, LinearTransform):
        tensors["analysis"] = codec.transform.analysis
        tensors["synthesis"] = codec.transform.synthesis
    if isinstance(codec.quantizer, ScalarQuantizer):
        tensors["deviations"] = codec.quantizer.deviations
        tensors["widths"] = codec.quantizer.widths
    if isinstance(codec.quantizer, EntropyQuantizer):
        for name in ("deviations", "classes", "step", "rate_bits"):
            tensors[name] = getattr(codec.quantizer, name)
    if codec.guard is not None:
        tensors["guard.roots"] = codec.guard.roots
        tensors["guard.limit"] = codec.guard.limit
    return tensors


class _Tensors:
    """Tensors of a file, handed out by name after a check of shape, dtype and values."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)

    def take(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor; None in ``shape`` stands for any length."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise ConfigError(f"tensor {name} is missing")
        fits = len(shape) == tensor.ndim and all(
            want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            wanted = ["any" if length is None else length for length in shape]
            raise ConfigError(
                f"tensor {name}: expected {dtype} {wanted}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"tensor {name} holds numbers that are not finite")
        return tensor

    def positive(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """Return a float32 tensor of positive numbers."""
        tensor = self.take(name, shape, torch.float32)
        if not bool((tensor > 0).all()):
            raise ConfigError(f"tensor {name}: expected positive numbers")
        return tensor

    def finish(self) -> None:
        """Raise if anything is left over."""
        if self._left:
            raise ConfigError(f"unexpected tensor {sorted(self._left)[0]!a}")


def _layers_from_tensors(
    config: CodecConfig, fingerprint: ModelFingerprint, tensors: dict[str, Tensor]
) -> tuple[LayerCodec, ...]:
    features = fingerprint.features
    if features < 1 or not fingerprint.compressed_layers:
        raise ConfigError(f"fingerprint: expected at least one feature and one layer, got {fingerprint}")
    if len(fingerprint.layer_hashes) != len(fingerprint.compressed_layers):
        raise ConfigError("fingerprint: expected one layer hash per compressed layer")
    source = _Tensors(tensors)
    model = _entropy_model(source) if config.quantizer.kind == "entropy" else None
    layers = []
    for index in range(len(fingerprint.compressed_layers)):
        codecs = {}
        for kind, width in predictor_widths(config, features, index).items():
            name = f"layers.{index}.{kind}"
            mean = source.take(f"{name}.mean", (features,), torch.float32)
            predictor = _predictor(source, config, name, kind, width, features)
            guard = None
            if config.guard.threshold is not None:
                dim = fingerprint.head_dim
                shape = (fingerprint.num_kv_heads, dim, dim)
                roots = source.take(f"{name}.guard.roots", shape, torch.float32)
                guard = OutlierGuard(roots, source.positive(f"{name}.guard.limit", (1,)))
            if config.transform.kind == "klt":
                codecs[kind] = _fitted_codec(source, config, name, kind, mean, predictor, guard, model)
            else:
                codecs[kind] = build_published_codec(config, features, index, mean, predictor, guard)
        layers.append(LayerCodec(codecs["keys"], codecs["values"], config.predictor))
    source.finish()
    return tuple(layers)


def _predictor(
    source: _Tensors, config: CodecConfig, name: str, kind: Kind, width: int, features: int
) -> AffinePredictor | None:
    if not width:
        return None
    rank = config.predictor.key_rank if kind == "keys" else config.predictor.value_rank
    if rank is None:
        factors = (source.take(f"{name}.predictor.weight", (width, features), torch.bfloat16),)
    else:
        rank = min(rank, width, features)
        factors = (
            source.take(f"{name}.predictor.down", (width, rank), torch.bfloat16),
            source.take(f"{name}.predictor.up", (rank, features), torch.bfloat16),
        )
    return AffinePredictor(factors, source.take(f"{name}.predictor.bias", (features,), torch.float32))


def _fitted_codec(
    source: _Tensors,
    config: CodecConfig,
    name: str,
    kind: Kind,
    mean: Tensor,
    predictor: AffinePredictor | None,
    guard: OutlierGuard | None,
    model: EntropyModel | None,
) -> TensorCodec:
    analysis = source.take(f"{name}.analysis", (len(mean), None), torch.float32)
    n, most = analysis.shape[1], config.transform.most_coefficients(kind, len(mean))
    if n > most:
        raise ConfigError(f"tensor {name}.analysis: expected at most {most} coefficients, got {n}")
    transform = LinearTransform(analysis, source.take(f"{name}.synthesis", (n, len(mean)), torch.float32))
    deviations = source.positive(f"{name}.deviations", (n,))
    if model is None:
        widths = source.take(f"{name}.widths", (n,), torch.uint8)
        if not set(widths.tolist()) <= set(config.allocation.widths):
            raise ConfigError(f"tensor {name}.widths: expected only {list(config.allocation.widths)}")
        quantizer = ScalarQuantizer(deviations, widths, config.quantizer.arithmetic)
        return TensorCodec(mean, predictor, transform, quantizer, guard)
    classes = source.take(f"{name}.classes", (n,), torch.uint8)
    if n and int(classes.max()) >= NUM_CLASSES:
        raise ConfigError(f"tensor {name}.classes: expected numbers below {NUM_CLASSES}")
    step, rate = source.positive(f"{name}.step", (1,)), source.positive(f"{name}.rate_bits", (1,))
    quantizer = EntropyQuantizer(deviations, classes, step, rate, model, config.quantizer.rate_weight)
    return TensorCodec(mean, predictor, transform, quantizer, guard)


def _entropy_model(source: _Tensors) -> EntropyModel:
    frequencies = source.take("entropy.frequencies", (NUM_TABLES, ALPHABET), torch.int32)
    points = source.take("entropy.points", (NUM_TABLES, MAX_LEVEL + 1), torch.float32)
    levels = torch.arange(-MAX_LEVEL, MAX_LEVEL + 1)
    if bool((frequencies[levels.abs() <= most_levels()[:, None]] < 1).any()):
        raise ConfigError("tensor entropy.frequencies: expected every level that a class can code")
    if bool((points < 0).any() | (points > 2 * levels[MAX_LEVEL:] + 1).any()):
        raise ConfigError("tensor entropy.points: expected numbers from 0 to twice the level plus 1")
    try:
        return EntropyModel(frequencies, points)
    except InputError as error:
        raise ConfigError(f"tensor entropy.frequencies: {error}") from error
