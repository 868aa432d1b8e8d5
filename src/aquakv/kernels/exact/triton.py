"""Triton kernels of attention to exact tokens beside coded ones."""

# Compile-time constants are upper case, as everywhere in Triton, whose types do not describe launches.
# ruff: noqa: N803
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from aquakv.kernels.exact import HeldTokens

#: Tokens of a program, and how many of them it has in registers at a time.
PROGRAM_TOKENS = 64
BLOCK_TOKENS = 16


@triton.jit(do_not_specialize=["sinks", "columns", "most", "splits"])
def partial_attention_kernel(
    query,
    sink_keys,
    sink_values,
    tail_keys,
    tail_values,
    outlier_keys,
    outlier_values,
    outlier_index,
    seen,
    means,
    maxima,
    totals,
    scaling,
    softcap,
    sinks,
    columns,
    most,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Attend to TOKENS tokens of a row with the query heads of one KV head, all in float32."""
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, PADDED)
    coordinate = tl.arange(0, DIM)
    query_head = (row * KV_HEADS + head) * GROUP + member
    real = member < GROUP
    asked = tl.load(
        query + query_head[:, None] * DIM + coordinate[None, :], mask=real[:, None], other=0.0
    ).to(tl.float32)
    asked *= scaling
    count = sinks + columns + most
    largest = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    mean = tl.zeros((PADDED, DIM), tl.float32)
    for first in range(0, TOKENS, BLOCK):
        token = split * TOKENS + first + tl.arange(0, BLOCK)
        present = token < count
        visible = tl.load(seen + row * count + token, mask=present, other=0) != 0
        is_sink = visible & (token < sinks)
        is_tail = visible & (token >= sinks) & (token < sinks + columns)
        sink = ((row * sinks + token).to(tl.int64) * KV_HEADS + head)[:, None] * DIM + coordinate[None, :]
        tail = ((row * columns + token - sinks).to(tl.int64) * KV_HEADS + head)[:, None] * DIM
        tail += coordinate[None, :]
        key = tl.load(sink_keys + sink, mask=is_sink[:, None], other=0.0).to(tl.float32)
        key += tl.load(tail_keys + tail, mask=is_tail[:, None], other=0.0).to(tl.float32)
        value = tl.load(sink_values + sink, mask=is_sink[:, None], other=0.0).to(tl.float32)
        value += tl.load(tail_values + tail, mask=is_tail[:, None], other=0.0).to(tl.float32)
        if OUTLIERS:
            number = (token - sinks - columns).to(tl.int64)
            is_outlier = visible & (number >= 0)
            if INDEXED:
                number = tl.load(outlier_index + row * most + number, mask=is_outlier, other=0)
            outlier = (number * KV_HEADS + head)[:, None] * DIM + coordinate[None, :]
            key += tl.load(outlier_keys + outlier, mask=is_outlier[:, None], other=0.0).to(tl.float32)
            value += tl.load(outlier_values + outlier, mask=is_outlier[:, None], other=0.0).to(tl.float32)
        score = tl.sum(asked[:, None, :] * key[None, :, :], axis=2)
        if SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        score = tl.where(visible[None, :], score, float("-inf"))
        highest = tl.maximum(largest, tl.max(score, axis=1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp(score - finite[:, None])
        shrunk = tl.exp(largest - finite)
        total = total * shrunk + tl.sum(weight, axis=1)
        mean = mean * shrunk[:, None] + tl.sum(weight[:, :, None] * value[None, :, :], axis=1)
        largest = highest
    cell = query_head * splits + split
    tl.store(maxima + cell, largest, mask=real)
    tl.store(totals + cell, total, mask=real)
    tl.store(means + cell[:, None] * DIM + coordinate[None, :], mean, mask=real[:, None])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    means,
    maxima,
    totals,
    coded_out,
    coded_lse,
    sink_logits,
    out,
    splits,
    QUERY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SINK: tl.constexpr,
):
    """Put the splits and the coded tokens' part of one query head together."""
    head = tl.program_id(1) * QUERY_HEADS + tl.program_id(0)
    coordinate = tl.arange(0, DIM)
    part = tl.arange(0, SPLITS)
    present = part < splits
    lse = tl.load(coded_lse + head)
    largest = tl.load(maxima + head * splits + part, mask=present, other=float("-inf"))
    highest = tl.maximum(tl.max(largest, axis=0), lse)
    if SINK:
        logit = tl.load(sink_logits + tl.program_id(0)).to(tl.float32)
        highest = tl.maximum(highest, logit)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    share = tl.exp(largest - highest)
    coded = tl.exp(lse - highest)
    total = tl.sum(share * tl.load(totals + head * splits + part, mask=present, other=0.0), axis=0) + coded
    if SINK:
        total += tl.exp(logit - highest)
    summed = tl.load(coded_out + head * DIM + coordinate) * coded
    for i in range(splits):
        one = tl.exp(tl.load(maxima + head * splits + i) - highest)
        summed += one * tl.load(means + (head * splits + i) * DIM + coordinate)
    # A row that sees nothing gets zeros.
    summed = summed / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * DIM + coordinate, summed.to(out.dtype.element_ty))


def attend_exact(
    query: Tensor,
    held: HeldTokens,
    coded_out: Tensor,
    coded_lse: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Launch both kernels; see `aquakv.kernels.exact.attend_exact`."""
    rows, query_heads, dim = query.shape
    _, columns, kv_heads, _ = held.tail_keys.shape
    sinks, most = held.sink_keys.shape[1], held.most_outliers
    splits = triton.cdiv(held.seen.shape[1], PROGRAM_TOKENS)
    group = query_heads // kv_heads
    padded = triton.next_power_of_2(group)
    means = query.new_empty(rows, query_heads, splits, dim, dtype=torch.float32)
    maxima, totals = (query.new_empty(rows, query_heads, splits, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    some = held.outlier_keys is not None and held.outlier_values is not None
    partial_attention_kernel[(kv_heads, rows, splits)](
        query.contiguous(),
        held.sink_keys.contiguous(),
        held.sink_values.contiguous(),
        held.tail_keys.contiguous(),
        held.tail_values.contiguous(),
        held.outlier_keys if some else held.tail_keys,
        held.outlier_values if some else held.tail_values,
        held.seen if held.outlier_index is None else held.outlier_index,
        held.seen.contiguous(),
        means,
        maxima,
        totals,
        float(scaling),
        float(softcap or 1.0),
        sinks,
        columns,
        most,
        splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED=padded,
        DIM=dim,
        TOKENS=PROGRAM_TOKENS,
        BLOCK=BLOCK_TOKENS,
        SOFTCAP=softcap is not None,
        OUTLIERS=some,
        INDEXED=held.outlier_index is not None,
        num_warps=4 if padded * dim <= 512 else 8,
    )
    merge_kernel[(query_heads, rows)](
        means,
        maxima,
        totals,
        coded_out.contiguous(),
        coded_lse.contiguous(),
        coded_lse if sink_logits is None else sink_logits,
        out,
        splits,
        QUERY_HEADS=query_heads,
        DIM=dim,
        SPLITS=triton.next_power_of_2(splits),
        SINK=sink_logits is not None,
        num_warps=2,
    )
    return out
