"""The codes of one layer's tokens, as the decode kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ShapeError
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.pages import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class PagedCodes:
    """Codes of one layer, for a batch of rows of unequal length.

    Attributes
    ----------
    key_pages, value_pages
        ``[records, record_bytes]`` uint8, from `aquakv.kernels.pages.pack_records`, in any order.
    table
        ``[rows, pages]`` int32: the record, of keys and of values, that holds each page of a row. A row's
        tokens fill its pages from the first on; entries of pages beyond a row's length may be anything.
    lengths
        ``[rows]`` int32: tokens of each row. What a record holds beyond them is never used.

    All are on one device.
    """

    key_pages: Tensor
    value_pages: Tensor
    table: Tensor
    lengths: Tensor

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.table.shape[0]

    @property
    def pages(self) -> int:
        """Pages of every row."""
        return self.table.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that fit each row's pages."""
        return self.pages * PAGE_TOKENS

    def gather(self, records: Tensor) -> Tensor:
        """Return the rows' records, ``[rows, pages, record_bytes]``; arbitrary ones beyond the lengths."""
        pages = torch.arange(self.pages, device=self.table.device)
        used = pages * PAGE_TOKENS < self.lengths[:, None]
        if not len(records):
            return records.new_zeros(self.rows, self.pages, records.shape[1])
        return records[self.table.where(used, 0).long()]

    def check(self, operands: DecodeOperands) -> None:
        """Raise `ShapeError` unless the codes fit a layer's operands."""
        rows, pages, records = self.rows, self.pages, len(self.key_pages)
        for name, tensor, shape, dtype in (
            ("key_pages", self.key_pages, (records, operands.keys.layout.record_bytes), torch.uint8),
            ("value_pages", self.value_pages, (records, operands.values.layout.record_bytes), torch.uint8),
            ("table", self.table, (rows, pages), torch.int32),
            ("lengths", self.lengths, (rows,), torch.int32),
        ):
            check_tensor(f"paged codes: {name}", tensor, shape, (dtype,))


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise `ShapeError` unless a tensor is contiguous and of the given shape and one of the dtypes."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(
            f"{name}: expected contiguous {wanted} {list(shape)}, got "
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {tensor.stride()}"
        )
