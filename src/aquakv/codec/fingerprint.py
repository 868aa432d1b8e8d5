"""What ties a codec to the model it was calibrated for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from aquakv.errors import CodecMismatchError


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
    """

    architecture: str
    num_layers: int
    compressed_layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    rotary: dict[str, Any]
    layer_hashes: tuple[str, ...]

    @property
    def features(self) -> int:
        """``num_kv_heads * head_dim``: length of one token's key or value vector at one layer."""
        return self.num_kv_heads * self.head_dim

    def require_match(self, model: ModelFingerprint, name: str = "codec") -> None:
        """Raise `CodecMismatchError`, naming the first differing field, unless both agree."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(model, field.name)
            if ours == theirs:
                continue
            what = field.name
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
