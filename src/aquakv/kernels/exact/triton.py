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

#: Query heads of a KV head are padded to at least so many, the rows of a matrix product.
LEAST_ROWS = 16
#: Splits whose means are asked for at once.
SPLITS_TOGETHER = 8


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
    outliers_seen,
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
    SOFTCAP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Attend to TOKENS tokens of a row with the query heads of one KV head.

    Keys and values are multiplied as they are held, sums are float32. Weights are rounded to the values'
    dtype and multiplied, and so is what that leaves of them.
    """
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, PADDED)
    coordinate = tl.arange(0, DIM)
    query_head = (row * KV_HEADS + head) * GROUP + member
    real = member < GROUP
    asked = tl.load(query + query_head[:, None] * DIM + coordinate[None, :], mask=real[:, None], other=0.0)
    count = sinks + columns
    token = split * TOKENS + tl.arange(0, TOKENS)
    visible = tl.load(seen + row * count + token, mask=token < count, other=0) != 0
    is_sink = token < sinks
    # From one token's vector to the next one's.
    step: tl.constexpr = KV_HEADS * DIM
    at = tl.where(is_sink, row * sinks + token, row * columns + token - sinks).to(tl.int64)
    key_base = tl.where(is_sink, sink_keys, tail_keys)
    value_base = tl.where(is_sink, sink_values, tail_values)
    if OUTLIERS:
        number = token - count
        is_outlier = number >= 0
        present = tl.load(outliers_seen + row * most + number, mask=is_outlier & (number < most), other=0)
        visible = visible | (present != 0)
        if INDEXED:
            which = tl.load(outlier_index + row * most + number, mask=visible & is_outlier, other=0)
            at = tl.where(is_outlier, which, at)
        else:
            at = tl.where(is_outlier, number.to(tl.int64), at)
        key_base = tl.where(is_outlier, outlier_keys, key_base)
        value_base = tl.where(is_outlier, outlier_values, value_base)
    place = (at * step + head * DIM)[:, None] + coordinate[None, :]
    # Whatever an unseen token holds is not loaded.
    key = tl.load(key_base[:, None] + place, mask=visible[:, None], other=0.0)
    value = tl.load(value_base[:, None] + place, mask=visible[:, None], other=0.0)
    if asked.dtype == tl.float32:
        key = key.to(tl.float32)
    score = scaling * tl.dot(asked.to(key.dtype), tl.trans(key), input_precision="ieee")
    if SOFTCAP:
        score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    score = tl.where(visible[None, :], score, float("-inf"))
    largest = tl.max(score, axis=1)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(score - finite[:, None])
    total = tl.sum(weight, axis=1)
    rounded = weight.to(value.dtype)
    mean = tl.dot(rounded, value, input_precision="ieee")
    if value.dtype != tl.float32:
        mean = tl.dot((weight - rounded.to(tl.float32)).to(value.dtype), value, mean)
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
    TOGETHER: tl.constexpr,
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
    for first in range(0, splits, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        here = some < splits
        own = tl.exp(tl.load(maxima + head * splits + some, mask=here, other=float("-inf")) - highest)
        place = (head * splits + some)[:, None] * DIM + coordinate[None, :]
        summed += tl.sum(own[:, None] * tl.load(means + place, mask=here[:, None], other=0.0), axis=0)
    # A row that sees nothing gets zeros.
    summed = summed / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * DIM + coordinate, summed.to(out.dtype.element_ty))


def program_tokens(dim: int, element_bytes: int) -> int:
    """Return how many tokens a program takes: 16 KiB of keys, and at least a matrix product's 16."""
    return max(16, min(64, 16384 // (dim * element_bytes)))


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
    tokens = program_tokens(dim, held.tail_keys.element_size())
    splits = triton.cdiv(held.seen.shape[1] + most, tokens)
    group = query_heads // kv_heads
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
        held.seen if held.outliers_seen is None else held.outliers_seen.contiguous(),
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
        PADDED=max(LEAST_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        TOKENS=tokens,
        SOFTCAP=softcap is not None,
        OUTLIERS=some,
        INDEXED=held.outlier_index is not None,
        num_warps=4,
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
        TOGETHER=SPLITS_TOGETHER,
        SINK=sink_logits is not None,
        num_warps=2,
    )
    return out
