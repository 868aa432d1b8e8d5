"""The attention that columns receive, beside a model's own attention and whatever computes that."""

from __future__ import annotations

import torch
from torch import Tensor

#: Weights, float32, that are computed at once.
MOST_WEIGHTS = 2**24


def attention_received(
    query: Tensor,
    keys: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return the attention weights that columns get from the queries of the last ones.

    Parameters
    ----------
    query
        ``[rows, num_attention_heads, queries, head_dim]`` of the last columns, after rotary embedding.
    keys
        ``[rows, num_kv_heads, columns, head_dim]`` after rotary embedding.
    visible
        ``[rows or 1, heads or 1, queries or 1, columns]`` bool: what the mask lets a query see; a query sees
        no later columns in any case.
    scaling, softcap, sink_logits
        Of the scores, as for `CodedView.attend`.

    Returns
    -------
    Tensor
        ``[rows, columns]`` float32: sums over heads and queries. Computed a few queries at a time.
    """
    rows, heads, queries, dim = query.shape
    kv_heads, columns = keys.shape[1:3]
    keys = keys.float().transpose(2, 3)
    received = keys.new_zeros(rows, columns)
    column = torch.arange(columns, device=keys.device)
    step = max(1, MOST_WEIGHTS // max(1, rows * heads * columns))
    for first in range(0, queries, step):
        part = slice(first, min(first + step, queries))
        asked = query[:, :, part].float() * scaling
        count = asked.shape[2]
        scores = (asked.reshape(rows, kv_heads, -1, dim) @ keys).view(rows, heads, count, columns)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        own = column[columns - queries + first : columns - queries + first + count]
        seen = (column <= own[:, None]) & (visible if visible.shape[2] == 1 else visible[:, :, part])
        scores = scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
        if sink_logits is not None:
            sink = sink_logits.to(scores).view(1, heads, 1, 1).expand(rows, -1, count, -1)
            scores = torch.cat([scores, sink], 3)
        weights = scores.softmax(-1)[..., :columns].mul_(seen)
        received += weights.sum((1, 2))
    return received
