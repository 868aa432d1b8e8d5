"""KVQuant: non-uniform levels, keys per channel before rotary embedding, the greatest values kept apart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aquakv.baselines.base import Baseline
from aquakv.baselines.encoded import Encoded, SparseValues, TensorCoder
from aquakv.baselines.kvquant_fit import LayerTables, fit_tables, outliers_per_end, token_range
from aquakv.config import WindowConfig
from aquakv.errors import ConfigError
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.packing import pack, unpack

_MOST = 65504.0


@dataclass(frozen=True)
class _Levels:
    """What coders of keys and values share: codes of normalised vectors, and outliers beside them."""

    heads: int
    head_dim: int
    width: int
    levels: Tensor

    def _codes(self, normalized: Tensor) -> Tensor:
        levels = self.levels.to(normalized.device)
        return pack(torch.bucketize(normalized, (levels[1:] + levels[:-1]) / 2), self.width)

    def _normalized(self, encoded: Encoded) -> Tensor:
        codes = unpack(encoded.codes[0], self.width, self.heads * self.head_dim)
        return self.levels.to(codes.device)[codes.long()]

    def _with_outliers(self, dense: Tensor, encoded: Encoded) -> Tensor:
        assert encoded.outliers is not None  # as `encode` made it
        encoded.outliers.put_into(dense)
        return dense.view(*dense.shape[:2], self.heads, self.head_dim)


def _sparse(vectors: Tensor, chosen: Tensor) -> SparseValues:
    """Return the chosen values of ``[tokens, rows, features]``."""
    index = chosen.nonzero()[:, 2]
    # Unsigned 16-bit numbers in a type that every device can index.
    index = torch.where(index > 32767, index - 65536, index).to(torch.int16)
    return SparseValues(chosen.sum(-1).to(torch.int16), index, vectors[chosen].clamp(-_MOST, _MOST).half())


@dataclass(frozen=True)
class ChannelLevels(_Levels):
    """Keys: every channel's range is known from calibration, and what lies outside is an outlier.

    Attributes
    ----------
    heads, head_dim
        Shape of a token.
    width
        Bits of a code.
    levels
        ``[2**width]`` float32, rising, of normalised values in -1 to 1.
    centers, halves
        ``[features]`` float32: middle and half of each channel's range.
    """

    centers: Tensor
    halves: Tensor

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        vectors = states.flatten(2)
        normalized = (vectors - self.centers.to(vectors.device)) / self.halves.to(vectors.device)
        return Encoded((self._codes(normalized),), (), _sparse(vectors, normalized.abs() > 1))

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        normalized = self._normalized(encoded)
        device = normalized.device
        return self._with_outliers(normalized * self.halves.to(device) + self.centers.to(device), encoded)


@dataclass(frozen=True)
class TokenLevels(_Levels):
    """Values: every token's range is found as it comes, without its outliers.

    Attributes
    ----------
    heads, head_dim, width, levels
        As in `ChannelLevels`.
    tails
        Outliers at either end of a token.
    """

    tails: int

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        vectors = states.flatten(2)
        centers, halves, index = token_range(vectors, self.tails)
        wide = halves.float()
        normalized = (vectors - centers.float()) / torch.where(wide == 0, 1.0, wide)
        chosen = torch.zeros_like(vectors, dtype=torch.bool).scatter_(-1, index, True)
        return Encoded(
            (self._codes(normalized),), (centers[..., 0], halves[..., 0]), _sparse(vectors, chosen)
        )

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        centers, halves = (scales[..., None].float() for scales in encoded.scales)
        return self._with_outliers(self._normalized(encoded) * halves + centers, encoded)


@dataclass(frozen=True)
class KVQuant(Baseline):
    """KVQuant (arXiv:2401.18079), nuq with one per cent of outliers.

    * Keys before rotary embedding, each channel normalised by a range that calibration found; values by each
      token's own, in two float16 numbers (§3.1, 3.2).
    * Levels of a layer's keys and of its values by k-means, weighted by Fisher information (§3.3).
    * What lies outside a channel's or token's range, `outliers` of all, as float16 with their places (§3.4).
    * The first token exact (§3.5); all others are encoded as they come.

    Ours deviates in that a token has a count of its outliers in 16 bits where the paper has row pointers, and
    that the correction of the levels' mean and deviation for 2 bits (Q-Norm) is left out. Gradients come from
    pieces of 512 tokens.
    """

    bits: float = 2
    outliers: float = 0.01
    tables: tuple[LayerTables, ...] | None = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "kvquant"
    source: ClassVar[str] = "arXiv:2401.18079"
    pre_rope: ClassVar[bool] = True
    needs_fit: ClassVar[bool] = True

    @property
    def own_windows(self) -> tuple[WindowConfig, WindowConfig]:
        """The first token stays exact."""
        return WindowConfig(1, 0, 1), WindowConfig(1, 0, 1)

    @property
    def table_bytes(self) -> int:
        """Bytes of ranges and levels, all layers."""
        features = sum(len(layer.centers) for layer in self.tables or ())
        return 4 * (2 * features + 2 * len(self.tables or ()) * 2 ** int(self.bits))

    def fit(self, model: PreTrainedModel, tokens: Tensor) -> Self:
        """Find ranges and where levels are wanted; other `bits` can be set afterwards. See `fit_tables`."""
        return replace(self, tables=fit_tables(model, tokens, self.outliers))

    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder]:
        """Return the coders of keys and of values."""
        if self.tables is None:
            raise ConfigError("baseline kvquant: expected a fitted method; call fit(model, tokens) first")
        heads, head_dim, width = adapter.num_kv_heads, adapter.head_dim, int(self.bits)
        table = self.tables[order]
        if len(table.centers) != adapter.features:
            raise ConfigError(
                f"baseline kvquant: fitted for {len(table.centers)} features, but the model has "
                f"{adapter.features}; fit it anew"
            )
        return (
            ChannelLevels(heads, head_dim, width, table.keys.levels(width), table.centers, table.halves),
            TokenLevels(
                heads,
                head_dim,
                width,
                table.values.levels(width),
                outliers_per_end(adapter.features, self.outliers),
            ),
        )
