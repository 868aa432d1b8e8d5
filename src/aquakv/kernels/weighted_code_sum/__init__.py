"""Sums of key codes, value codes and latents, weighted by the softmax of scores."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.codes import PagedCodes
from aquakv.kernels.launch import on_device_of, splits_for
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.scores import Scores
from aquakv.kernels.weighted_code_sum import reference

__all__ = ["CodeSums", "weighted_code_sum"]


class CodeSums(NamedTuple):
    """Sums over each split of the tokens, relative to the maximum over all of them.

    With weights ``w = 64 exp(score - maximum)``; the factor keeps small weights out of float16's subnormals.

    Attributes
    ----------
    sums
        ``[rows, splits, slots, padded_heads]`` float32: ``w * scale * level`` of every key slot, then every
        value slot, then ``w * latent``. Query heads last; those beyond ``query_heads`` are undefined.
    normalizers
        ``[rows, splits, padded_heads]`` float32: sums of w.
    """

    sums: Tensor
    normalizers: Tensor


def weighted_code_sum(
    scored: Scores,
    codes: PagedCodes,
    latents: Tensor | None,
    operands: DecodeOperands,
    *,
    backend: Backend = "auto",
) -> CodeSums:
    """Sum codes and latents over the tokens, weighted for every query head.

    All heads' key codes count for every query head, because the values' predictor reads all heads' keys.

    Parameters
    ----------
    scored
        Scores and their maxima. Every split is relative to the maximum over all tokens, which is known by
        then, so splits merge by adding up.
    codes, latents, operands, backend
        As for `aquakv.kernels.scores.scores`.

    Raises
    ------
    ShapeError
        A tensor does not fit the operands.
    ConfigError
        The backend cannot run here.
    """
    chosen = resolve_backend(backend, scored.scores)
    codes.check(operands)
    if chosen == "torch":
        return CodeSums(*reference.weighted_code_sum(scored.scores, scored.maxima, codes, latents, operands))
    from aquakv.kernels.weighted_code_sum import triton

    _, key_slabs, value_slabs = triton.slabs(operands.keys.chunks, operands.values.chunks)
    programs = codes.rows * (key_slabs + value_slabs + 1) * triton.head_blocks(scored.scores.shape[1])
    splits = splits_for(scored.scores.device, programs, codes.pages, 2)
    with on_device_of(scored.scores):
        return CodeSums(*triton.weighted_code_sum(*scored, codes, latents, operands, splits))
