"""What competitors keep of tokens: packed codes, scales, outliers; tokens first, so that runs join."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aquakv.cache.records import storage_bytes


@dataclass(frozen=True)
class SparseValues:
    """A varying number of values of each token that are kept beside its codes.

    Attributes
    ----------
    counts
        ``[tokens, rows]`` int16: how many values each token has.
    index
        ``[n]`` int16, read as unsigned: which feature, token by token, row by row.
    values
        ``[n]`` float16.
    """

    counts: Tensor
    index: Tensor
    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.counts, self.index, self.values

    def put_into(self, dense: Tensor) -> None:
        """Overwrite the features kept, in a contiguous ``dense`` of ``[tokens, rows, features]``."""
        features = dense.shape[-1]
        vector = torch.repeat_interleave(self.counts.flatten().long())
        place = vector * features + (self.index.long() & 0xFFFF)
        dense.view(-1)[place] = self.values.to(dense.dtype)

    def select(self, rows: Tensor) -> SparseValues:
        """Return the same of other rows."""
        dense_rows = self.counts.shape[1]
        vector = torch.repeat_interleave(self.counts.flatten().long())
        token, row = vector // dense_rows, vector % dense_rows
        order = [(row == chosen).nonzero().flatten() for chosen in rows.tolist()]
        found = torch.cat(order)
        new_row = torch.repeat_interleave(torch.tensor([len(part) for part in order], device=found.device))
        found = found[torch.argsort(token[found] * len(order) + new_row, stable=True)]
        return SparseValues(self.counts[:, rows], self.index[found], self.values[found])


@dataclass(frozen=True)
class Encoded:
    """A run of tokens at one layer, keys or values.

    Attributes
    ----------
    codes, scales
        Tensors ``[units, rows, …]``; a unit is a token, or as many as share a scale. Scales are all numbers
        that codes are multiplied with or added to.
    outliers
        What is kept beside the codes.
    """

    codes: tuple[Tensor, ...]
    scales: tuple[Tensor, ...] = ()
    outliers: SparseValues | None = None

    @property
    def code_bytes(self) -> int:
        """Bytes held for codes."""
        return storage_bytes(*self.codes)

    @property
    def scale_bytes(self) -> int:
        """Bytes held for scales, zero points and norms."""
        return storage_bytes(*self.scales)

    @property
    def outlier_bytes(self) -> int:
        """Bytes held for outliers, with their places."""
        return 0 if self.outliers is None else storage_bytes(*self.outliers.tensors)

    def select(self, rows: Tensor) -> Encoded:
        """Return the same of other rows."""
        outliers = None if self.outliers is None else self.outliers.select(rows)
        return Encoded(
            tuple(codes[:, rows] for codes in self.codes),
            tuple(scales[:, rows] for scales in self.scales),
            outliers,
        )


def join(runs: Sequence[Encoded]) -> Encoded:
    """Return runs of tokens as one, in storages of its own."""
    if len(runs) == 1:
        return runs[0]
    kept = [run.outliers for run in runs if run.outliers is not None]
    return Encoded(
        _joined(run.codes for run in runs),
        _joined(run.scales for run in runs),
        SparseValues(*_joined(one.tensors for one in kept)) if kept else None,
    )


def _joined(tensors: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*tensors, strict=True))


class TensorCoder(Protocol):
    """Encodes the keys, or the values, of one layer."""

    def encode(self, states: Tensor) -> Encoded:
        """Encode ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        ...

    def decode(self, encoded: Encoded) -> Tensor:
        """Return what is stored, ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        ...
