"""Definition of encoding: what is rounded where, and which codes follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.codec.scalar import CODE_OF_ONE, NOT_FINITE, SCALES, scale_codes
from aquakv.kernels.encode.columns import TABLE_ROWS, CodeColumns
from aquakv.kernels.encode.operands import EncodeOperands
from aquakv.kernels.pages import pack_records
from aquakv.numerics import nearest_cubic_level


class Quantised(NamedTuple):
    """What becomes of columns of coefficients.

    Attributes
    ----------
    codes
        ``[tokens, coefficients]`` uint8.
    scales
        ``[tokens]`` uint8: scale codes.
    levels
        ``[tokens, slots]`` in the operands' dtype: ``x * (1 + gain * x**2)``.
    excess
        ``[tokens]`` float32: squared error over the guard's limit.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    excess: Tensor


def encode(
    keys: Tensor, values: Tensor, latents: Tensor | None, operands: EncodeOperands
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the records, the next latents and the excess; see `aquakv.kernels.encode.encode`."""
    dtype = operands.dtype
    carried = None if latents is None else latents.to(dtype)
    found = quantise(key_columns(keys, carried, operands), operands.keys)
    scale = token_scale(found.scales)
    own = [narrow((values.float() - operands.value_offset) * operands.value_unit, dtype)]
    if operands.predicts_values:
        predicting = [] if carried is None else [carried]
        own = [found.levels * scale.to(dtype)[:, None], *predicting, *own]
    columns = narrow(torch.cat(own, 1).float() @ operands.value_analysis.float(), dtype)
    value_found = quantise(columns, operands.values)
    following = None
    if operands.innovation is not None and operands.next_offset is not None:
        following = scale[:, None] * (found.levels.float() @ operands.innovation.float())
        following = following + operands.next_offset
        if operands.transition is not None and carried is not None:
            following = following + carried.float() @ operands.transition.float()
        following = following.to(dtype)
    return (
        pack_records(found.codes, found.scales, operands.keys.layout),
        pack_records(value_found.codes, value_found.scales, operands.values.layout),
        following,
        torch.maximum(found.excess, value_found.excess) if operands.guarded else None,
    )


def key_columns(keys: Tensor, latents: Tensor | None, operands: EncodeOperands) -> Tensor:
    """Return the keys' coefficients, ``[tokens, columns]`` in the operands' dtype.

    ``latents`` are in that dtype.
    """
    residual = keys.float() - operands.key_offset
    if latents is not None and operands.latent_map is not None:
        residual = residual - latents.float() @ operands.latent_map.float()
    own = narrow(residual * operands.key_unit, operands.dtype).float()
    own = own.view(len(keys), operands.num_kv_heads, -1).transpose(0, 1) @ operands.key_analysis.float()
    counts = operands.keys.first_columns.diff().tolist()
    return narrow(torch.cat([c[:, :n] for c, n in zip(own, counts, strict=True)], 1), operands.dtype)


def narrow(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to a dtype; what exceeds its range to its largest number, infinity to not-a-number."""
    limit = torch.finfo(dtype).max
    return numbers.masked_fill(~numbers.isfinite(), float("nan")).clamp(-limit, limit).to(dtype)


def token_scale(scales: Tensor) -> Tensor:
    """Return what scale codes stand for, float32."""
    return SCALES.to(scales.device)[scales.long()]


def quantise(columns: Tensor, described: CodeColumns) -> Quantised:
    """Quantise columns ``[tokens, columns]`` in the operands' dtype."""
    tokens, dtype = len(columns), columns.dtype
    by_coefficient = columns.new_zeros(tokens, described.layout.coefficients, dtype=torch.float32)
    fields = sorted(described.layout.fields, key=lambda f: (f.plane, f.shift))
    for f, (_, start) in zip(fields, described.fields[: len(fields)].tolist(), strict=True):
        chosen = torch.tensor(f.coefficients, device=columns.device)
        by_coefficient[:, chosen] = columns[:, start : start + len(f.coefficients)].float()
    coded = by_coefficient[:, [w > 0 for w in described.layout.widths]]
    scales = columns.new_full((tokens, 1), CODE_OF_ONE, dtype=torch.uint8)
    if described.coefficients:
        scales = scale_codes(coded)
    lost = scales == NOT_FINITE
    relative = torch.where(lost, 0.0, by_coefficient * (1 / token_scale(scales)))
    codes = torch.zeros_like(by_coefficient, dtype=torch.uint8)
    for i, width in enumerate(described.layout.widths):
        if width:
            codes[:, i] = nearest_cubic_level(relative[:, i].contiguous(), width)
    widths = torch.tensor(described.layout.widths, dtype=torch.int64, device=columns.device)
    x = (codes.float() - ((1 << widths) - 1) / 2) * (widths > 0)
    slot_x = torch.cat([x, x.new_zeros(tokens, 1)], 1)[:, described.slots].to(dtype)
    table = dict(zip(TABLE_ROWS, described.table.transpose(0, 1).flatten(1), strict=True))
    gain = table["gain"].to(dtype)
    levels = slot_x * (slot_x * slot_x * gain + 1)
    # The error of the coded, then what the others are.
    actual = torch.cat([by_coefficient, by_coefficient.new_zeros(tokens, 1)], 1)[:, described.slots]
    error = actual - levels.float() * (table["slope"] * token_scale(scales))
    excess = (error * table["weight"]).square().sum(1)
    excess = excess + (columns.float() * described.rest).square().sum(1)
    return Quantised(codes, scales[:, 0], levels, excess)
