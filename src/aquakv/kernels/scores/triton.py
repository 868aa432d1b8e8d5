"""Triton kernels of the scores of coded keys, and of the next layer's latent."""

# Compile-time constants are upper case, as everywhere in Triton; its tuples grow by concatenation. Its types
# describe neither launches nor what it makes of loops and tuples.
# ruff: noqa: N803, N806, RUF005
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquakv.kernels.backend import interpreted
from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.launch import pipeline_stages
from aquakv.kernels.operands import DecodeOperands, chunk_sizes
from aquakv.kernels.pages import PAGE_TOKENS
from aquakv.kernels.rotary import PageRotary
from aquakv.kernels.triton_codes import (
    chunk_levels,
    field_bytes,
    field_words,
    record_attended,
    record_scales,
    token_scale,
)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def query_half(query, columns, heads, keep, SECOND: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Load half of the queries' coordinates in rotary order, float32 [head_dim / 2, heads]."""
    if SECOND:
        column = tl.where(columns < ROTARY // 2, columns + ROTARY // 2, columns + DIM // 2)
    else:
        column = tl.where(columns < ROTARY // 2, columns, columns + ROTARY // 2)
    return tl.load(query + heads[None, :] * DIM + column[:, None], mask=keep[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["num_pages", "num_splits", "scaling", "softcap"])
def scores_kernel(
    query,
    pages,
    table,
    latents,
    fields,
    gains,
    first_fields,
    synthesis,
    latent_synthesis,
    key_offset,
    page_cos,
    page_sin,
    offset_cos,
    offset_sin,
    lengths,
    scores,
    maxima,
    record_bytes,
    num_pages,
    num_splits,
    scaling,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    RANK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Score one KV head's keys of one split of a row's pages against its queries."""
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(0) % HEADS
    split = tl.program_id(0) // HEADS
    row = tl.program_id(1)
    length = tl.load(lengths + row)
    used = (length + 63) // 64
    first_field = tl.load(first_fields + head)
    FIELDS: tl.constexpr = ROWS // 16

    tokens = tl.arange(0, 64)
    columns = tl.arange(0, 16)
    coordinates = tl.arange(0, HALF)
    members = tl.arange(0, GROUP_PAD)
    cells = tokens[:, None] * 16 + columns[None, :]
    synthesis += head * ROWS * DIM
    # What stays the same over the pages: tuples of operands in shared memory.
    lower = ()
    upper = ()
    for i in tl.static_range(len(CHUNKS)):
        rows = tl.arange(0, CHUNKS[i] * 16)
        block = synthesis + (i * 64 + rows[:, None]) * DIM + coordinates[None, :]
        lower = lower + (tl.load(block),)
        upper = upper + (tl.load(block + HALF),)
    if RANK:
        block = latent_synthesis + (head * RANK + tl.arange(0, RANK)[:, None]) * DIM + coordinates[None, :]
        latent_lower = tl.load(block)
        latent_upper = tl.load(block + HALF)
    offset_lower = tl.load(key_offset + head * DIM + coordinates)
    offset_upper = tl.load(key_offset + head * DIM + HALF + coordinates)

    query_head = (row * HEADS + head) * GROUP + members
    keep_member = members < GROUP
    query_lower = query_half(query, coordinates, query_head, keep_member, False, DIM, ROTARY)
    query_upper = query_half(query, coordinates, query_head, keep_member, True, DIM, ROTARY)
    turning = coordinates < ROTARY // 2
    turn_block = tokens[:, None] * (ROTARY // 2) + coordinates[None, :]
    out = scores + query_head[None, :].to(tl.int64) * (num_pages * 64) + tokens[:, None]
    largest = tl.full((64, GROUP_PAD), float("-inf"), tl.float32)
    begin = split * used // num_splits
    # Fields past a head's own belong to the next head; their rows are zero.
    places, halves = field_words(fields, first_field, FIELDS)
    for page in range(begin, (split + 1) * used // num_splits):
        number = row * num_pages + page
        record = pages + tl.load(table + number).to(tl.int64) * record_bytes
        raw = field_bytes(record, cells, places, FIELDS)
        scale = token_scale(record_scales(record, record_bytes, tokens)).to(tl.float16)[:, None]
        first = tl.zeros((64, HALF), tl.float32) + offset_lower[None, :]
        second = tl.zeros((64, HALF), tl.float32) + offset_upper[None, :]
        if RANK:
            latent = tl.load(
                latents + (number.to(tl.int64) * 64 + tokens[:, None]) * RANK + tl.arange(0, RANK)[None, :]
            )
            first = tl.dot(latent, latent_lower, first)
            second = tl.dot(latent, latent_upper, second)
        for i in tl.static_range(len(CHUNKS)):
            chunk = chunk_levels(
                raw, places, halves, gains + 16 * first_field, scale, i * 4, CHUNKS[i], True, ASM
            )
            first = tl.dot(chunk, lower[i], first)
            second = tl.dot(chunk, upper[i], second)
        turns = number * (ROTARY // 2) + coordinates
        cos = tl.load(page_cos + turns, mask=turning, other=1.0)[:, None]
        sin = tl.load(page_sin + turns, mask=turning, other=0.0)[:, None]
        # The query turned back by the page's angle: then keys turn by offsets within the page only.
        back_lower = (query_lower * cos + query_upper * sin).to(tl.float16)
        back_upper = (query_upper * cos - query_lower * sin).to(tl.float16)
        cos = tl.load(offset_cos + turn_block, mask=turning[None, :], other=1.0).to(tl.float32)
        sin = tl.load(offset_sin + turn_block, mask=turning[None, :], other=0.0).to(tl.float32)
        rotated_lower = (first * cos - second * sin).to(tl.float16)
        rotated_upper = (second * cos + first * sin).to(tl.float16)
        score = tl.dot(rotated_lower, back_lower)
        score = tl.dot(rotated_upper, back_upper, score) * scaling
        if SOFTCAP:
            score = softcap * _tanh(score / softcap)
        keep = (page * 64 + tokens < length) & record_attended(record, record_bytes, tokens)
        score = tl.where(keep[:, None], score, float("-inf"))
        tl.store(out + page * 64, score, mask=keep_member[None, :])
        largest = tl.maximum(largest, score)
    tl.store(maxima + query_head * num_splits + split, tl.max(largest, axis=0), mask=keep_member)
    empty = num_pages - used
    for page in range(used + split * empty // num_splits, used + (split + 1) * empty // num_splits):
        nothing = tl.full((64, GROUP_PAD), float("-inf"), tl.float32)
        tl.store(out + page * 64, nothing, mask=keep_member[None, :])


@triton.jit(do_not_specialize=["rows", "num_pages"])
def next_latents_kernel(
    pages,
    table,
    latents,
    fields,
    gains,
    innovation,
    transition,
    next_offset,
    lengths,
    following,
    record_bytes,
    rows,
    num_pages,
    num_chunks,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Compute the next latents of PAGES successive pages, of whatever row."""
    TOKENS: tl.constexpr = PAGES * 64
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, 16)
    widths = tl.arange(0, WIDTH)
    page = tl.program_id(0) * PAGES + tokens // 64
    row = page // num_pages
    length = tl.load(lengths + row, mask=row < rows, other=0)
    present = page % num_pages * 64 < length
    # Pages that no token fills have no record; any will do in its place, nothing is stored.
    record = tl.load(table + page, mask=present, other=0).to(tl.int64) * record_bytes
    cells = (record + tokens % 64 * 16)[:, None] + columns[None, :]
    token = page.to(tl.int64) * 64 + tokens % 64
    block = innovation + tl.arange(0, 64)[:, None] * WIDTH + widths[None, :]
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    if num_chunks > 0:
        places, halves = field_words(fields, 0, 4)
        for chunk in range(num_chunks):
            raw = field_bytes(pages, cells, places, 4)
            levels = chunk_levels(raw, places, halves, gains + chunk * 64, 1.0, 0, 4, False, ASM)
            places, halves = field_words(fields, chunk * 4 + 4, 4)
            total = tl.dot(levels, tl.load(block + chunk * (64 * WIDTH)), total)
    scale = token_scale(record_scales(pages + record, record_bytes, tokens % 64))
    total = total * scale[:, None] + tl.load(next_offset + widths)[None, :]
    if RANK:
        ranks = tl.arange(0, RANK)
        latent = tl.load(latents + token[:, None] * RANK + ranks[None, :], mask=present[:, None], other=0.0)
        total = tl.dot(latent, tl.load(transition + ranks[:, None] * WIDTH + widths[None, :]), total)
    place = following + token[:, None] * WIDTH + widths[None, :]
    tl.store(place, total.to(tl.float16), mask=present[:, None])


def scores(
    query: Tensor,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    rotary: PageRotary,
    scaling: float,
    softcap: float | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Launch `scores_kernel`; see `aquakv.kernels.scores.scores`."""
    rows, query_heads, dim = query.shape
    heads, num_pages = operands.num_kv_heads, codes.pages
    group = query_heads // heads
    out = query.new_empty(rows, query_heads, num_pages * PAGE_TOKENS, dtype=torch.float32)
    maxima = query.new_empty(rows, query_heads, num_splits, dtype=torch.float32)
    scores_kernel[(heads * num_splits, rows)](
        query,
        codes.key_pages,
        codes.table,
        latents,
        operands.keys.fields,
        operands.keys.gains,
        operands.keys.first_fields,
        operands.score_synthesis,
        operands.latent_synthesis,
        operands.key_offset,
        rotary.page_cos,
        rotary.page_sin,
        rotary.offset_cos,
        rotary.offset_sin,
        codes.lengths,
        out,
        maxima,
        operands.keys.layout.record_bytes,
        num_pages,
        num_splits,
        scaling,
        softcap if softcap is not None else 1.0,
        HEADS=heads,
        GROUP=group,
        GROUP_PAD=max(8, triton.next_power_of_2(group)),
        DIM=dim,
        ROTARY=operands.rotary_dim,
        RANK=operands.latent_width,
        CHUNKS=chunk_sizes(operands.keys.layout.max_group_fields),
        ROWS=operands.score_synthesis.shape[1],
        SOFTCAP=softcap is not None,
        ASM=not interpreted(),
        num_warps=4 if dim < 256 else 8,
        num_stages=pipeline_stages(query.device, dim),
    )
    return out, maxima


def next_latents(codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands) -> Tensor:
    """Launch `next_latents_kernel`; see `aquakv.kernels.scores.next_latents`."""
    rows, num_pages, width = codes.rows, codes.pages, operands.next_width
    following = codes.key_pages.new_empty(rows, codes.capacity, width, dtype=torch.float16)
    if not len(codes.key_pages):
        return following
    pages_per_block = 2
    next_latents_kernel[(triton.cdiv(rows * num_pages, pages_per_block),)](
        codes.key_pages,
        codes.table,
        latents,
        operands.keys.fields,
        operands.keys.gains,
        operands.innovation,
        operands.transition,
        operands.next_offset,
        codes.lengths,
        following,
        operands.keys.layout.record_bytes,
        rows,
        num_pages,
        operands.keys.chunks,
        RANK=operands.latent_width,
        WIDTH=width,
        PAGES=pages_per_block,
        ASM=not interpreted(),
        num_warps=4,
    )
    return following
