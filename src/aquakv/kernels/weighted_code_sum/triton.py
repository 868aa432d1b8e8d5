"""Triton kernel of the sums of codes, weighted by the softmax of scores."""

# Compile-time constants are upper case, as everywhere in Triton; its tuples grow by concatenation. Its types
# describe neither launches nor what it makes of loops and tuples.
# ruff: noqa: N803, RUF005
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from aquakv.kernels.backend import interpreted
from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.operands import CHUNK_SLOTS, DecodeOperands
from aquakv.kernels.triton_codes import (
    chunk_levels,
    field_bytes,
    field_words,
    record_scales,
    token_scale,
)

#: Chunks of 64 coefficients that one program sums: as many as accumulators fit registers.
MAX_CHUNKS = 4


@triton.jit
def page_weights(scores, largest, keep_head, capacity, page):
    """Return 64 * exp(score - maximum) of a page's tokens, float32 [heads, 64]."""
    heads = tl.arange(0, largest.shape[0])
    tokens = tl.arange(0, 64)
    score = tl.load(
        scores + heads[:, None] * capacity + page * 64 + tokens[None, :],
        mask=keep_head[:, None],
        other=float("-inf"),
    )
    return tl.exp(score - largest[:, None]) * 64.0


@triton.jit(do_not_specialize=["num_pages", "num_splits", "num_maxima", "key_slabs", "code_slabs"])
def weighted_code_sum_kernel(
    scores,
    maxima,
    key_pages,
    key_fields,
    key_gains,
    value_pages,
    value_fields,
    value_gains,
    table,
    latents,
    lengths,
    sums,
    normalizers,
    key_record_bytes,
    value_record_bytes,
    num_pages,
    num_splits,
    num_maxima,
    query_heads,
    key_slabs,
    code_slabs,
    key_chunks,
    value_chunks,
    slots,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sum one slab (some chunks of key codes or of value codes, or the latents) over one split's pages."""
    slab = tl.program_id(0) % (code_slabs + 1)
    split = tl.program_id(0) // (code_slabs + 1)
    first_head = tl.program_id(1) * HEADS
    row = tl.program_id(2)
    used = (tl.load(lengths + row) + 63) // 64
    begin = split * used // num_splits
    end = (split + 1) * used // num_splits

    heads = tl.arange(0, HEADS)
    tokens = tl.arange(0, 64)
    keep_head = first_head + heads < query_heads
    row_head = row * query_heads + first_head
    capacity = num_pages * 64
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    for part_index in range(num_maxima):
        part = tl.load(
            maxima + (row_head + heads) * num_maxima + part_index, mask=keep_head, other=float("-inf")
        )
        largest = tl.maximum(largest, part)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    scores += row_head.to(tl.int64) * capacity
    padded_heads = tl.num_programs(1) * HEADS
    cell = row * num_splits + split
    out = sums + cell.to(tl.int64) * slots * padded_heads + first_head + heads[None, :]

    if slab < code_slabs:
        if slab < key_slabs:
            pages = key_pages
            fields = key_fields
            gains = key_gains
            record_bytes = key_record_bytes
            first = slab * CHUNKS
            count = key_chunks - first
            slot = first * 64
        else:
            pages = value_pages
            fields = value_fields
            gains = value_gains
            record_bytes = value_record_bytes
            first = (slab - key_slabs) * CHUNKS
            count = value_chunks - first
            slot = (key_chunks + first) * 64
        cells = tokens[:, None] * 16 + tl.arange(0, 16)[None, :]
        totals = ()
        for _ in tl.static_range(CHUNKS):
            totals = totals + (tl.zeros((64, HEADS), tl.float32),)
        places, halves = field_words(fields, first * 4, CHUNKS * 4)
        gains += first * 64
        for page in range(begin, end):
            record = pages + tl.load(table + row * num_pages + page).to(tl.int64) * record_bytes
            raw = field_bytes(record, cells, places, CHUNKS * 4)
            scale = token_scale(record_scales(record, record_bytes, tokens))
            weight = page_weights(scores, largest, keep_head, capacity, page)
            # A token that is not attended to may have no scale: nothing times nothing must be nothing.
            weight = tl.where(weight > 0.0, weight * scale[None, :], 0.0)
            right = tl.trans(weight.to(tl.float16))
            updated = ()
            for i in tl.static_range(CHUNKS):
                levels = chunk_levels(raw, places, halves, gains, 1.0, i * 4, 4, False, ASM)
                updated = updated + (tl.dot(tl.trans(levels), right, totals[i]),)
            totals = updated
        rows = tl.arange(0, 64)[:, None]
        for i in tl.static_range(CHUNKS):
            tl.store(out + (slot + i * 64 + rows) * padded_heads, totals[i], mask=rows + i * 64 < count * 64)
    else:
        normalizer = tl.zeros((HEADS,), tl.float32)
        if RANK:
            ranks = tl.arange(0, RANK)
            total = tl.zeros((RANK, HEADS), tl.float32)
        for page in range(begin, end):
            weight = page_weights(scores, largest, keep_head, capacity, page)
            normalizer += tl.sum(weight, axis=1)
            if RANK:
                token = (row * num_pages + page).to(tl.int64) * 64 + tokens
                seen = tl.max(weight, axis=0) > 0.0
                latent = tl.load(
                    latents + token[:, None] * RANK + ranks[None, :], mask=seen[:, None], other=0.0
                )
                total = tl.dot(tl.trans(latent), tl.trans(weight.to(tl.float16)), total)
        if RANK:
            tl.store(out + ((key_chunks + value_chunks) * 64 + ranks[:, None]) * padded_heads, total)
        tl.store(normalizers + cell * padded_heads + first_head + heads, normalizer)


def weighted_code_sum(
    scores: Tensor,
    maxima: Tensor,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Launch `weighted_code_sum_kernel`; see `aquakv.kernels.weighted_code_sum.weighted_code_sum`."""
    rows, query_heads, _ = scores.shape
    heads, blocks = block_heads(query_heads), head_blocks(query_heads)
    keys, values = operands.keys, operands.values
    chunks, key_slabs, value_slabs = slabs(keys.chunks, values.chunks)
    slots = (keys.chunks + values.chunks) * CHUNK_SLOTS + operands.latent_width
    sums = scores.new_empty(rows, num_splits, slots, blocks * heads)
    normalizers = scores.new_empty(rows, num_splits, blocks * heads)
    weighted_code_sum_kernel[((key_slabs + value_slabs + 1) * num_splits, blocks, rows)](
        scores,
        maxima,
        codes.key_pages,
        keys.fields,
        keys.gains,
        codes.value_pages,
        values.fields,
        values.gains,
        codes.table,
        latents,
        codes.lengths,
        sums,
        normalizers,
        keys.layout.record_bytes,
        values.layout.record_bytes,
        codes.pages,
        num_splits,
        maxima.shape[2],
        query_heads,
        key_slabs,
        key_slabs + value_slabs,
        keys.chunks,
        values.chunks,
        slots,
        HEADS=heads,
        RANK=operands.latent_width,
        CHUNKS=chunks,
        ASM=not interpreted(),
        num_warps=4,
        num_stages=1,
    )
    return sums, normalizers


def block_heads(query_heads: int) -> int:
    """Return how many query heads, 16 or 32, a program sums for."""
    return 16 if query_heads <= 16 else 32


def head_blocks(query_heads: int) -> int:
    """Return how many programs share the query heads."""
    return -(-query_heads // block_heads(query_heads))


def slabs(key_chunks: int, value_chunks: int) -> tuple[int, int, int]:
    """Return the chunks of a slab, at most `MAX_CHUNKS`, and how many slabs keys and values have."""
    key_slabs, value_slabs = -(-key_chunks // MAX_CHUNKS), -(-value_chunks // MAX_CHUNKS)
    chunks = max(1, -(-key_chunks // max(1, key_slabs)), -(-value_chunks // max(1, value_slabs)))
    return chunks, key_slabs, value_slabs
