"""Triton kernels of encoding: coefficients of keys, and from coefficients to records."""

# Compile-time constants are upper case, as everywhere in Triton. Its types describe neither launches nor what
# it makes of loops.
# ruff: noqa: N803, N806
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquakv.codec.scalar import SCALES
from aquakv.kernels.encode.columns import FIELDS_AT_ONCE, TABLE_ROWS, CodeColumns
from aquakv.kernels.encode.operands import BLOCK_COLUMNS, EncodeOperands
from aquakv.kernels.pages import PAGE_TOKENS, TAIL_BYTES

#: Tokens and warps of a program that quantises: a part of a page, so that there are programs enough, and four
#: coefficients of a token to a thread.
_TOKENS, _WARPS = 16, 4

_TYPES = {torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _narrow(numbers, TYPE: tl.constexpr, LIMIT: tl.constexpr):
    """Round to TYPE; what exceeds LIMIT to it, infinity to not-a-number."""
    # Nothing times what is not finite is not a number.
    return (tl.clamp(numbers, -LIMIT, LIMIT) + 0.0 * numbers).to(TYPE)


@triton.jit(do_not_specialize=["key_unit", "value_unit"])
def coefficients_kernel(
    keys,
    values,
    latents,
    key_offset,
    value_offset,
    latent_map,
    analysis,
    first_columns,
    columns,
    inputs,
    key_unit,
    value_unit,
    row_columns,
    row_inputs,
    levels,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREDICTS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Compute one head's columns of one page's keys, and lay values and latents beside the levels to come."""
    TYPE: tl.constexpr = analysis.dtype.element_ty
    WIDTH: tl.constexpr = HEADS * DIM
    head = tl.program_id(0) % HEADS
    # 64-bit numbers only for where the page's rows begin.
    first = (tl.program_id(0) // HEADS).to(tl.int64) * 64
    token = tl.arange(0, 64)[:, None]
    coordinates = tl.arange(0, DIM)
    feature = head * DIM + coordinates
    place = token * WIDTH + feature[None, :]
    inputs += first * row_inputs
    residual = tl.load(keys + first * WIDTH + place).to(tl.float32) - tl.load(key_offset + feature)[None, :]
    if RANK:
        ranks = tl.arange(0, RANK)
        latent = tl.load(latents + first * RANK + token * RANK + ranks[None, :]).to(TYPE)
        own = tl.load(latent_map + ranks[:, None] * WIDTH + feature[None, :])
        residual = tl.dot(-latent, own, residual, input_precision="ieee")
        if PREDICTS and head == 0:
            tl.store(inputs + token * row_inputs + levels + ranks[None, :], latent)
    residual = _narrow(residual * key_unit, TYPE, LIMIT)
    start = tl.load(first_columns + head)
    count = tl.load(first_columns + head + 1) - start
    # Groups begin at multiples of 16 columns.
    out = columns + first * row_columns + start // 16 * 16
    analysis += head * (DIM * BLOCKS * 64)
    for block in tl.static_range(BLOCKS):
        column = block * 64 + tl.arange(0, 64)
        matrix = tl.load(analysis + coordinates[:, None] * (BLOCKS * 64) + column[None, :])
        found = tl.dot(residual, matrix, input_precision="ieee")
        tl.store(
            out + token * row_columns + column[None, :],
            _narrow(found, TYPE, LIMIT),
            mask=(column < count)[None, :],
        )
    centred = (
        tl.load(values + first * WIDTH + place).to(tl.float32) - tl.load(value_offset + feature)[None, :]
    )
    last = inputs + (row_inputs - WIDTH)
    tl.store(last + token * row_inputs + feature[None, :], _narrow(centred * value_unit, TYPE, LIMIT))


@triton.jit
def _bounds_passed(magnitude, numbers):
    """Count the bounds between levels that a magnitude has passed, for any widths; none if not a number."""
    rise = tl.load(numbers + 16)[None, :]
    cubic = tl.load(numbers + 32)[None, :]
    magnitude = tl.minimum(magnitude, tl.load(numbers + 64)[None, :], propagate_nan=tl.PropagateNan.ALL)
    # About where among the bounds; half a bound's distance is near enough, the comparison decides.
    bound = magnitude / (rise + tl.load(numbers + 48)[None, :] * magnitude)
    square = bound * bound
    bound = (magnitude + 2.0 * cubic * square * bound) / (rise + 3.0 * cubic * square)
    bound = tl.floor(bound + 0.5)
    outward = bound - (magnitude < bound * (rise + cubic * bound * bound)).to(tl.float32)
    return tl.where(outward > 0, outward, 0.0)


@triton.jit(do_not_specialize=["coefficients", "num_fields"])
def quantise_kernel(
    columns,
    coded,
    rest,
    fields,
    table,
    scales,
    records,
    inputs,
    latents,
    innovation,
    transition,
    next_offset,
    following,
    key_excess,
    excess,
    coefficients,
    num_fields,
    row_columns,
    row_inputs,
    record_bytes,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    STORE_LEVELS: tl.constexpr,
    GUARDED: tl.constexpr,
    MERGE: tl.constexpr,
    TOKENS: tl.constexpr,
    TYPE: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Scale, quantise and pack TOKENS tokens; also their levels, the next latents and the errors.

    TYPE is that of the operands, which the columns have too. Four fields are worked on at a time, so that
    their instructions and loads overlap and products are of 64 levels.
    """
    first = tl.program_id(0) * TOKENS
    own = tl.arange(0, TOKENS)
    token = (first + own).to(tl.int64)[:, None]
    row = columns + token * row_columns
    # First all columns: the mean square of the coded, the errors of the others.
    squares = tl.zeros((TOKENS, 128), tl.float32)
    beside = tl.zeros((TOKENS, 128), tl.float32)
    column = tl.arange(0, 128)
    inside = column < row_columns
    number = tl.load(row + column[None, :], mask=inside[None, :], other=0.0)
    weight = tl.load(coded + column, mask=inside, other=0.0)
    unit = tl.load(rest + column, mask=inside, other=0.0)
    for _ in range(0, row_columns, 128):
        actual, chosen, own_unit = number.to(tl.float32), weight[None, :] != 0, unit[None, :]
        # What comes next is loaded while this is worked on.
        column += 128
        inside = column < row_columns
        number = tl.load(row + column[None, :], mask=inside[None, :], other=0.0)
        weight = tl.load(coded + column, mask=inside, other=0.0)
        unit = tl.load(rest + column, mask=inside, other=0.0)
        # Neither products of float16 that leave its range nor their squares here become infinite.
        clamped = tl.where(chosen, actual, 0.0)
        clamped = tl.clamp(clamped, -1e16, 1e16, propagate_nan=tl.PropagateNan.ALL)
        squares += clamped * clamped
        if GUARDED:
            distance = actual * own_unit
            beside += distance * distance
    total_square = tl.sum(squares, axis=1)
    lost = total_square != total_square
    octaves = 8.0 * tl.log2(tl.where(lost, 1.0, total_square) / coefficients)
    code = tl.minimum(tl.maximum(tl.floor(octaves + 128.5), 0.0), 254.0).to(tl.int32)
    code = tl.where(lost, 255, tl.where(num_fields > 0, code, 128))
    scale = tl.load(scales + code)
    # What is lost becomes 0 or not a number, and both the level next to 0 from above.
    reciprocal = tl.where(lost, 0.0, 1.0 / scale)[:, None]
    narrow_scale = scale.to(TYPE)[:, None]
    page = first // 64
    within = first % 64 + own
    record = records + page.to(tl.int64) * record_bytes
    tail = record + (record_bytes - TAIL)
    tl.store(tail + within, code.to(tl.uint8))
    flags = tl.arange(0, 16)
    tl.store(
        tail + 64 + flags, tl.where(flags < 8, 255, 0).to(tl.uint8), mask=(flags < 16) & (first % 64 == 0)
    )

    lane = tl.arange(0, 16)
    packed = tl.zeros((TOKENS, 16), tl.int32)
    errors = tl.zeros((TOKENS, 16), tl.float32)
    if WIDTH:
        widths = tl.arange(0, WIDTH)
        total = tl.zeros((TOKENS, WIDTH), tl.float32)
        # Levels come side by side: all four fields' of a column, then those of the next.
        level_row = (tl.arange(0, 64) % 4 * 16 + tl.arange(0, 64) // 4)[:, None] * WIDTH + widths[None, :]
        # They are multiplied while the next four fields are worked on.
        side_by_side = tl.zeros((TOKENS, 64), TYPE)
        matrix = tl.zeros((64, WIDTH), TYPE)
    scale_column = scale[:, None]
    # The next four fields' columns are loaded while four are worked on.
    some = own[:, None] < TOKENS * (num_fields > 0)
    loaded = ()
    for f in tl.static_range(4):
        place = tl.load(fields + 2 * f + 1, mask=num_fields > 0, other=0)
        loaded += (tl.load(row + place // 16 * 16 + lane[None, :], mask=some, other=0.0),)
    for start in range(0, num_fields, 4):
        if WIDTH:
            total = tl.dot(side_by_side, matrix, total, input_precision="ieee")
        here = fields + 2 * start
        more = start + 4 < num_fields
        some = own[:, None] < TOKENS * more
        words, actual, relative, ahead = (), (), (), ()
        for f in tl.static_range(4):
            words += (tl.load(here + 2 * f),)
            actual += (loaded[f].to(tl.float32),)
            relative += (actual[f] * reciprocal,)
            place = tl.load(here + 2 * f + 9, mask=more, other=0)
            ahead += (tl.load(row + place // 16 * 16 + lane[None, :], mask=some, other=0.0),)
        loaded = ahead
        xs, levels = (), ()
        for f in tl.static_range(4):
            numbers = table + (start + f) * 144 + lane
            # At two bits there is one bound, at one none.
            size = tl.where(tl.abs(relative[f]) >= tl.load(numbers + 16)[None, :], 1.5, 0.5)
            size = tl.minimum(size, tl.load(numbers)[None, :])
            xs += (tl.where(relative[f] < 0, -size, size),)
            levels += (xs[f].to(TYPE),)
        if (((words[0] | words[1] | words[2] | words[3]) >> 26) & 1) != 0:
            cubic_xs, cubic_levels = (), ()
            for f in tl.static_range(4):
                numbers = table + (start + f) * 144 + lane
                passed = _bounds_passed(tl.abs(relative[f]), numbers)
                size = tl.minimum(0.5 + passed, tl.load(numbers)[None, :])
                x = tl.where(relative[f] < 0, -size, size)
                cubic_xs += (x,)
                level = x.to(TYPE)
                gain = tl.load(numbers + 96)[None, :].to(TYPE)
                cubic_levels += (level * (level * level * gain + 1.0).to(TYPE),)
            xs, levels = cubic_xs, cubic_levels
        if WIDTH:
            matrix = tl.load(innovation + (start * (16 * WIDTH) + level_row))
        for f in tl.static_range(4):
            word = words[f]
            numbers = table + (start + f) * 144 + lane
            # The lowest bits of a float32 between 2^22 and 2^23 are twice the code.
            stored = xs[f] + tl.load(numbers + 128)[None, :]
            stored = stored.to(tl.int32, bitcast=True) << ((word >> 20) & 15)
            packed = packed & (((word >> 24) & 1) - 1) | stored
            plane = record + (word & 0xFFFF) * 1024
            finished = ((word >> 25) & 1) != 0
            tl.store(
                plane + within[:, None] * 16 + lane[None, :],
                (packed >> 1).to(tl.uint8),
                mask=own[:, None] < TOKENS * finished,
            )
            level = levels[f]
            if STORE_LEVELS:
                beside_values = inputs + token * row_inputs + (start + f) * 16
                tl.store(beside_values + lane[None, :], level * narrow_scale)
            if GUARDED:
                slope = tl.load(numbers + 80)[None, :]
                error = actual[f] - level.to(tl.float32) * (slope * scale_column)
                error *= tl.load(numbers + 112)[None, :]
                errors += error * error
        if WIDTH:
            side_by_side = tl.join(tl.join(levels[0], levels[2]), tl.join(levels[1], levels[3]))
            side_by_side = side_by_side.reshape(TOKENS, 64)
    if WIDTH:
        total = tl.dot(side_by_side, matrix, total, input_precision="ieee")
        total = total * scale_column + tl.load(next_offset + widths)[None, :]
        if RANK:
            ranks = tl.arange(0, RANK)
            latent = tl.load(latents + token * RANK + ranks[None, :]).to(TYPE)
            matrix = tl.load(transition + ranks[:, None] * WIDTH + widths[None, :])
            total = tl.dot(latent, matrix, total, input_precision="ieee")
        tl.store(following + token * WIDTH + widths[None, :], total.to(TYPE))
    if GUARDED:
        found = tl.sum(errors, axis=1) + tl.sum(beside, axis=1)
        if MERGE:
            other = tl.load(key_excess + first + own)
            found = tl.where((found > other) | (found != found), found, other)
        tl.store(excess + first + own, found)


def encode(
    keys: Tensor, values: Tensor, latents: Tensor | None, operands: EncodeOperands
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch the kernels; see `aquakv.kernels.encode.encode`."""
    found = coefficients(keys, values, latents, operands)
    key_pages, key_excess, following = quantise_keys(*found, latents, operands)
    value_pages, excess = quantise_values(value_columns(found.inputs, operands), key_excess, operands)
    return key_pages, value_pages, following, excess


class Coefficients(NamedTuple):
    """What `coefficients_kernel` gives.

    Attributes
    ----------
    columns
        ``[tokens, columns]``: of the keys.
    inputs
        ``[tokens, rows of value_analysis]``: latents and centred values in place, levels of the keys not yet.
    """

    columns: Tensor
    inputs: Tensor


def coefficients(
    keys: Tensor, values: Tensor, latents: Tensor | None, operands: EncodeOperands
) -> Coefficients:
    """Compute the coefficients of the keys, and what those of the values are made from."""
    tokens, dtype = len(keys), operands.dtype
    columns = keys.new_empty(tokens, operands.keys.columns, dtype=dtype)
    inputs = keys.new_empty(tokens, len(operands.value_analysis), dtype=dtype)
    if not tokens:
        return Coefficients(columns, inputs)
    coefficients_kernel[(tokens // PAGE_TOKENS * operands.num_kv_heads,)](
        keys,
        values,
        latents,
        operands.key_offset,
        operands.value_offset,
        operands.latent_map,
        operands.key_analysis,
        operands.keys.first_columns,
        columns,
        inputs,
        operands.key_unit,
        operands.value_unit,
        columns.shape[1],
        inputs.shape[1],
        len(operands.keys.slots),
        HEADS=operands.num_kv_heads,
        DIM=operands.head_dim,
        RANK=operands.latent_width,
        BLOCKS=operands.key_analysis.shape[2] // BLOCK_COLUMNS,
        PREDICTS=operands.predicts_values,
        LIMIT=torch.finfo(dtype).max,
        **_coefficient_options(operands.head_dim, dtype),
    )
    return Coefficients(columns, inputs)


def _coefficient_options(head_dim: int, dtype: torch.dtype) -> dict[str, int | None]:
    """Return how `coefficients_kernel` is compiled.

    With 160 registers, which are enough for heads of 128 and four warps, a multiprocessor of a Hopper GPU has
    three programs at a time, and each waits for memory while the others compute.
    """
    if head_dim <= 128 and dtype == torch.float16:
        return {"num_warps": 4, "num_stages": 1, "maxnreg": 160}
    return {"num_warps": 4 if head_dim < 128 else 8, "num_stages": 1, "maxnreg": None}


def quantise_keys(
    columns: Tensor, inputs: Tensor, latents: Tensor | None, operands: EncodeOperands
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the keys' records, their excess and the next latents; put their levels into ``inputs``."""
    following = None
    if operands.next_width:
        following = columns.new_empty(len(columns), operands.next_width)
    records, excess = _quantise(columns, operands.keys, operands, inputs, latents, following, None)
    return records, excess, following


def value_columns(inputs: Tensor, operands: EncodeOperands) -> Tensor:
    """Return the values' coefficients: one product."""
    return inputs @ operands.value_analysis


def quantise_values(
    columns: Tensor, key_excess: Tensor | None, operands: EncodeOperands
) -> tuple[Tensor, Tensor | None]:
    """Return the values' records, and the larger excess."""
    return _quantise(columns, operands.values, operands, None, None, None, key_excess)


def _quantise(
    columns: Tensor,
    described: CodeColumns,
    operands: EncodeOperands,
    inputs: Tensor | None,
    latents: Tensor | None,
    following: Tensor | None,
    key_excess: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch `quantise_kernel` for keys (which have inputs of the values to fill) or for values."""
    assert described.table.shape[1:] == (len(TABLE_ROWS), 16) == (9, 16)
    assert len(described.fields) % FIELDS_AT_ONCE == 0
    tokens = len(columns)
    records = columns.new_empty(tokens // PAGE_TOKENS, described.layout.record_bytes, dtype=torch.uint8)
    excess = columns.new_empty(tokens, dtype=torch.float32) if operands.guarded else None
    if not tokens:
        return records, excess
    quantise_kernel[(tokens // _TOKENS,)](
        columns,
        described.coded,
        described.rest,
        described.fields,
        described.table,
        _scales(columns.device),
        records,
        inputs,
        latents,
        operands.innovation,
        operands.transition,
        operands.next_offset,
        following,
        key_excess,
        excess,
        max(1, described.coefficients),
        len(described.fields),
        columns.shape[1],
        0 if inputs is None else inputs.shape[1],
        described.layout.record_bytes,
        RANK=operands.latent_width if following is not None else 0,
        WIDTH=0 if following is None else operands.next_width,
        STORE_LEVELS=inputs is not None and operands.predicts_values,
        GUARDED=operands.guarded,
        MERGE=key_excess is not None,
        TOKENS=_TOKENS,
        TYPE=_TYPES[operands.dtype],
        TAIL=TAIL_BYTES,
        num_warps=_WARPS,
        num_stages=1,
    )
    return records, excess


@lru_cache(maxsize=8)
def _scales(device: torch.device) -> Tensor:
    return SCALES.to(device)
