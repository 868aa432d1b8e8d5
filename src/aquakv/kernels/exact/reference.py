"""Definition of attention to exact tokens beside coded ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aquakv.kernels.exact import HeldTokens


def attend_exact(
    query: Tensor,
    held: HeldTokens,
    coded_out: Tensor,
    coded_lse: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend in float32, or in float64 for such queries; see `aquakv.kernels.exact.attend_exact`."""
    rows, heads, dim = query.shape
    kv_heads = held.tail_keys.shape[2]
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = [held.sink_keys, held.tail_keys], [held.sink_values, held.tail_values]
    for parts, vectors in ((keys, held.outlier_keys), (values, held.outlier_values)):
        if vectors is not None:
            parts.append(vectors[None] if held.outlier_index is None else vectors[held.outlier_index])
    grouped = (query.to(precise) * scaling).reshape(rows, kv_heads, -1, dim)
    scores = grouped @ torch.cat(keys, 1).permute(0, 2, 3, 1).to(precise)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = held.seen if held.outliers_seen is None else torch.cat([held.seen, held.outliers_seen], 1)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = coded_lse.to(precise).view(rows, kv_heads, -1, 1)
    highest = torch.maximum(scores.amax(-1, keepdim=True), lse)
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(precise).view(1, kv_heads, -1, 1)
        highest = torch.maximum(highest, sink)
    # A row that is nothing but padding sees nothing; it gets zeros and nobody reads it.
    highest = highest.clamp(min=torch.finfo(precise).min)
    weights, share = (scores - highest).exp_(), (lse - highest).exp_()
    total = weights.sum(-1, keepdim=True) + share
    if sink is not None:
        total = total + (sink - highest).exp()
    total = total.clamp(min=torch.finfo(precise).tiny)
    # Whatever an unseen token holds, nothing times it must be nothing.
    seen_values = torch.cat(values, 1).masked_fill(~seen[:, :, None, None], 0)
    out = (weights / total) @ seen_values.transpose(1, 2).to(precise)
    out = out + coded_out.to(precise).view(rows, kv_heads, -1, dim) * (share / total)
    return out.reshape(rows, heads, dim).to(query.dtype)
