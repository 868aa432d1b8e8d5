"""Attention to the tokens that are held exactly beside the codes, and the two parts under one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ShapeError
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.exact import reference
from aquakv.kernels.launch import on_device_of

__all__ = ["HeldTokens", "attend_exact"]


@dataclass(frozen=True, eq=False)
class HeldTokens:
    """A layer's exact tokens, keys after rotary embedding; all floating tensors of one dtype.

    Attributes
    ----------
    sink_keys, sink_values
        ``[rows, sinks, kv_heads, head_dim]``.
    tail_keys, tail_values
        ``[rows, columns, kv_heads, head_dim]``.
    outlier_keys, outlier_values
        ``[outliers, kv_heads, head_dim]``, of all rows; None if there are none.
    outlier_index
        ``[rows, most]`` int64: which outliers are each row's; None for a single row, which has them all.
    seen
        ``[rows, sinks + columns]`` bool: which of these the new token sees. What the others hold is of no
        matter.
    outliers_seen
        ``[rows, most]`` bool: the same of outliers; None if there are none.
    """

    sink_keys: Tensor
    sink_values: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    outlier_keys: Tensor | None
    outlier_values: Tensor | None
    outlier_index: Tensor | None
    seen: Tensor
    outliers_seen: Tensor | None

    @property
    def most_outliers(self) -> int:
        """Places for outliers of a row."""
        if self.outlier_keys is None:
            return 0
        return len(self.outlier_keys) if self.outlier_index is None else self.outlier_index.shape[1]


def attend_exact(
    query: Tensor,
    held: HeldTokens,
    coded_out: Tensor,
    coded_lse: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from one new token per row to its exact tokens; return attention over these and coded ones.

    Nothing waits for the device.

    Parameters
    ----------
    query
        ``[rows, query_heads, head_dim]``, rotated.
    held
        The exact tokens.
    coded_out, coded_lse
        ``[rows, query_heads, head_dim]`` and ``[rows, query_heads]`` float32 (see `CodedAttention`).
    scaling, softcap
        As for `attend_codes`.
    sink_logits
        ``[query_heads]``: a score that belongs to no token, as some models learn.
    backend
        ``auto`` is Triton on a GPU; it takes a head_dim that is a power of two, and float64 in no case.

    Returns
    -------
    Tensor
        ``[rows, query_heads, head_dim]`` in the query's dtype; zeros for a row that sees nothing.

    Raises
    ------
    ShapeError
        The tensors do not fit each other.
    ConfigError
        The backend cannot run here.
    """
    rows, _, dim = query.shape
    expected = {
        "seen": (held.seen, [rows, held.sink_keys.shape[1] + held.tail_keys.shape[1]]),
        "outliers_seen": (
            held.outliers_seen,
            [rows, held.most_outliers] if held.outlier_keys is not None else None,
        ),
        "coded_out": (coded_out, list(query.shape)),
    }
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else list(tensor.shape)
        if found != shape:
            raise ShapeError(f"exact tokens: expected {name} {shape}, got {found}")
    chosen = resolve_backend("triton" if backend == "hopper" else backend, query)
    if chosen == "torch" or query.dtype == torch.float64 or dim & (dim - 1):
        return reference.attend_exact(query, held, coded_out, coded_lse, scaling, softcap, sink_logits)
    from aquakv.kernels.exact import triton

    with on_device_of(query):
        return triton.attend_exact(query, held, coded_out, coded_lse, scaling, softcap, sink_logits)
