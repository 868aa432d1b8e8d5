"""Definition of reconstructing keys and values from the records of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from aquakv.codec.scalar import SCALES
from aquakv.kernels.pages import FIELD_COLUMNS, record_planes, record_scales, unpack_pages
from aquakv.kernels.reconstruct.operands import FieldTables, ReconstructOperands


def reconstruct(
    key_pages: Tensor,
    value_pages: Tensor,
    latents: Tensor | None,
    operands: ReconstructOperands,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """Return keys and values; see `aquakv.kernels.reconstruct.reconstruct`."""
    dtype, heads = operands.dtype, operands.num_kv_heads
    key_levels, value_levels = (
        scaled_levels(records, tables, dtype)
        for records, tables in ((key_pages, operands.keys), (value_pages, operands.values))
    )
    carried = None if latents is None else latents.to(dtype)
    keys = (operands.key_bias if centred else operands.key_offset).expand(len(key_levels), -1)
    if carried is not None and operands.latent_map is not None:
        keys = keys + carried.float() @ operands.latent_map.float()
    first = (operands.keys.first_fields * FIELD_COLUMNS).tolist()
    own = [
        key_levels[:, first[head] : first[head + 1]].float()
        @ operands.key_synthesis[first[head] : first[head + 1]].float()
        for head in range(heads)
    ]
    keys = (keys + torch.cat(own, 1)).to(dtype)
    inputs = [value_levels]
    if operands.predicts_values:
        inputs = [key_levels, *([] if carried is None else [carried]), value_levels]
    base = operands.value_bias if centred else operands.value_offset
    values = base.float() + torch.cat(inputs, 1).float() @ operands.value_synthesis.float()
    return keys, values.to(dtype)


def scaled_levels(records: Tensor, tables: FieldTables, dtype: torch.dtype) -> Tensor:
    """Return levels times scales, ``[tokens, columns]`` in ``dtype``; 0 in columns without a coefficient."""
    layout = tables.layout
    scales = SCALES.to(records.device)[record_scales(records).long()].flatten()
    widths = torch.tensor(layout.widths, dtype=torch.int64, device=records.device)
    x = unpack_pages(record_planes(records, layout), layout).float() - ((1 << widths) - 1) / 2
    x = torch.cat([x, x.new_zeros(len(x), 1)], 1)[:, tables.slots]
    return (x * (1 + tables.gains.flatten() * x.square()) * scales[:, None]).to(dtype)
