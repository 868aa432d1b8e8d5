"""Definition of the sums of codes, weighted by the softmax of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.pages import record_scales
from aquakv.kernels.scores.reference import code_levels, gather_slots, token_scales


def weighted_code_sum(
    scores: Tensor, maxima: Tensor, codes: PagedCodes, latents: Tensor | None, operands: DecodeOperands
) -> tuple[Tensor, Tensor]:
    """Return sums and normalisers; see `aquakv.kernels.weighted_code_sum.weighted_code_sum`."""
    largest = maxima.amax(-1, keepdim=True)
    weights = 64 * (scores - largest.masked_fill(largest.isinf(), 0)).exp()
    # What is not attended to may have no scale and no latent: nothing times nothing must be nothing.
    unseen = (weights == 0).all(1)[..., None]
    parts = []
    for pages, tables in ((codes.key_pages, operands.keys), (codes.value_pages, operands.values)):
        records = codes.gather(pages)
        levels = gather_slots(code_levels(records, tables), tables.slots)
        scales = token_scales(record_scales(records).flatten(1))
        parts.append((levels * scales[..., None]).masked_fill(unseen, 0))
    if latents is not None and operands.latent_width:
        parts.append(latents.float().masked_fill(unseen, 0))
    vectors = torch.cat(parts, -1)
    sums = torch.einsum("rht,rtk->rkh", weights, vectors)
    return sums[:, None], weights.sum(-1)[:, None]
