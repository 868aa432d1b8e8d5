"""Definition of the scores of coded keys, and of the next layer's latent."""

from __future__ import annotations

import torch
from torch import Tensor

from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.operands import (
    CodeTables,
    DecodeOperands,
    chunk_sizes,
    rotary_order,
    slot_coefficients,
)
from aquakv.kernels.pages import (
    PAGE_TOKENS,
    level_slopes,
    record_attended,
    record_planes,
    record_scales,
    unpack_pages,
)
from aquakv.kernels.rotary import PageRotary


def token_scales(scale_codes: Tensor) -> Tensor:
    """Return what scale codes (uint8) stand for, float32: 2^((code - 128) / 16), and NaN for 255."""
    scales = ((scale_codes.float() - 128) / 16).exp2()
    return scales.masked_fill(scale_codes == 255, float("nan"))


def code_levels(records: Tensor, tables: CodeTables) -> Tensor:
    """Return ``x * (1 + gain * x**2)`` of every coefficient, ``[rows, tokens, coefficients]`` float32.

    Parameters
    ----------
    records
        ``[rows, pages, record_bytes]`` uint8.
    tables
        Their layout.
    """
    layout = tables.layout
    rows, num_pages = records.shape[:2]
    codes = unpack_pages(record_planes(records, layout).flatten(0, 1), layout)
    codes = codes.view(rows, num_pages * PAGE_TOKENS, layout.coefficients)
    widths = torch.tensor(layout.widths, dtype=torch.int64, device=records.device)
    x = codes.float() - ((1 << widths) - 1) / 2
    return x * (1 + level_slopes(layout)[1].float().to(records.device) * x.square())


def gather_slots(levels: Tensor, slots: Tensor) -> Tensor:
    """Return levels in the order of slots, 0 where a slot has no coefficient."""
    padded = torch.cat([levels, levels.new_zeros(*levels.shape[:-1], 1)], -1)
    return padded[..., slots.where(slots >= 0, levels.shape[-1])]


def scores(
    query: Tensor,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    rotary: PageRotary,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return scores and their maxima; see `aquakv.kernels.scores.scores`."""
    heads, dim, half = operands.num_kv_heads, operands.head_dim, operands.head_dim // 2
    rows, capacity = codes.rows, codes.capacity
    records = codes.gather(codes.key_pages)
    scale_codes = record_scales(records).flatten(1)
    levels = code_levels(records, operands.keys) * token_scales(scale_codes)[..., None]
    layout = operands.keys.layout
    sizes = chunk_sizes(layout.max_group_fields)
    keys = []
    for head in range(heads):
        slots = torch.tensor(slot_coefficients(layout.group_fields(head), sizes), dtype=torch.int64)
        own = gather_slots(levels, slots.to(levels.device)) @ operands.score_synthesis[head].float()
        if operands.latent_synthesis is not None and latents is not None:
            own = own + latents.float() @ operands.latent_synthesis[head].float()
        keys.append(own + operands.key_offset[head])
    first, second = torch.stack(keys, 2).split(half, -1)
    cos, sin = position_tables(rotary, half)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    # The rotated keys are in rotary order; put the query there too.
    order = rotary_order(dim, operands.rotary_dim).to(query.device)
    grouped = query.float()[..., order].view(rows, heads, -1, dim)
    result = torch.einsum("rhgd,rthd->rhgt", grouped, rotated).reshape(rows, -1, capacity) * scaling
    if softcap is not None:
        result = softcap * (result / softcap).tanh()
    keep = torch.arange(capacity, device=query.device) < codes.lengths[:, None]
    keep = keep & record_attended(records).flatten(1)
    result = result.masked_fill(~keep[:, None], float("-inf"))
    return result, result.amax(-1, keepdim=True)


def position_tables(rotary: PageRotary, pairs: int) -> tuple[Tensor, Tensor]:
    """Return every token's cosines and sines, ``[rows, tokens, 1, pairs]``; pairs that stand still last."""
    start_cos, start_sin = rotary.page_cos[:, :, None], rotary.page_sin[:, :, None]
    cos, sin = rotary.offset_cos.float(), rotary.offset_sin.float()
    both = start_cos * cos - start_sin * sin, start_sin * cos + start_cos * sin
    still = pairs - cos.shape[-1]
    rows = len(rotary.page_cos)
    filled = (torch.nn.functional.pad(t, (0, still), value=v) for t, v in zip(both, (1.0, 0.0), strict=True))
    out_cos, out_sin = (t.reshape(rows, -1, 1, pairs) for t in filled)
    return out_cos, out_sin


def next_latents(codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands) -> Tensor:
    """Return the next layer's latents; see `aquakv.kernels.scores.next_latents`."""
    if operands.innovation is None or operands.next_offset is None:
        raise ValueError("next latents: the operands have no innovation")
    records = codes.gather(codes.key_pages)
    levels = gather_slots(code_levels(records, operands.keys), operands.keys.slots)
    following = token_scales(record_scales(records).flatten(1))[..., None] * (
        levels @ operands.innovation.float()
    )
    following = following + operands.next_offset
    if operands.transition is not None and latents is not None:
        following = following + latents.float() @ operands.transition.float()
    return following
