"""What a codec is, as frozen dataclasses that go to and from plain dictionaries without losing anything.

A configuration names one choice for each of the four stages (predictor, transform, allocation, quantiser) and
for the tokens that stay exact. Presets are particular configurations, not other code.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from aquakv.errors import ConfigError

T = TypeVar("T")

PredictorKind = Literal["none", "mean", "dense"]
ValueInput = Literal["keys", "previous_values"]
TransformKind = Literal["hadamard", "identity"]
AllocationKind = Literal["equal"]
QuantizerKind = Literal["grid"]

#: Bits per coefficient for which a two-dimensional grid exists; other whole numbers use Lloyd-Max tables.
GRID_2D_BITS = (2, 3, 4)

#: Largest group of a transform: its square matrix (64 MiB at this size) is built whenever a codec is loaded.
MAX_GROUP_SIZE = 4096


@dataclass(frozen=True)
class PredictorConfig:
    """How a layer's keys and values are predicted from what the decoder already has.

    Attributes
    ----------
    kind
        ``none`` predicts zero, ``mean`` the calibration mean, ``dense`` an affine map of the reconstruction.
    value_inputs
        What the value predictor reads: this layer's reconstructed ``keys``, the ``previous_values`` of the
        layer before, or both. Only used by ``dense``.
    ridge
        Ridge penalty as a multiple of the mean diagonal of the inputs' covariance.
    """

    kind: PredictorKind = "dense"
    value_inputs: tuple[ValueInput, ...] = ("keys", "previous_values")
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"predictor.ridge: expected a finite number >= 0, got {self.ridge}")
        if self.kind == "dense" and (
            not self.value_inputs or len(set(self.value_inputs)) != len(self.value_inputs)
        ):
            raise ConfigError(
                "predictor.value_inputs: expected one or both of keys, previous_values, each once; "
                f"got {list(self.value_inputs)}"
            )


@dataclass(frozen=True)
class TransformConfig:
    """The orthogonal transform applied to groups of residual coordinates before quantisation.

    Attributes
    ----------
    kind
        ``hadamard`` spreads each group's energy evenly, ``identity`` leaves it as it is.
    max_group_size
        Upper bound on the group; the largest divisor of the vector's length up to this is used, so that no
        padding is ever stored (arXiv:2411.17525 pads, and stores the padding).
    """

    kind: TransformKind = "hadamard"
    max_group_size: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.max_group_size <= MAX_GROUP_SIZE:
            raise ConfigError(
                f"transform.max_group_size: expected a whole number from 1 to {MAX_GROUP_SIZE}, "
                f"got {self.max_group_size}"
            )


@dataclass(frozen=True)
class AllocationConfig:
    """How many bits each coefficient gets.

    Attributes
    ----------
    kind
        ``equal`` gives every coefficient the same whole number of bits.
    bits
        Mean bits per coefficient, scales not counted.
    first_layer_bits
        Bits in the first compressed layer, which has no predictor; never fewer than ``bits`` are used there.
        ``None`` treats it like the others.
    """

    kind: AllocationKind = "equal"
    bits: float = 2.0
    first_layer_bits: float | None = 4.0

    def __post_init__(self) -> None:
        for name, value in (("bits", self.bits), ("first_layer_bits", self.first_layer_bits)):
            if value is None:
                continue
            if not (math.isfinite(value) and 1 <= value <= 8):
                raise ConfigError(f"allocation.{name}: expected a number from 1 to 8, got {value}")
            if self.kind == "equal" and value != int(value):
                raise ConfigError(
                    f"allocation.{name}: equal allocation takes whole bits from 1 to 8, got {value}"
                )

    def layer_bits(self, is_first_layer: bool) -> int:
        """Return the bits per coefficient of a layer."""
        if is_first_layer and self.first_layer_bits is not None:
            return int(max(self.bits, self.first_layer_bits))
        return int(self.bits)


@dataclass(frozen=True)
class QuantizerConfig:
    """How normalised coefficients become codes.

    Attributes
    ----------
    kind
        ``grid``: nearest point of an MSE-optimal Gaussian grid (arXiv:2411.17525), one fp16 scale per group.
    grid_dim
        Largest dimension of the grids: 2 uses pairs of coefficients where a grid of that width exists
        (2, 3, 4 bits per coefficient) and Lloyd-Max tables elsewhere; 1 uses Lloyd-Max tables only.
    """

    kind: QuantizerKind = "grid"
    grid_dim: int = 2

    def __post_init__(self) -> None:
        if self.grid_dim not in (1, 2):
            raise ConfigError(f"quantizer.grid_dim: expected 1 or 2, got {self.grid_dim}")

    def dim_for(self, bits: int) -> int:
        """Return the dimension of the grid used at a number of bits per coefficient."""
        return 2 if self.grid_dim == 2 and bits in GRID_2D_BITS else 1


@dataclass(frozen=True)
class WindowConfig:
    """Which tokens stay in the model's dtype.

    Attributes
    ----------
    sink_tokens
        First real tokens of every sequence, never compressed (attention sinks).
    recent_window
        Newest tokens that are always kept exact, whatever else has gathered.
    block_tokens
        Tokens are compressed this many at a time, once so many stand between the sinks and the recent window.
        So the exact tail holds ``recent_window`` to ``recent_window + block_tokens - 1`` tokens.
    """

    sink_tokens: int = 4
    recent_window: int = 0
    block_tokens: int = 128

    def __post_init__(self) -> None:
        for name, least in (("sink_tokens", 0), ("recent_window", 0), ("block_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"window.{name}: expected a whole number >= {least}, got {getattr(self, name)}"
                )

    def coded_tokens(self, length: int) -> int:
        """Return how many tokens of a sequence of ``length`` tokens are compressed."""
        eligible = length - self.sink_tokens - self.recent_window
        return max(0, eligible) // self.block_tokens * self.block_tokens


@dataclass(frozen=True)
class CodecConfig:
    """A whole codec: one choice per stage, and the tokens that stay exact."""

    preset: str = "paper"
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    window: WindowConfig = field(default_factory=WindowConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain dictionaries, lists, numbers and strings."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CodecConfig:
        """Build a configuration; unknown or missing keys and wrong types raise `ConfigError`."""
        return from_dict(cls, data, where="config")


PRESETS = ("paper", "higgs")


def preset(name: str, bits: float | None = None) -> CodecConfig:
    """Return a preset's configuration.

    Parameters
    ----------
    name
        ``paper`` (arXiv:2501.19392: dense predictors, Hadamard transform, equal bits, two-dimensional grid,
        first layer at 4 bits) or ``higgs`` (the same without predictors: arXiv:2411.17525 after subtraction
        of each layer's mean, which costs nothing and makes it a stronger baseline).
    bits
        Mean bits per coefficient; the preset's own (2) if None.

    Raises
    ------
    ConfigError
        The name is unknown, or the preset does not take that number of bits.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of: {', '.join(PRESETS)}")
    allocation = AllocationConfig(bits=2.0 if bits is None else float(bits))
    predictor = PredictorConfig(kind="dense" if name == "paper" else "mean")
    return CodecConfig(preset=name, predictor=predictor, allocation=allocation)


def to_dict(value: Any) -> Any:
    """Turn a dataclass into plain dictionaries, lists, numbers and strings, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_dict(item) for key, item in value.items()}
    return value


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build a dataclass from a dictionary, strictly: every field present, nothing else, right types.

    Raises
    ------
    ConfigError
        Names the first offending key by its full path and lists what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected an object, got {type(data).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}; expected: {', '.join(names)}")
    for name in names:
        if name not in data:
            raise ConfigError(f"{where}: missing key {name!r}; expected: {', '.join(names)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], data[name], f"{where}.{name}") for name in names})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {type(value).__name__}")
        return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected an object, got {type(value).__name__}")
        return {str(k): _convert(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(
                f"{where}: expected a finite number, got one of {value.bit_length()} bits"
            ) from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {type(value).__name__} ({value!r})")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value}")
    return value
