"""Fourth stage at a fixed rate: every coefficient has its own width; one byte of scale per token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.codec.encoded import EncodedVectors
from aquakv.errors import ConfigError, ShapeError
from aquakv.numerics import (
    byte_table,
    cubic_level_table,
    load_grid,
    nearest_cubic_level,
    pack,
    packed_words,
    unpack,
    unpack_lookup,
)
from aquakv.numerics.packing import gather_rows
from aquakv.numerics.pages import FIELD_COLUMNS, PageLayout

#: Scale code of a token that has a coefficient that is not finite; its scale is NaN.
NOT_FINITE = 255

#: Scale codes per factor of two, and the code of scale 1.
CODES_PER_OCTAVE = 16
CODE_OF_ONE = 128

#: ``[256]`` float32: what scale codes stand for, 2^-8 … 2^(126/16) and NaN. Rounded once from float64, so
#: that encoder and decoder agree bit for bit on every device.
SCALES = torch.tensor(
    [2.0 ** ((code - CODE_OF_ONE) / CODES_PER_OCTAVE) for code in range(NOT_FINITE)] + [math.nan],
    dtype=torch.float32,
    device="cpu",
)


def scale_codes(normalized: Tensor) -> Tensor:
    """Compute the scale byte of each token: its root mean square on a logarithmic scale.

    Parameters
    ----------
    normalized
        ``[tokens, n]`` float32: coefficients over their standard deviations, ``n`` at least 1.

    Returns
    -------
    Tensor
        ``[tokens, 1]`` uint8: ``16 log2(rms) + 128``, rounded and clamped to 0..254; `NOT_FINITE` where a
        coefficient is not finite. Summed in float64, so that it does not depend on how tokens are batched.
    """
    finite = normalized.isfinite().all(-1, keepdim=True)
    mean_square = normalized.square().sum(-1, keepdim=True, dtype=torch.float64) / normalized.shape[-1]
    codes = (mean_square.log2() * (CODES_PER_OCTAVE / 2)).round() + CODE_OF_ONE
    codes = torch.where(finite, codes.clamp(0, NOT_FINITE - 1), float(NOT_FINITE))
    return codes.to(torch.uint8)


class Segment(NamedTuple):
    """Neighbouring coefficients of one width, and the bytes that their codes fill."""

    width: int
    coefficients: slice
    stored: slice


@dataclass(frozen=True, eq=False)
class ScalarQuantizer:
    """One scalar quantiser per coefficient, relative to its deviation and to the token's own scale.

    A coefficient z of deviation σ in a token of scale s is coded as the level nearest to ``z / (σ s)``.

    Attributes
    ----------
    deviations
        ``[n]`` float32: calibrated standard deviation of every coefficient, greater than 0.
    widths
        ``[n]`` uint8: bits of every coefficient, 1 to 8, not increasing. The codes of each width begin with
        a byte; `aquakv.numerics.fill_bytes` chooses widths that waste no bits so.
    arithmetic
        Levels that are a cubic of the code (`aquakv.numerics.cubic_levels`), decodable without a table,
        instead of Lloyd-Max levels.
    """

    deviations: Tensor
    widths: Tensor
    arithmetic: bool
    segments: tuple[Segment, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (
            self.deviations.ndim != 1
            or self.deviations.dtype != torch.float32
            or self.widths.shape != self.deviations.shape
            or self.widths.dtype != torch.uint8
        ):
            raise ShapeError(
                "scalar quantizer: expected deviations float32 [n] and widths uint8 [n], got "
                f"{self.deviations.dtype} {list(self.deviations.shape)} and {self.widths.dtype} "
                f"{list(self.widths.shape)}"
            )
        if not bool((self.deviations.isfinite() & (self.deviations > 0)).all()):
            raise ConfigError(
                "scalar quantizer: expected finite deviations > 0; leave out constant coefficients"
            )
        object.__setattr__(self, "segments", tuple(_segments(self.widths.tolist())))

    @property
    def features(self) -> int:
        """Coefficients coded for each vector."""
        return len(self.deviations)

    @property
    def groups(self) -> int:
        """Scales stored for each vector: one, or none if nothing is coded."""
        return min(1, self.features)

    @property
    def words_per_token(self) -> int:
        """Bytes of codes stored for each vector."""
        return self.segments[-1].stored.stop if self.segments else 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored for each vector: codes and scale."""
        return self.words_per_token + self.groups

    def quantize(self, coefficients: Tensor) -> tuple[EncodedVectors, Tensor]:
        """Quantise coefficients.

        Parameters
        ----------
        coefficients
            ``[tokens, n]`` float32, on the device of the deviations. Not-a-number and infinity are not
            hidden: a token that has one comes back as not-a-number throughout.

        Returns
        -------
        encoded, dequantized
            ``words`` ``[tokens, words_per_token]`` and ``scales`` ``[tokens, 1]`` (``[tokens, 0]`` if n is
            0), both uint8, and what `dequantize` makes of them in float32.

        Raises
        ------
        ShapeError
            If the coefficients are of another shape or dtype.
        """
        if coefficients.ndim != 2 or coefficients.shape[1] != self.features:
            raise ShapeError(
                f"scalar quantizer: expected [tokens, {self.features}], got {list(coefficients.shape)}"
            )
        if coefficients.dtype != torch.float32:
            raise ShapeError(f"scalar quantizer: expected float32 coefficients, got {coefficients.dtype}")
        if not self.segments:
            empty = torch.empty_like(coefficients, dtype=torch.uint8)
            return EncodedVectors(empty, empty.clone()), coefficients.clone()
        normalized = coefficients / self.deviations
        scales = scale_codes(normalized)
        lost = scales == NOT_FINITE
        # The codes of such a token mean nothing, but they should be the same everywhere.
        relative = torch.where(lost, 0.0, normalized / _scales(scales.device)[scales.int()])
        words = torch.cat([self._pack(relative, segment) for segment in self.segments], 1)
        encoded = EncodedVectors(words, scales)
        return encoded, self.dequantize(encoded)

    def dequantize(self, encoded: EncodedVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the coefficients, ``[tokens, n]`` in ``dtype``, that codes stand for.

        Raises
        ------
        ShapeError
            If the codes are not of this quantiser's shape and dtype.
        """
        words, scales = encoded
        shape = (words.shape[0], self.words_per_token)
        if words.shape != shape or scales.shape != (shape[0], self.groups) or words.dtype != torch.uint8:
            raise ShapeError(
                f"scalar quantizer: expected uint8 codes [tokens, {shape[1]}] and scales "
                f"[tokens, {self.groups}], got {words.dtype} {list(words.shape)} and {list(scales.shape)}"
            )
        if not self.segments:
            return words.to(dtype)
        parts = [self._unpack(words, segment, dtype) for segment in self.segments]
        return self._spread(parts[0] if len(parts) == 1 else torch.cat(parts, 1), scales)

    def _spread(self, levels: Tensor, scales: Tensor) -> Tensor:
        """Multiply levels, in place, with scales and deviations."""
        # In float32 also for narrow dtypes: scales and deviations by themselves may leave their range.
        spread = _scales(levels.device)[scales.int()] * self.deviations
        return levels.mul_(spread.to(levels.dtype))

    def unpack(self, words: Tensor) -> Tensor:
        """Return the codes, ``[tokens, n]`` uint8, that ``words`` of `quantize` hold."""
        codes = words.new_empty(len(words), self.features)
        for segment in self.segments:
            count = segment.coefficients.stop - segment.coefficients.start
            codes[:, segment.coefficients] = unpack(self._words(words, segment), segment.width, count)
        return codes

    def pack(self, codes: Tensor) -> Tensor:
        """Undo `unpack`."""
        parts = [_pack(codes[:, segment.coefficients], segment) for segment in self.segments]
        return torch.cat([codes.new_empty(len(codes), 0), *parts], 1)

    def dequantize_codes(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Do as `dequantize`, to the last bit, from unpacked codes.

        Parameters
        ----------
        codes
            ``[tokens, n]`` uint8, see `unpack`.
        scales
            ``[tokens, 1]`` uint8.
        dtype
            Of the coefficients.
        """
        levels = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for width, start, stop in (
            (s.width, s.coefficients.start, s.coefficients.stop) for s in self.segments
        ):
            table = _levels(width, self.arithmetic, codes.device, dtype)
            index = codes[:, start:stop].flatten().int()
            levels[:, start:stop] = table.index_select(0, index).view(len(codes), -1)
        return self._spread(levels, scales) if self.segments else levels

    def dequantize_planes(
        self, planes: Tensor, scales: Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Do as `dequantize_codes` from the byte planes of pages, all levels of a byte at once.

        Parameters
        ----------
        planes
            ``[pages, planes, 64, 16]`` uint8.
        scales
            ``[pages * 64, 1]`` uint8.
        layout
            Their layout, for which `PageLayout.is_uniform` holds.
        dtype
            Of the coefficients.
        """
        tokens = planes.shape[0] * planes.shape[2]
        if not self.segments:
            return planes.new_empty(tokens, 0, dtype=dtype)
        parts = []
        for number, own in enumerate(layout.fields_by_plane):
            pattern = tuple((f.width, f.shift) for f in own)
            table = _plane_table(pattern, self.arithmetic, planes.device, dtype)
            index = planes[:, number].flatten().int()
            parts.append(gather_rows(table, index).view(tokens, -1))
        order = _column_order(layout, planes.device)
        return self._spread(torch.cat(parts, 1).index_select(1, order), scales)

    def to(self, device: torch.device | str) -> ScalarQuantizer:
        """Return the quantiser on another device."""
        return ScalarQuantizer(self.deviations.to(device), self.widths.to(device), self.arithmetic)

    def _pack(self, relative: Tensor, segment: Segment) -> Tensor:
        values = relative[:, segment.coefficients]
        if self.arithmetic:
            codes = nearest_cubic_level(values, segment.width)
        else:
            codes = load_grid(1, 1 << segment.width, values.device).nearest(values)
        return _pack(codes, segment)

    def _unpack(self, words: Tensor, segment: Segment, dtype: torch.dtype) -> Tensor:
        num_codes = segment.coefficients.stop - segment.coefficients.start
        table = _level_table(segment.width, self.arithmetic, words.device, dtype)
        return unpack_lookup(self._words(words, segment), segment.width, num_codes, table)

    def _words(self, words: Tensor, segment: Segment) -> Tensor:
        """Return the int32 words of a segment's codes."""
        num_codes = segment.coefficients.stop - segment.coefficients.start
        num_bytes = segment.stored.stop - segment.stored.start
        num_words = packed_words(num_codes, segment.width)
        # A fresh tensor: neither the start nor the stride of a view need be a multiple of a word's bytes.
        stored = words.new_zeros(len(words), 4 * num_words)
        stored[:, :num_bytes] = words[:, segment.stored]
        return stored.view(torch.int32)


def _pack(codes: Tensor, segment: Segment) -> Tensor:
    num_bytes = segment.stored.stop - segment.stored.start
    return pack(codes, segment.width).view(torch.uint8)[:, :num_bytes]


def _segments(widths: list[int]) -> Iterator[Segment]:
    """Split coefficients into runs of equal width."""
    if widths != sorted(widths, reverse=True) or not all(1 <= width <= 8 for width in widths):
        raise ConfigError(f"scalar quantizer: expected widths from 8 down to 1, got {widths}")
    first = start = 0
    for width, run in groupby(widths):
        count = len(list(run))
        stop = start + -(-count * width // 8)
        yield Segment(width, slice(first, first + count), slice(start, stop))
        first, start = first + count, stop


@lru_cache(maxsize=8)
def _scales(device: torch.device) -> Tensor:
    return SCALES.to(device)


@lru_cache(maxsize=128)
def _level_table(width: int, arithmetic: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the levels of a unit deviation, expanded for `unpack_lookup`; shared by all layers."""
    return byte_table(_levels(width, arithmetic, device, dtype)[:, None], width)


@lru_cache(maxsize=128)
def _levels(width: int, arithmetic: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the levels of a unit deviation, ``[2**width]``."""
    levels = cubic_level_table(width) if arithmetic else load_grid(1, 1 << width).points[:, 0]
    return levels.to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _plane_table(
    fields: tuple[tuple[int, int], ...], arithmetic: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the levels that a byte of fields (width, shift) holds, ``[256, 1, 2, 4 or 8]``."""
    byte, columns = torch.arange(256, device="cpu"), _table_columns(len(fields))
    table = torch.zeros(256, columns, dtype=dtype, device="cpu")
    for column, (width, shift) in enumerate(fields):
        codes = (byte >> shift) & ((1 << width) - 1)
        table[:, column] = _levels(width, arithmetic, table.device, dtype)[codes]
    return table.to(device)


def _table_columns(num_fields: int) -> int:
    """Return how many levels a row of `_plane_table` has: rows of a power of two move as one number."""
    return 1 << (num_fields - 1).bit_length()


def _column_order(layout: PageLayout, device: torch.device) -> Tensor:
    """Return where each coefficient is among the levels of all planes' bytes; kept with the layout."""
    kept: dict[torch.device, Tensor] = layout.__dict__.setdefault("_column_order", {})
    if device not in kept:
        order, first = [0] * layout.coefficients, 0
        for own in layout.fields_by_plane:
            columns = _table_columns(len(own))
            for place, f in enumerate(own):
                for column, coefficient in enumerate(f.coefficients):
                    order[coefficient] = first + column * columns + place
            first += FIELD_COLUMNS * columns
        kept[device] = torch.tensor(order, dtype=torch.int64, device=device)
    return kept[device]
