"""Triton kernels of the attention output that sums of codes stand for."""

# Compile-time constants are upper case, as everywhere in Triton; its tuples grow by concatenation. Its types
# describe neither launches nor what it makes of loops and tuples.
# ruff: noqa: N803
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquakv.kernels.operands import DecodeOperands

#: Slots that a program merges: few, so that there are enough programs.
MERGED_SLOTS = 4


@triton.jit(do_not_specialize=["num_splits", "num_maxima"])
def merge_splits_kernel(
    sums,
    normalizers,
    maxima,
    means,
    lse,
    num_splits,
    num_maxima,
    query_heads,
    padded_heads,
    slots,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Add the splits of some slots up and divide by the normalisers."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = tl.program_id(2)
    keep = (slot < slots)[:, None] & (heads < query_heads)[None, :]
    # Eight splits at once: what takes time is waiting for loads.
    eight = tl.arange(0, 8)
    block = sums + slot[None, :, None] * padded_heads + heads[None, None, :]
    total = tl.zeros((SLOTS, HEADS), tl.float32)
    normalizer = tl.zeros((HEADS,), tl.float32)
    for first in range(0, num_splits, 8):
        present = first + eight < num_splits
        cell = row * num_splits + first + eight
        part = tl.load(
            block + (cell.to(tl.int64) * slots * padded_heads)[:, None, None],
            mask=present[:, None, None] & keep[None, :, :],
            other=0.0,
        )
        total += tl.sum(part, axis=0)
        share = normalizers + cell[:, None] * padded_heads + heads[None, :]
        normalizer += tl.sum(tl.load(share, mask=present[:, None], other=0.0), axis=0)
    out = row * query_heads + heads
    mean = total / tl.where(normalizer > 0.0, normalizer, 1.0)[None, :]
    tl.store(means + out[None, :] * slots + slot[:, None], mean.to(tl.float16), mask=keep)
    if tl.program_id(0) == 0:
        largest = tl.full((HEADS,), float("-inf"), tl.float32)
        for i in range(num_maxima):
            part = tl.load(maxima + out * num_maxima + i, mask=heads < query_heads, other=float("-inf"))
            largest = tl.maximum(largest, part)
        tl.store(lse + out, largest + tl.log(normalizer) - 4.1588830833596715, mask=heads < query_heads)


@triton.jit(do_not_specialize=["columns"])
def epilogue_kernel(
    means,
    lse,
    epilogue,
    offset,
    out,
    columns,
    slots,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Multiply means with one KV head's epilogue: BLOCK coordinates of 16 (row, query head) pairs."""
    head = tl.program_id(0)
    coordinates = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * 16 + tl.arange(0, 16)
    keep = column < columns
    query_head = (column // GROUP * KV_HEADS + head) * GROUP + column % GROUP
    total = tl.zeros((BLOCK, 16), tl.float32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        present = slot < slots
        left = tl.load(
            epilogue + (head * DIM + coordinates[:, None]) * slots + slot[None, :],
            mask=present[None, :],
            other=0.0,
        )
        right = tl.load(
            means + query_head[None, :] * slots + slot[:, None],
            mask=present[:, None] & keep[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    seen = tl.load(lse + query_head, mask=keep, other=float("-inf")) > float("-inf")
    total = tl.where(seen[None, :], total + tl.load(offset + head * DIM + coordinates)[:, None], 0.0)
    tl.store(out + query_head[None, :] * DIM + coordinates[:, None], total, mask=keep[None, :])


def combine(
    sums: Tensor, normalizers: Tensor, maxima: Tensor, operands: DecodeOperands
) -> tuple[Tensor, Tensor]:
    """Launch `merge_splits_kernel` and `epilogue_kernel`; see `aquakv.kernels.combine.combine`."""
    rows, num_splits, slots, padded_heads = sums.shape
    query_heads = maxima.shape[1]
    heads, dim = operands.num_kv_heads, operands.head_dim
    group = query_heads // heads
    means = sums.new_empty(rows, query_heads, slots, dtype=torch.float16)
    lse = sums.new_empty(rows, query_heads)
    out = sums.new_empty(rows, query_heads, dim)
    merge_heads = min(32, padded_heads)
    merge_splits_kernel[
        (max(1, triton.cdiv(slots, MERGED_SLOTS)), triton.cdiv(padded_heads, merge_heads), rows)
    ](
        sums,
        normalizers,
        maxima,
        means,
        lse,
        num_splits,
        maxima.shape[2],
        query_heads,
        padded_heads,
        slots,
        HEADS=merge_heads,
        SLOTS=MERGED_SLOTS,
        num_warps=4,
    )
    block = 16
    epilogue_kernel[(heads, dim // block, triton.cdiv(rows * group, 16))](
        means,
        lse,
        operands.epilogue,
        operands.epilogue_offset,
        out,
        rows * group,
        slots,
        KV_HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK=block,
        SLOTS=128,
        num_warps=4,
        num_stages=4,
    )
    return out, lse
