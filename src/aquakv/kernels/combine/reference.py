"""Definition of the attention output that sums of codes stand for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aquakv.kernels.operands import DecodeOperands


def combine(
    sums: Tensor, normalizers: Tensor, maxima: Tensor, operands: DecodeOperands
) -> tuple[Tensor, Tensor]:
    """Return the output and its log-sum-exp; see `aquakv.kernels.combine.combine`."""
    rows, query_heads, _ = maxima.shape
    heads = operands.num_kv_heads
    total = sums.sum(1)[..., :query_heads]
    normalizer = normalizers.sum(1)[..., :query_heads]
    means = (total / normalizer[:, None]).view(rows, -1, heads, query_heads // heads)
    out = torch.einsum("rkhg,hdk->rhgd", means, operands.epilogue.float())
    out = (out + operands.epilogue_offset[:, None]).flatten(1, 2)
    out = out.masked_fill(normalizer[..., None] == 0, 0)
    return out, maxima.amax(-1) + normalizer.log() - math.log(64)
