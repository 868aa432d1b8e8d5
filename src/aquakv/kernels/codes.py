"""The codes of one layer's tokens, as the decode kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ShapeError
from aquakv.kernels.operands import DecodeOperands
from aquakv.kernels.pages import FIELD_COLUMNS, PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class PagedCodes:
    """Codes of one layer, for a batch of rows of unequal length.

    Attributes
    ----------
    key_pages, value_pages
        ``[rows, pages, planes, 64, 16]`` uint8, from `aquakv.kernels.pages.pack_pages`. A row's tokens fill
        its pages from the first on.
    key_scales, value_scales
        ``[rows, pages * 64]`` uint8: the tokens' scale codes. Whatever lies beyond a row's length, or where
        ``attended`` is 0, is never used.
    lengths
        ``[rows]`` int32: tokens of each row, on the device.
    attended
        ``[rows, pages * 64]`` uint8 or bool: 0 for tokens that must not be attended to, such as outliers
        that are kept exactly. None attends to all.
    """

    key_pages: Tensor
    key_scales: Tensor
    value_pages: Tensor
    value_scales: Tensor
    lengths: Tensor
    attended: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.key_pages.shape[0]

    @property
    def pages(self) -> int:
        """Pages of every row."""
        return self.key_pages.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that fit each row's pages."""
        return self.pages * PAGE_TOKENS

    def check(self, operands: DecodeOperands) -> None:
        """Raise `ShapeError` unless the codes fit a layer's operands."""
        rows, pages = self.rows, self.pages
        tokens = (rows, pages * PAGE_TOKENS)
        page = (PAGE_TOKENS, FIELD_COLUMNS)
        bytes_only, flags = (torch.uint8,), (torch.uint8, torch.bool)
        for name, tensor, shape, dtypes in (
            ("key_pages", self.key_pages, (rows, pages, operands.keys.layout.planes, *page), bytes_only),
            (
                "value_pages",
                self.value_pages,
                (rows, pages, operands.values.layout.planes, *page),
                bytes_only,
            ),
            ("key_scales", self.key_scales, tokens, bytes_only),
            ("value_scales", self.value_scales, tokens, bytes_only),
            ("lengths", self.lengths, (rows,), (torch.int32,)),
            ("attended", self.attended, tokens, flags),
        ):
            if tensor is not None:
                check_tensor(f"paged codes: {name}", tensor, shape, dtypes)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise `ShapeError` unless a tensor is contiguous and of the given shape and one of the dtypes."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(
            f"{name}: expected contiguous {wanted} {list(shape)}, got "
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {tensor.stride()}"
        )
