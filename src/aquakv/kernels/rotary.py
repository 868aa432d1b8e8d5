"""Rotary tables of pages: a page's start and the 64 offsets within it, instead of every position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.kernels.pages import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class PageRotary:
    """Cosines and sines such that token ``o`` of a page is rotated by the page's angle plus offset ``o``'s.

    A page's tokens must have successive positions; pages may start anywhere.

    Attributes
    ----------
    page_cos, page_sin
        ``[rows, pages, rotary_dim / 2]`` float32: the model's own tables at the positions of the pages'
        first tokens, with whatever factor the model puts on them.
    offset_cos, offset_sin
        ``[64, rotary_dim / 2]``: of offsets 0 to 63, without that factor. float16 for the Triton kernels.
    """

    page_cos: Tensor
    page_sin: Tensor
    offset_cos: Tensor
    offset_sin: Tensor

    @classmethod
    def build(
        cls,
        inverse_frequencies: Tensor,
        page_positions: Tensor,
        factor: float = 1.0,
        dtype: torch.dtype = torch.float16,
    ) -> PageRotary:
        """Compute the tables in float64.

        Parameters
        ----------
        inverse_frequencies
            ``[rotary_dim / 2]``: angle of each pair per position.
        page_positions
            ``[rows, pages]``: position of the first token of every page.
        factor
            The model's factor on cosines and sines (YaRN's attention scaling).
        dtype
            Of the offsets' tables.
        """
        turns = inverse_frequencies.double()
        start = page_positions[..., None].double() * turns
        offset = torch.arange(PAGE_TOKENS, device=turns.device)[:, None].double() * turns
        return cls(
            (start.cos() * factor).float(),
            (start.sin() * factor).float(),
            offset.cos().to(dtype),
            offset.sin().to(dtype),
        )

    @classmethod
    def from_model(
        cls,
        page_tables: tuple[Tensor, Tensor],
        offset_tables: tuple[Tensor, Tensor],
        dtype: torch.dtype = torch.float16,
    ) -> PageRotary:
        """Take a model's own float32 cosines and sines.

        Parameters
        ----------
        page_tables
            ``[rows, pages, rotary_dim / 2]`` each: at the positions of the first tokens of the pages.
        offset_tables
            ``[64, rotary_dim / 2]`` each: at the positions 0 to 63.
        dtype
            Of the offsets' tables.
        """
        page_cos, page_sin = (table.float().contiguous() for table in page_tables)
        cos, sin = offset_tables
        factor = cos[:1]  # the cosine of 0 is 1
        return cls(page_cos, page_sin, (cos / factor).to(dtype), (sin / factor).to(dtype))
