"""What ties a codec to the model it was calibrated for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from aquakv.errors import CodecMismatchError, ConfigError

#: Numbers of a weight that are kept to recognise it in another dtype: all of a shorter one, or so many evenly
#: spaced.
SAMPLE_NUMBERS = 64

#: The types that copies of a model are made in, the coarsest first, with the bits behind the leading one and
#: half the distance of numbers that are too small for these.
_TYPES = ((torch.bfloat16, 7, 0.0), (torch.float16, 10, 2.0**-25), (torch.float32, 23, 0.0))

_HEX_NUMBERS = re.compile(r"([0-9a-f]{8})+")


@dataclass(frozen=True)
class ModelFingerprint:
    """The facts about a model that a codec depends on.

    Attributes
    ----------
    architecture
        transformers' ``model_type``.
    num_layers
        Decoder layers in all.
    compressed_layers
        Indices of the layers whose keys and values are compressed, in order.
    num_kv_heads, head_dim
        Shape of one token's keys at a compressed layer.
    rotary
        Parameters of the rotary embedding that change keys.
    layer_hashes
        For every compressed layer, a SHA-256 (first 16 hex digits) of one small weight, rounded to bfloat16.
    layer_samples
        For every compressed layer, numbers of that weight as `sample_text` writes them; empty in codecs of
        file format 4, which did not have them. They count where hashes differ.
    """

    architecture: str
    num_layers: int
    compressed_layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    rotary: dict[str, Any]
    layer_hashes: tuple[str, ...]
    layer_samples: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.layer_samples and len(self.layer_samples) != len(self.layer_hashes):
            raise ConfigError("fingerprint: expected one layer sample per layer hash, or none")
        for index, text in enumerate(self.layer_samples):
            if len(text) > 8 * SAMPLE_NUMBERS or not (text == "" or _HEX_NUMBERS.fullmatch(text)):
                raise ConfigError(
                    f"fingerprint.layer_samples[{index}]: expected up to {SAMPLE_NUMBERS} numbers of 8 hex "
                    "digits each"
                )

    @property
    def features(self) -> int:
        """``num_kv_heads * head_dim``: length of one token's key or value vector at one layer."""
        return self.num_kv_heads * self.head_dim

    def require_match(self, model: ModelFingerprint, name: str = "codec") -> None:
        """Raise `CodecMismatchError`, naming the first differing field, unless both agree.

        Weights agree if they are the same in bfloat16, or if their samples may be roundings of the same
        numbers to two types.
        """
        for entry in fields(self):
            ours, theirs = getattr(self, entry.name), getattr(model, entry.name)
            if not entry.compare:
                continue
            if entry.name == "layer_hashes" and len(ours) == len(theirs):
                theirs = self._accepted_hashes(model)
            if ours == theirs:
                continue
            what = entry.name
            if isinstance(ours, tuple) and len(ours) == len(theirs):
                index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                what, ours, theirs = f"{what}[{index}]", ours[index], theirs[index]
            elif isinstance(ours, dict):
                key = next(k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k))
                what, ours, theirs = f"{what}.{key}", ours.get(key), theirs.get(key)
            raise CodecMismatchError(
                f"{name} was calibrated for another model: {what} is {ours!r} in the codec but {theirs!r} in "
                "the model; calibrate a codec for this model"
            )

    def _accepted_hashes(self, model: ModelFingerprint) -> Any:
        """Return a model's hashes, with our own in place of those of weights that may be ours."""
        pairs = zip(self.layer_hashes, model.layer_hashes, strict=True)
        return tuple(
            ours if self._same_weights(model, index) else theirs for index, (ours, theirs) in enumerate(pairs)
        )

    def _same_weights(self, model: ModelFingerprint, index: int) -> bool:
        """Tell whether a layer's samples may be of one weight, in two types."""
        if index >= min(len(self.layer_samples), len(model.layer_samples)):
            return False
        return may_be_one(sample_of(self.layer_samples[index]), sample_of(model.layer_samples[index]))


def sample_text(weight: Tensor) -> str:
    """Return numbers of a weight, any floating dtype: 8 hex digits for each, as float32, little-endian."""
    flat = weight.flatten()
    count = min(len(flat), SAMPLE_NUMBERS)
    chosen = flat[torch.arange(count, device=flat.device) * len(flat) // max(count, 1)]
    return chosen.float().cpu().numpy().astype("<f4").tobytes().hex()


def sample_of(text: str) -> Tensor:
    """Return the numbers that `sample_text` wrote, float64."""
    numbers = bytearray(bytes.fromhex(text))
    return torch.frombuffer(numbers, dtype=torch.float32).double() if numbers else torch.zeros(0).double()


def may_be_one(first: Tensor, second: Tensor) -> bool:
    """Tell whether two samples, float64, may be roundings of the same numbers to two types of `_TYPES`.

    Which types these are the numbers tell: it is the coarsest one that has all of them. Roundings differ by
    at most half a unit in the last place of the one type and half of the other's. Samples of the same type
    have to be equal.
    """
    if len(first) != len(second) or not bool((first.isfinite() & second.isfinite()).all()):
        return False
    kinds = _type_of(first), _type_of(second)
    if kinds[0] == kinds[1]:
        return bool((first == second).all())
    larger = torch.maximum(first.abs(), second.abs())
    binade = torch.where(larger > 0, torch.exp2(torch.frexp(larger).exponent.double() - 1), 0.0)
    allowed = torch.zeros_like(larger)
    for _, bits, least in kinds:
        allowed += (binade * 2.0 ** -(bits + 1)).clamp(min=least)
    return bool(((first - second).abs() <= allowed).all())


def _type_of(numbers: Tensor) -> tuple[torch.dtype, int, float]:
    for kind in _TYPES[:-1]:
        if bool((numbers.to(kind[0]).double() == numbers).all()):
            return kind
    return _TYPES[-1]
