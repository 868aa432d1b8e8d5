"""Dense bit packing of integer codes, and decoding straight to table entries.

The format
----------
A row of ``num_codes`` codes of ``width`` bits is one little-endian bit stream: code ``j`` occupies the bits
``j * width .. j * width + width - 1``, its least significant bit first, and bit ``b`` of the stream is bit
``b % 32`` of the int32 word ``b // 32``. A row takes ``ceil(num_codes * width / 32)`` words; the bits behind
the last code are zero. Rows do not share words.

Decoding reads the stream in *units*: whole groups of codes that span 8 to 14 bits, each of which indexes a
table of all their decoded values at once. Words are seen as bytes, so the host has to be little-endian.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import torch
from torch import Tensor

from aquakv.errors import ConfigError, ShapeError

if sys.byteorder != "little":
    raise ConfigError(f"aquakv packs codes on little-endian hosts only, this one is {sys.byteorder}-endian")

MAX_WIDTH = 8

# Codes decoded per table lookup. Units start and end on a byte (8 bits) or repeat every few bytes (10, 12,
# 14 bits); the largest table that this gives, 16384 rows at width 7, still fits a second-level cache.
_CODES_PER_UNIT = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}

# Gathering scalars is about twice as fast as gathering rows, so a row of 2 to 16 bytes travels as one scalar.
_SCALAR_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def packed_words(num_codes: int, width: int) -> int:
    """Count the int32 words that ``num_codes`` codes of ``width`` bits take.

    Raises
    ------
    ConfigError
        If ``width`` is not in 1..8 or ``num_codes`` is negative.
    """
    _check_width(width)
    if num_codes < 0:
        raise ConfigError(f"num_codes must not be negative, got {num_codes}")
    return -(-num_codes * width // 32)


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack codes densely into int32 words.

    Parameters
    ----------
    codes : Tensor
        ``[..., num_codes]``, any integer dtype, values in ``0 .. 2**width - 1``, any strides.
    width : int
        Bits per code, 1 to 8.

    Returns
    -------
    Tensor
        ``[..., packed_words(num_codes, width)]`` int32, contiguous, in the format at the head of this module.

    Raises
    ------
    ConfigError
        If ``width`` is not in 1..8.
    ShapeError
        If ``codes`` has no dimension, is not of an integer dtype or, on a CPU, has a value out of range. On
        other devices the check would wait for the device: excess bits are dropped there.
    """
    _check_width(width)
    if codes.dim() == 0 or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ShapeError(
            f"codes must be an integer tensor [..., num_codes], got {_describe(codes)}; convert it first"
        )
    if codes.device.type == "cpu" and codes.numel() and not (codes.dtype == torch.uint8 and width == 8):
        low, high = (int(bound) for bound in codes.aminmax())
        if low < 0 or high >= 1 << width:
            raise ShapeError(
                f"codes of width {width} must be in 0..{(1 << width) - 1}, got {low}..{high}; clamp them or "
                "widen the codes"
            )
    *lead, num_codes = codes.shape
    num_words = packed_words(num_codes, width)
    if codes.numel() == 0:
        return codes.new_zeros((*lead, num_words), dtype=torch.int32)
    # Eight codes fill exactly `width` bytes: build them in one int64 and keep its low bytes.
    eights = -(-num_codes // 8)
    padded = torch.nn.functional.pad(codes, (0, eights * 8 - num_codes)).reshape(*lead, eights, 8)
    group = torch.zeros((*lead, eights), dtype=torch.int64, device=codes.device)
    for j in range(8):
        group |= (padded[..., j].to(torch.int64) & ((1 << width) - 1)) << (j * width)
    stream = group.unsqueeze(-1).view(torch.uint8)[..., :width].reshape(*lead, eights * width)
    row = torch.zeros((*lead, 4 * num_words), dtype=torch.uint8, device=codes.device)
    num_bytes = min(eights * width, 4 * num_words)
    row[..., :num_bytes] = stream[..., :num_bytes]
    return row.view(torch.int32)


def unpack(words: Tensor, width: int, num_codes: int) -> Tensor:
    """Undo `pack`.

    Parameters
    ----------
    words : Tensor
        ``[..., packed_words(num_codes, width)]`` int32, any strides. Bits behind the last code are ignored.
    width : int
        Bits per code, 1 to 8.
    num_codes : int
        Codes per row.

    Returns
    -------
    Tensor
        ``[..., num_codes]`` uint8.

    Raises
    ------
    ConfigError
        If ``width`` is not in 1..8 or ``num_codes`` is negative.
    ShapeError
        If ``words`` is not int32 or has another number of words.
    """
    _check_words(words, width, num_codes)
    if width == 8:
        return words.contiguous().view(torch.uint8)[..., :num_codes].clone()
    return unpack_lookup(words, width, num_codes, _identity_table(width, words.device))


def byte_table(table: Tensor, width: int) -> Tensor:
    """Expand a table of codes to a table of units, which `unpack_lookup` reads without further preparation.

    Parameters
    ----------
    table : Tensor
        ``[2**width, dim]``: the entry of every code, any dtype.
    width : int
        Bits per code, 1 to 8.

    Returns
    -------
    Tensor
        ``[2**(c * width), c * dim]``, dtype and device of ``table``, where ``c`` is the number of codes in a
        unit (8, 4, 4, 2, 2, 2, 2, 1 for widths 1 to 8): row ``u`` holds the entries of the ``c`` codes in
        the bits of ``u``, lowest bits first. At width 8 this is the table itself.

    Raises
    ------
    ConfigError
        If ``width`` is not in 1..8.
    ShapeError
        If ``table`` has another shape.
    """
    _check_width(width)
    if table.dim() != 2 or table.shape[0] != 1 << width:
        raise ShapeError(f"table for width {width} must be [{1 << width}, dim], got {_describe(table)}")
    codes_per_unit = _CODES_PER_UNIT[width]
    units = torch.arange(1 << (codes_per_unit * width), device=table.device)
    shifts = torch.arange(codes_per_unit, device=table.device) * width
    codes = (units[:, None] >> shifts) & ((1 << width) - 1)
    return table[codes].reshape(units.numel(), codes_per_unit * table.shape[1])


def unpack_lookup(words: Tensor, width: int, num_codes: int, table: Tensor) -> Tensor:
    """Decode packed codes straight to the table entries that they stand for.

    Parameters
    ----------
    words : Tensor
        ``[..., packed_words(num_codes, width)]`` int32, any strides. Bits behind the last code are ignored.
    width : int
        Bits per code, 1 to 8.
    num_codes : int
        Codes per row.
    table : Tensor
        ``[2**width, dim]``, or, to save its expansion at every call, ``byte_table`` of that. On the device
        of ``words``.

    Returns
    -------
    Tensor
        ``[..., num_codes * dim]`` contiguous, dtype of ``table``: the entries of a row's codes in order.

    Raises
    ------
    ConfigError
        If ``width`` is not in 1..8 or ``num_codes`` is negative.
    ShapeError
        If ``words`` is not int32 or has another number of words, or ``table`` is of another shape or device.
    """
    _check_words(words, width, num_codes)
    if table.device != words.device:
        raise ShapeError(f"table must be on {words.device} like the words, got {table.device}; move it there")
    codes_per_unit = _CODES_PER_UNIT[width]
    unit_bits = codes_per_unit * width
    if table.dim() != 2 or table.shape[0] != 1 << unit_bits:
        table = byte_table(table, width)
    lead = words.shape[:-1]
    num_units = -(-num_codes // codes_per_unit)
    entries = gather_rows(table, _unit_indices(words, unit_bits, num_units).reshape(-1))
    entries = entries.reshape(*lead, num_units * table.shape[1])
    return entries[..., : num_codes * (table.shape[1] // codes_per_unit)].contiguous()


def _unit_indices(words: Tensor, unit_bits: int, num_units: int) -> Tensor:
    """Read ``[..., num_units]`` int32 units of 8, 10, 12 or 14 bits from the bit streams of the rows."""
    stream = words.contiguous().view(torch.uint8).to(torch.int32)
    if unit_bits == 8:
        return stream[..., :num_units]
    period_bytes = math.lcm(unit_bits, 8) // 8
    period_units = period_bytes * 8 // unit_bits
    periods = -(-num_units // period_units)
    excess = periods * period_bytes - stream.shape[-1]
    if excess > 0:
        stream = torch.nn.functional.pad(stream, (0, excess))
    groups = stream[..., : periods * period_bytes].reshape(*words.shape[:-1], periods, period_bytes)
    units = torch.empty((*groups.shape[:-1], period_units), dtype=torch.int32, device=words.device)
    for phase in range(period_units):
        first, offset = divmod(phase * unit_bits, 8)
        value = torch.add(groups[..., first], groups[..., first + 1], alpha=1 << 8)
        if offset + unit_bits > 16:
            value = value.add_(groups[..., first + 2], alpha=1 << 16)
        if offset:
            value = value.bitwise_right_shift_(offset)
        torch.bitwise_and(value, (1 << unit_bits) - 1, out=units[..., phase])
    return units.reshape(*words.shape[:-1], periods * period_units)[..., :num_units]


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]`` for a 1-D index, moving short rows as single scalars."""
    table = table.contiguous()
    row_bytes = table.shape[1] * table.element_size()
    scalar = _SCALAR_OF_BYTES.get(row_bytes)
    if scalar is None or table.requires_grad or scalar.itemsize == table.element_size():
        return table.index_select(0, index)
    if (table.storage_offset() * table.element_size()) % row_bytes:
        table = table.clone()
    rows = table.view(scalar).reshape(-1).index_select(0, index)
    return rows.unsqueeze(-1).view(table.dtype)


@lru_cache(maxsize=64)
def _identity_table(width: int, device: torch.device) -> Tensor:
    codes = torch.arange(1 << width, device=device).to(torch.uint8)
    return byte_table(codes[:, None], width)


def _check_width(width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= MAX_WIDTH:
        raise ConfigError(f"width must be a whole number of bits from 1 to {MAX_WIDTH}, got {width!r}")


def _check_words(words: Tensor, width: int, num_codes: int) -> None:
    num_words = packed_words(num_codes, width)
    if words.dim() == 0 or words.dtype != torch.int32 or words.shape[-1] != num_words:
        raise ShapeError(
            f"words of {num_codes} codes at width {width} must be int32 [..., {num_words}], "
            f"got {_describe(words)}; unpack with the width and length that they were packed with"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
