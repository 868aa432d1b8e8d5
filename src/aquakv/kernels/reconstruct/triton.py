"""Triton kernels of reconstruction: keys by head, levels as columns, coefficients of grids."""

# Compile-time constants are upper case, as everywhere in Triton. Its types describe neither launches nor what
# it makes of loops.
# ruff: noqa: N803, N806
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquakv.codec import GridQuantizer
from aquakv.codec.scalar import SCALES
from aquakv.kernels.backend import interpreted
from aquakv.kernels.pages import FIELD_COLUMNS, PAGE_TOKENS, TAIL_BYTES
from aquakv.kernels.reconstruct.operands import FieldTables, ReconstructOperands

#: Fields that a program of `levels_kernel` unpacks.
_FIELDS = 8

#: Tokens and codes of a program of `grid_kernel`.
_GRID_TOKENS, _GRID_CODES = 8, 128


@triton.jit
def _scaled_field(record, fields, gains, index, cells, lane, scale):
    """Return a field's levels times the scales [64, 1], float32 [64, 16]."""
    word = tl.load(fields + index)
    gain = tl.load(gains + index * 16 + lane)[None, :]
    raw = tl.load(record + (word & 0xFFFF) * 1024 + cells).to(tl.int32)
    largest = (1 << ((word >> 16) & 15)) - 1
    x = ((raw >> ((word >> 20) & 15)) & largest).to(tl.float32) - largest * 0.5
    x = tl.where(gain < 0, 0.0, x)
    return x * (1.0 + gain * (x * x)) * scale


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr):
    """Add a product. Triton's interpreter multiplies no bfloat16: WIDE does the same in float32."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def keys_kernel(
    pages,
    latents,
    fields,
    gains,
    first_fields,
    scales,
    synthesis,
    latent_map,
    offset,
    keys,
    inputs,
    record_bytes,
    row_inputs,
    columns,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    PREDICTS: tl.constexpr,
    WIDE: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Reconstruct one head's keys of one page; lay its scaled levels and latents down for the values."""
    TYPE: tl.constexpr = synthesis.dtype.element_ty
    head = tl.program_id(0) % HEADS
    page = (tl.program_id(0) // HEADS).to(tl.int64)
    tokens = tl.arange(0, 64)
    token = (page * 64 + tokens)[:, None]
    lane = tl.arange(0, 16)
    cells = tokens[:, None] * 16 + lane[None, :]
    coordinates = tl.arange(0, DIM)
    feature = head * DIM + coordinates
    record = pages + page * record_bytes
    scale = tl.load(scales + tl.load(record + (record_bytes - TAIL) + tokens).to(tl.int32))[:, None]
    total = tl.zeros((64, DIM), tl.float32) + tl.load(offset + feature)[None, :]
    if RANK:
        ranks = tl.arange(0, RANK)
        latent = tl.load(latents + token * RANK + ranks[None, :]).to(TYPE)
        matrix = tl.load(latent_map + ranks[:, None] * (HEADS * DIM) + feature[None, :])
        total = _dot(latent, matrix, total, WIDE)
        if PREDICTS and head == 0:
            tl.store(inputs + token * row_inputs + columns + ranks[None, :], latent)
    for index in range(tl.load(first_fields + head), tl.load(first_fields + head + 1)):
        level = _scaled_field(record, fields, gains, index, cells, lane, scale).to(TYPE)
        rows = tl.load(synthesis + (index * 16 + lane[:, None]) * DIM + coordinates[None, :])
        total = _dot(level, rows, total, WIDE)
        if PREDICTS:
            tl.store(inputs + token * row_inputs + index * 16 + lane[None, :], level)
    tl.store(keys + token * (HEADS * DIM) + feature[None, :], total.to(TYPE))


@triton.jit(do_not_specialize=["num_fields"])
def levels_kernel(
    pages,
    fields,
    gains,
    scales,
    inputs,
    record_bytes,
    row_inputs,
    column,
    num_fields,
    FIELDS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Lay the scaled levels of FIELDS fields of one page down, from ``column`` on."""
    page = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, 64)
    lane = tl.arange(0, 16)
    cells = tokens[:, None] * 16 + lane[None, :]
    record = pages + page * record_bytes
    scale = tl.load(scales + tl.load(record + (record_bytes - TAIL) + tokens).to(tl.int32))[:, None]
    out = inputs + (page * 64 + tokens)[:, None] * row_inputs + column + lane[None, :]
    first = tl.program_id(1) * FIELDS
    for index in range(first, tl.minimum(first + FIELDS, num_fields)):
        level = _scaled_field(record, fields, gains, index, cells, lane, scale)
        tl.store(out + index * 16, level.to(inputs.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "num_codes", "row_bytes", "groups"])
def grid_kernel(
    words,
    scales,
    points,
    out,
    tokens,
    num_codes,
    row_bytes,
    groups,
    codes_per_group,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    CODES: tl.constexpr,
):
    """Unpack, look up and scale CODES codes of TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    code = tl.program_id(1) * CODES + tl.arange(0, CODES)
    inside = (token < tokens)[:, None] & (code < num_codes)[None, :]
    token = token.to(tl.int64)[:, None]
    bit = code * WIDTH
    start = words + token * row_bytes + (bit // 8)[None, :]
    # A code that ends in the byte where it begins has no use for the next one.
    straddles = inside & (bit % 8 + WIDTH > 8)[None, :]
    both = tl.load(start, mask=inside, other=0).to(tl.int32)
    both |= tl.load(start + 1, mask=straddles, other=0).to(tl.int32) << 8
    index = (both >> (bit % 8)[None, :]) & ((1 << WIDTH) - 1)
    scale = tl.load(scales + token * groups + (code // codes_per_group)[None, :], mask=inside, other=0.0)
    TYPE: tl.constexpr = out.dtype.element_ty
    # Factors of the dtype, whose product in float32 is exact and rounded once.
    scale = scale.to(TYPE).to(tl.float32)
    first = (tl.load(points + index * DIM).to(TYPE).to(tl.float32) * scale).to(TYPE)
    if DIM == 1:
        tl.store(out + token * num_codes + code[None, :], first, mask=inside)
    else:
        second = (tl.load(points + index * DIM + 1).to(TYPE).to(tl.float32) * scale).to(TYPE)
        pairs = tl.interleave(first, second)
        feature = tl.program_id(1) * (2 * CODES) + tl.arange(0, 2 * CODES)
        keep = (token < tokens) & (feature < 2 * num_codes)[None, :]
        tl.store(out + token * (2 * num_codes) + feature[None, :], pairs, mask=keep)


def reconstruct(
    key_pages: Tensor,
    value_pages: Tensor,
    latents: Tensor | None,
    operands: ReconstructOperands,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; see `aquakv.kernels.reconstruct.reconstruct`."""
    pages, dtype = len(key_pages), operands.dtype
    tokens = pages * PAGE_TOKENS
    keys = key_pages.new_empty(tokens, operands.features, dtype=dtype)
    inputs = key_pages.new_empty(tokens, len(operands.value_synthesis), dtype=dtype)
    base = operands.value_bias if centred else operands.value_offset
    if not tokens:
        return keys, torch.empty_like(keys)
    scales = _scales(key_pages.device)
    keys_kernel[(pages * operands.num_kv_heads,)](
        key_pages,
        latents,
        operands.keys.fields,
        operands.keys.gains,
        operands.keys.first_fields,
        scales,
        operands.key_synthesis,
        operands.latent_map,
        operands.key_bias if centred else operands.key_offset,
        keys,
        inputs,
        operands.keys.layout.record_bytes,
        inputs.shape[1],
        len(operands.keys.slots),
        HEADS=operands.num_kv_heads,
        DIM=operands.head_dim,
        RANK=operands.latent_width,
        PREDICTS=operands.predicts_values,
        WIDE=interpreted(),
        TAIL=TAIL_BYTES,
        num_warps=4 if operands.head_dim < 256 else 8,
        num_stages=1,
    )
    _levels(value_pages, operands.values, scales, inputs)
    return keys, torch.addmm(base, inputs, operands.value_synthesis)


def _levels(records: Tensor, tables: FieldTables, scales: Tensor, inputs: Tensor) -> None:
    """Launch `levels_kernel` for the last columns of the inputs."""
    num_fields = len(tables.fields)
    if not num_fields:
        return
    levels_kernel[(len(records), triton.cdiv(num_fields, _FIELDS))](
        records,
        tables.fields,
        tables.gains,
        scales,
        inputs,
        tables.layout.record_bytes,
        inputs.shape[1],
        inputs.shape[1] - num_fields * FIELD_COLUMNS,
        num_fields,
        FIELDS=_FIELDS,
        TAIL=TAIL_BYTES,
        num_warps=4,
    )


def grid_coefficients(words: Tensor, scales: Tensor, quantizer: GridQuantizer, dtype: torch.dtype) -> Tensor:
    """Launch `grid_kernel`; see `aquakv.kernels.reconstruct.grid_coefficients`."""
    tokens, num_codes, dim = len(words), quantizer.codes_per_token, quantizer.grid.dim
    out = words.new_empty(tokens, quantizer.features, dtype=dtype)
    if not tokens:
        return out
    grid_kernel[(triton.cdiv(tokens, _GRID_TOKENS), triton.cdiv(num_codes, _GRID_CODES))](
        words.view(torch.uint8),
        scales,
        quantizer.grid.points,
        out,
        tokens,
        num_codes,
        4 * words.shape[1],
        quantizer.groups,
        quantizer.group_size // dim,
        WIDTH=quantizer.grid.code_width,
        DIM=dim,
        TOKENS=_GRID_TOKENS,
        CODES=_GRID_CODES,
        num_warps=4,
    )
    return out


@lru_cache(maxsize=8)
def _scales(device: torch.device) -> Tensor:
    return SCALES.to(device)
