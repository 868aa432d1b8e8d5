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

PredictorKind = Literal["none", "mean", "linear"]
KeyInput = Literal["previous_keys", "previous_values"]
ValueInput = Literal["keys", "previous_keys", "previous_values"]
TransformKind = Literal["hadamard", "identity", "klt"]
TransformScope = Literal["all-heads", "head", "two-stage"]
AllocationKind = Literal["equal", "water-filling"]
Importance = Literal["equal", "measured"]
QuantizerKind = Literal["grid", "scalar", "entropy"]

#: Bits per coefficient for which a two-dimensional grid exists; other whole numbers use Lloyd-Max tables.
GRID_2D_BITS = (2, 3, 4)

#: Most layers that predictors can reach back: all their reconstructions are alive at once.
MAX_HISTORY = 8

#: Largest group of a transform: its square matrix (64 MiB at this size) is built whenever a codec is loaded.
MAX_GROUP_SIZE = 4096


@dataclass(frozen=True)
class PredictorConfig:
    """How a layer's keys and values are predicted from what the decoder already has.

    Attributes
    ----------
    kind
        ``none`` predicts zero, ``mean`` the calibration mean, ``linear`` an affine map of reconstructions.
    key_inputs, value_inputs
        What the predictors read: earlier layers' reconstructed keys and values, and for values this layer's
        ``keys``. Only used by ``linear``.
    history
        How many earlier layers the ``previous_…`` inputs reach back.
    first_layer_values
        Whether the first layer's values are predicted from its keys (the published method does not).
    key_rank, value_rank
        Rank of the maps; None leaves them dense. A rank-r map goes through an r-dimensional latent.
    ridge
        Ridge penalty as a multiple of the mean diagonal of the inputs' covariance.
    """

    kind: PredictorKind = "linear"
    key_inputs: tuple[KeyInput, ...] = ("previous_keys",)
    value_inputs: tuple[ValueInput, ...] = ("keys", "previous_values")
    history: int = 1
    first_layer_values: bool = False
    key_rank: int | None = None
    value_rank: int | None = None
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"predictor.ridge: expected a finite number >= 0, got {self.ridge}")
        for name, allowed in (
            ("key_inputs", typing.get_args(KeyInput)),
            ("value_inputs", typing.get_args(ValueInput)),
        ):
            inputs = getattr(self, name)
            if self.kind == "linear" and (not inputs or len(set(inputs)) != len(inputs)):
                raise ConfigError(
                    f"predictor.{name}: expected some of {', '.join(allowed)}, each once; got {list(inputs)}"
                )
        if not 1 <= self.history <= MAX_HISTORY:
            raise ConfigError(
                f"predictor.history: expected a whole number from 1 to {MAX_HISTORY}, got {self.history}"
            )
        for name in ("key_rank", "value_rank"):
            rank = getattr(self, name)
            if rank is not None and rank < 1:
                raise ConfigError(f"predictor.{name}: expected a whole number >= 1 or null, got {rank}")


@dataclass(frozen=True)
class TransformConfig:
    """The linear transform applied to the residual before quantisation.

    Attributes
    ----------
    kind
        ``hadamard`` spreads each group's energy evenly, ``identity`` leaves it as it is, ``klt`` decorrelates
        it (Karhunen-Loeve transform of the residual in the norm that attention feels).
    max_group_size
        Upper bound on the group of ``hadamard`` and ``identity``; the largest divisor of the vector's length
        up to this is used, so that no padding is ever stored (arXiv:2411.17525 pads, and stores the padding).
    key_scope, value_scope
        Whether ``klt`` mixes the coordinates of ``all-heads``, stays within each ``head``, or first takes
        what heads have in common and then what is left in each (``two-stage``).
    first_stage
        Coefficients of the first of two stages, over all heads.
    metric_floor
        Identity added to the (normalised) weight of the norm, so that no direction is free.
    shrinkage
        Part of the residual's covariance that is replaced by a multiple of the identity.
    """

    kind: TransformKind = "hadamard"
    max_group_size: int = 1024
    key_scope: TransformScope = "all-heads"
    value_scope: TransformScope = "all-heads"
    first_stage: int = 16
    metric_floor: float = 1e-3
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_group_size <= MAX_GROUP_SIZE:
            raise ConfigError(
                f"transform.max_group_size: expected a whole number from 1 to {MAX_GROUP_SIZE}, "
                f"got {self.max_group_size}"
            )
        if not 0 <= self.first_stage <= MAX_GROUP_SIZE:
            raise ConfigError(
                f"transform.first_stage: expected a whole number from 0 to {MAX_GROUP_SIZE}, "
                f"got {self.first_stage}"
            )
        if not (math.isfinite(self.metric_floor) and self.metric_floor > 0):
            raise ConfigError(f"transform.metric_floor: expected a number > 0, got {self.metric_floor}")
        if not 0 <= self.shrinkage < 1:
            raise ConfigError(f"transform.shrinkage: expected 0 <= x < 1, got {self.shrinkage}")

    def scope(self, kind: str) -> TransformScope:
        """Return the scope for ``keys`` or ``values``."""
        return self.key_scope if kind == "keys" else self.value_scope

    def most_coefficients(self, kind: str, features: int) -> int:
        """Return how many coefficients ``klt`` can have for vectors of ``features`` coordinates."""
        extra = self.first_stage if self.scope(kind) == "two-stage" else 0
        return features + min(extra, features)


@dataclass(frozen=True)
class AllocationConfig:
    """How many bits each coefficient gets.

    Attributes
    ----------
    kind
        ``equal`` gives every coefficient the same whole number of bits; ``water-filling`` gives bits where
        they lower the weighted error of the whole model most.
    bits
        Mean bits per value over all layers, keys and values. What ``scalar`` quantisers with ``arithmetic``
        levels take in records of pages, all included but outliers; otherwise those of codes, without scales.
    first_layer_bits
        With ``equal``: bits in the first compressed layer, which has no predictor; never fewer than ``bits``
        are used there. ``None`` treats it like the others.
    widths
        With ``water-filling`` and a fixed-rate quantiser: the widths that a coefficient can have beside 0.
        With ``arithmetic`` levels 16 coefficients of neighbouring variances share one.
    importance
        With ``water-filling``: ``equal`` takes the weighted errors of all layers, keys and values as equally
        harmful relative to their size; ``measured`` weighs them by the divergence that noise in each causes.
    importance_exponent
        Power of the measured weights: below 1 because measurements on little text are noisy.
    """

    kind: AllocationKind = "equal"
    bits: float = 2.0
    first_layer_bits: float | None = 4.0
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    importance: Importance = "equal"
    importance_exponent: float = 0.7

    def __post_init__(self) -> None:
        least = 1 if self.kind == "equal" else 0.05
        for name, value in (("bits", self.bits), ("first_layer_bits", self.first_layer_bits)):
            if value is None:
                continue
            if not (math.isfinite(value) and least <= value <= 8):
                raise ConfigError(f"allocation.{name}: expected a number from {least} to 8, got {value}")
            if self.kind == "equal" and value != int(value):
                raise ConfigError(
                    f"allocation.{name}: equal allocation takes whole bits from 1 to 8, got {value}"
                )
        if list(self.widths) != sorted(set(self.widths)) or not all(1 <= w <= 8 for w in self.widths):
            raise ConfigError(
                f"allocation.widths: expected whole numbers from 1 to 8 in rising order, got {self.widths}"
            )
        if self.kind == "water-filling" and not self.widths:
            raise ConfigError("allocation.widths: expected at least one width, got none")
        if not 0 <= self.importance_exponent <= 1:
            raise ConfigError(
                "allocation.importance_exponent: expected a number from 0 to 1, got "
                f"{self.importance_exponent}"
            )

    def layer_bits(self, is_first_layer: bool) -> int:
        """Return the bits per coefficient of a layer under ``equal`` allocation."""
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
        ``scalar``: a width for each coefficient, one byte of scale per token. ``entropy``: one uniform step
        for all coefficients of a layer's keys or values, one byte of scale per token, range coding.
    grid_dim
        Largest dimension of the grids: 2 uses pairs of coefficients where a grid of that width exists
        (2, 3, 4 bits per coefficient) and Lloyd-Max tables elsewhere; 1 uses Lloyd-Max tables only.
    arithmetic
        Of ``scalar``: levels that are a cubic of the code, decodable without a table, instead of Lloyd-Max
        levels.
    rate_weight
        Of ``entropy``: levels minimise squared error plus this times the code length in bits, in units of the
        squared step.
    """

    kind: QuantizerKind = "grid"
    grid_dim: int = 2
    arithmetic: bool = True
    rate_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.grid_dim not in (1, 2):
            raise ConfigError(f"quantizer.grid_dim: expected 1 or 2, got {self.grid_dim}")
        if not (math.isfinite(self.rate_weight) and self.rate_weight >= 0):
            raise ConfigError(f"quantizer.rate_weight: expected a finite number >= 0, got {self.rate_weight}")

    def dim_for(self, bits: int) -> int:
        """Return the dimension of the grid used at a number of bits per coefficient."""
        return 2 if self.grid_dim == 2 and bits in GRID_2D_BITS else 1


@dataclass(frozen=True)
class GuardConfig:
    """Which compressed tokens attention sees exactly, because their codes are far off.

    Attributes
    ----------
    threshold
        A token is an outlier at a layer if the weighted error of its keys or its values exceeds this multiple
        of the calibrated mean; None turns the guard off.
    max_fraction
        At most this part of a block's tokens, but at least one, is kept exact at a layer: those furthest off.
        The others stay as their codes give them.
    """

    threshold: float | None = None
    max_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ConfigError(f"guard.threshold: expected a number > 0 or null, got {self.threshold}")
        if not 0 < self.max_fraction <= 1:
            raise ConfigError(f"guard.max_fraction: expected 0 < x <= 1, got {self.max_fraction}")

    def most(self, block_tokens: int) -> int:
        """Return how many of a block's tokens can be kept exact at a layer."""
        return max(1, int(self.max_fraction * block_tokens))


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    window: WindowConfig = field(default_factory=WindowConfig)

    def __post_init__(self) -> None:
        adaptive = self.allocation.kind == "water-filling"
        if adaptive != (self.quantizer.kind in ("scalar", "entropy")):
            raise ConfigError(
                "quantizer.kind: water-filling goes with scalar or entropy, equal bits with grid; got "
                f"{self.allocation.kind} with {self.quantizer.kind}"
            )
        if adaptive and self.transform.kind != "klt":
            raise ConfigError(
                f"transform.kind: water-filling needs the spectrum that klt gives, got {self.transform.kind}"
            )
        if self.transform.kind == "klt" and not adaptive:
            raise ConfigError("allocation.kind: klt needs water-filling, got equal")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain dictionaries, lists, numbers and strings."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CodecConfig:
        """Build a configuration; unknown or missing keys and wrong types raise `ConfigError`."""
        return from_dict(cls, data, where="config")


PRESETS = ("paper", "higgs", "storage", "decode")

#: Mean bits per value of each preset, if none are asked for.
DEFAULT_BITS = {"paper": 2.0, "higgs": 2.0, "storage": 1.25, "decode": 2.3}


def preset(name: str, bits: float | None = None) -> CodecConfig:
    """Return a preset's configuration.

    Parameters
    ----------
    name
        ``paper`` (arXiv:2501.19392: dense predictors, Hadamard transform, equal bits, two-dimensional grid,
        first layer at 4 bits); ``higgs`` (the same without predictors: arXiv:2411.17525 after subtraction
        of each layer's mean, which costs nothing and makes it a stronger baseline); ``storage`` (predictors
        that read keys and values of three earlier layers, weighted KLT over all heads, entropy coding: for
        caches that are decompressed once per load); ``decode`` (rank-64 key predictor, values from keys only,
        KLT of keys within each head, fixed widths shared by 16 coefficients: for caches that are attended to
        while compressed).
    bits
        Mean bits per value, see `AllocationConfig`; the preset's own (`DEFAULT_BITS`) if None. Fractions for
        ``storage`` and ``decode``.

    Raises
    ------
    ConfigError
        The name is unknown, or the preset does not take that number of bits.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of: {', '.join(PRESETS)}")
    bits = DEFAULT_BITS[name] if bits is None else float(bits)
    if name in ("paper", "higgs"):
        kind: PredictorKind = "linear" if name == "paper" else "mean"
        return CodecConfig(
            preset=name, predictor=PredictorConfig(kind=kind), allocation=AllocationConfig(bits=bits)
        )
    allocation = AllocationConfig(
        kind="water-filling", bits=bits, first_layer_bits=None, importance="measured"
    )
    if name == "storage":
        return CodecConfig(
            preset=name,
            predictor=PredictorConfig(
                key_inputs=("previous_keys", "previous_values"),
                value_inputs=("keys", "previous_keys", "previous_values"),
                history=3,
                first_layer_values=True,
            ),
            transform=TransformConfig(kind="klt"),
            allocation=allocation,
            quantizer=QuantizerConfig(kind="entropy"),
            guard=GuardConfig(threshold=16.0),
        )
    return CodecConfig(
        preset=name,
        predictor=PredictorConfig(value_inputs=("keys",), first_layer_values=True, key_rank=64),
        transform=TransformConfig(kind="klt", key_scope="head"),
        allocation=allocation,
        quantizer=QuantizerConfig(kind="scalar"),
        guard=GuardConfig(threshold=8.0),
    )


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
