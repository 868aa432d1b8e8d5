"""Fourth stage as published: coefficients to points of a Gaussian grid, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.codec.encoded import EncodedVectors
from aquakv.config import QuantizerConfig
from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics import GaussianGrid, byte_table, load_grid, pack, packed_words, unpack_lookup

#: Largest finite float16: scales saturate there instead of becoming infinite.
MAX_SCALE = 65504.0


@dataclass(frozen=True)
class GridQuantizer:
    """Nearest point of a Gaussian grid, after division by the group's root mean square (arXiv:2411.17525).

    The root mean square is the group's L2 norm over the square root of its length: the same information as
    the published norm, in a range that float16 holds for every model.

    Attributes
    ----------
    features, group_size
        Length of the vectors and of the groups that share a scale.
    grid
        MSE-optimal grid for a unit Gaussian.
    """

    features: int
    group_size: int
    grid: GaussianGrid
    _tables: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.features % self.group_size or self.group_size % self.grid.dim:
            raise ConfigError(
                f"quantizer: expected groups that divide {self.features} features into whole grid points of "
                f"dimension {self.grid.dim}, got groups of {self.group_size}"
            )

    @property
    def codes_per_token(self) -> int:
        """Grid indices stored for each vector."""
        return self.features // self.grid.dim

    @property
    def words_per_token(self) -> int:
        """32-bit words stored for each vector."""
        return packed_words(self.codes_per_token, self.grid.code_width)

    @property
    def groups(self) -> int:
        """Scales stored for each vector."""
        return self.features // self.group_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored for each vector: words and scales."""
        return 4 * self.words_per_token + 2 * self.groups

    def quantize(self, coefficients: Tensor) -> tuple[EncodedVectors, Tensor]:
        """Quantise coefficients.

        Parameters
        ----------
        coefficients
            ``[tokens, features]`` float32. Not-a-number and infinity are not hidden: they come back as
            not-a-number or infinity in every coefficient of their group.

        Returns
        -------
        encoded, dequantized
            The codes, and what `dequantize` makes of them in float32.
        """
        if coefficients.ndim != 2 or coefficients.shape[1] != self.features:
            raise ShapeError(f"quantizer: expected [tokens, {self.features}], got {list(coefficients.shape)}")
        tokens = coefficients.shape[0]
        groups = coefficients.reshape(tokens, self.groups, self.group_size)
        rms = groups.square().mean(-1, keepdim=True).sqrt()
        scales = torch.where(torch.isfinite(rms), rms.clamp(max=MAX_SCALE), rms).to(torch.float16)
        wide = scales.float()
        normalized = groups / torch.where(wide == 0, 1.0, wide)
        codes = self.grid.nearest(normalized.reshape(tokens, self.features))
        words = pack(codes, self.grid.code_width)
        dequantized = self.grid.dequantize(codes).view(tokens, self.groups, self.group_size) * wide
        return EncodedVectors(words, scales.squeeze(-1)), dequantized.view(tokens, self.features)

    def dequantize(self, encoded: EncodedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the coefficients, ``[tokens, features]`` in ``dtype``, that codes stand for."""
        tokens = encoded.words.shape[0]
        points = unpack_lookup(
            encoded.words,
            self.grid.code_width,
            self.codes_per_token,
            self._table(encoded.words.device, dtype),
        )
        grouped = points.view(tokens, self.groups, self.group_size)
        return (grouped * encoded.scales.unsqueeze(-1).to(dtype)).view(tokens, self.features)

    def to(self, device: torch.device | str) -> GridQuantizer:
        """Return the quantiser on another device."""
        grid = load_grid(self.grid.dim, self.grid.num_points, device)
        return GridQuantizer(self.features, self.group_size, grid)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if dtype not in self._tables or self._tables[dtype].device != device:
            points = self.grid.points.to(device=device, dtype=dtype)
            self._tables[dtype] = byte_table(points, self.grid.code_width)
        return self._tables[dtype]


def build_quantizer(
    config: QuantizerConfig, features: int, group_size: int, widths: Sequence[int]
) -> GridQuantizer:
    """Build the quantiser for one layer's keys or values from the allocated bits per coefficient."""
    bits = set(widths)
    if len(bits) != 1:
        raise ConfigError(f"quantizer grid: expected one width for all coefficients, got {sorted(bits)}")
    width = bits.pop()
    dim = config.dim_for(width) if group_size % 2 == 0 else 1
    return GridQuantizer(features, group_size, load_grid(dim, 2 ** (width * dim)))
