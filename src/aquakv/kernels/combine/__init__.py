"""From sums of codes to the attention output of the coded tokens."""

from __future__ import annotations

from torch import Tensor

from aquakv.errors import ShapeError
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.combine import reference
from aquakv.kernels.launch import on_device_of
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.weighted_code_sum import CodeSums

__all__ = ["combine"]


def combine(
    summed: CodeSums, maxima: Tensor, operands: DecodeOperands, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge splits and multiply with the layer's epilogue.

    Parameters
    ----------
    summed
        Sums and normalisers of the splits.
    maxima
        ``[rows, query_heads, splits of the scores]`` float32, as they came with the scores.
    operands, backend
        As for `aquakv.kernels.scores.scores`.

    Returns
    -------
    out, lse
        ``[rows, query_heads, head_dim]`` float32, attention over the coded tokens alone, and the logarithm of
        the sum of the exponentials of its scores, ``[rows, query_heads]`` float32: with the same two of other
        tokens it gives attention over both. A row without tokens has 0 and -inf.

    Raises
    ------
    ShapeError
        The sums do not fit the operands.
    ConfigError
        The backend cannot run here.
    """
    chosen = resolve_backend(backend, maxima)
    if summed.sums.shape[2] != operands.epilogue.shape[2]:
        raise ShapeError(
            f"combine: expected sums of {operands.epilogue.shape[2]} slots, got {summed.sums.shape[2]}"
        )
    if chosen == "torch":
        return reference.combine(*summed, maxima, operands)
    from aquakv.kernels.combine import triton

    with on_device_of(maxima):
        return triton.combine(*summed, maxima, operands)
