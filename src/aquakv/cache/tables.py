"""What kernels need to know of a batch's pages and exact tokens, on one device; the same at all layers.

All of it has room for blocks to come and is brought up to date in place, so that a graph that has captured
its addresses goes on being right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.outlier_rows import OutlierRows
from aquakv.cache.records import Records
from aquakv.kernels import PageRotary, hopper
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.pages import PAGE_TOKENS


@dataclass(frozen=True)
class ExactPlaces:
    """Where exact tokens are.

    Attributes
    ----------
    columns
        ``[1]`` int64: all columns, the new one included. Nothing else changes from pass to pass until
        something is compressed.
    first_column
        ``[1]`` int64: where the tail begins.
    capacity
        Columns that the tail has room for.
    allowed
        ``[rows, sinks + capacity]`` bool: what the mask allows; None without a mask.
    """

    columns: Tensor
    first_column: Tensor
    capacity: int
    allowed: Tensor | None

    @classmethod
    def empty(cls, rows: int, sinks: int, capacity: int, masked: bool, device: torch.device) -> ExactPlaces:
        """Return what is to be filled in."""
        columns, first = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        allowed = torch.ones(rows, sinks + capacity, dtype=torch.bool, device=device) if masked else None
        return cls(columns, first, capacity, allowed)

    @property
    def new(self) -> Tensor:
        """``[1]`` int64: where in the tail the new column goes."""
        return self.columns - self.first_column - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return self.columns, self.first_column, *(() if self.allowed is None else (self.allowed,))


@dataclass
class PageTables:
    """Where the pages of each row are.

    Attributes
    ----------
    table, lengths
        As in `PagedCodes`; the table has columns for pages to come.
    rotary
        Of the pages; zeros for pages to come.
    starts, coded
        ``[rows, 1]`` int64: column of each row's first token; its compressed tokens.
    block_rows
        ``[blocks]`` int64: the row of every block, in storage order.
    blocks
        How many blocks each row has.
    row_capacity
        How many blocks it has columns for.
    made_for
        Blocks that a layer's records had room for in all; when they grow, so do these.
    version
        The layout's when they were brought up to date.
    """

    table: Tensor
    lengths: Tensor
    rotary: PageRotary
    starts: Tensor
    coded: Tensor
    block_rows: Tensor
    blocks: list[int]
    row_capacity: int
    made_for: int
    version: int = -1

    @classmethod
    def build(
        cls,
        layout: TokenLayout,
        adapter: ModelAdapter,
        layer_idx: int,
        device: torch.device,
        records: Records,
    ) -> PageTables:
        """Build the tables with as much room as a layer's records have."""
        rows, each = layout.rows, layout.window.block_tokens // PAGE_TOKENS
        most = max(Counter(row for row, _ in layout.pages).values())
        if records.room:
            most += records.room // rows + 1  # rows gain blocks in turn
        offsets = adapter.rotary_tables(torch.arange(PAGE_TOKENS), layer_idx, torch.float32, device)
        cos, sin = offsets.cos[:, 0], offsets.sin[:, 0]
        zeros = cos.new_zeros(rows, most * each, cos.shape[-1])
        number = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        tables = cls(
            torch.zeros(rows, most * each, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            PageRotary.from_model((zeros, zeros.clone()), (cos, sin), torch.float32),
            number,
            number.clone(),
            number[:0, 0],
            [0] * rows,
            most,
            records.capacity,
        )
        tables.update(layout, adapter, layer_idx)
        return tables

    def fit(self, layout: TokenLayout, records: Records) -> bool:
        """Tell whether they can be brought up to date in place."""
        blocks = list(self.blocks)
        for row, _ in layout.pages[sum(blocks) :]:
            blocks[row] += 1
        return max(blocks) <= self.row_capacity and self.made_for == records.capacity

    def update(self, layout: TokenLayout, adapter: ModelAdapter, layer_idx: int) -> None:
        """Add blocks that have come, in place, and tell where rows begin and how long they are."""
        device, each = self.table.device, layout.window.block_tokens // PAGE_TOKENS
        before = sum(self.blocks)
        new = layout.pages[before:]
        places, columns = [], []
        for row, first in new:
            place = (row * self.row_capacity + self.blocks[row]) * each
            places.extend(range(place, place + each))
            columns.extend(row * layout.columns + first + PAGE_TOKENS * page for page in range(each))
            self.blocks[row] += 1

        def on_device(values: list[int], kind: torch.dtype = torch.int64) -> Tensor:
            # From memory that is not pinned the copy is over when the call returns, but nobody waits for it.
            return torch.tensor(values, dtype=kind).to(device, non_blocking=True)

        if new:
            assert layout.positions is not None  # set by layout.append
            where = on_device(places)
            numbers = torch.arange(before * each, (before + len(new)) * each, device=device)
            self.table.view(-1).index_copy_(0, where, numbers.int())
            positions = layout.positions.to(device).flatten()[on_device(columns)]
            found = adapter.rotary_tables(positions, layer_idx, torch.float32, device)
            for kept, table in ((self.rotary.page_cos, found.cos), (self.rotary.page_sin, found.sin)):
                kept.view(-1, kept.shape[-1]).index_copy_(0, where, table[:, 0].float())
            self.block_rows = torch.cat([self.block_rows, on_device([row for row, _ in new])])
            hopper.renew_turns(self.rotary)
        coded = on_device(layout.coded)
        self.lengths.copy_(coded)
        self.coded.copy_(coded[:, None])
        self.starts.copy_(on_device(layout.starts)[:, None])
        self.version = layout.version

    def outlier_shape(self, source: Tensor, most_per_block: int) -> tuple[int, int]:
        """Return rows, and how many outliers of a row there is room for; parameters as for `group`."""
        rows = len(self.table)
        return rows, len(source) if rows == 1 else min(len(source), self.row_capacity * most_per_block)

    def group(self, source: Tensor, count: int, block_tokens: int, most_per_block: int) -> OutlierRows:
        """Return a layer's outliers by row, without asking the device how many each row has.

        Parameters
        ----------
        source
            ``[room]`` int32: which tokens the layer's outliers are, with room for more.
        count
            How many there are.
        block_tokens
            Tokens of a block.
        most_per_block
            Outliers that a block can have.
        """
        device, (rows, most) = source.device, self.outlier_shape(source, most_per_block)
        if rows == 1:
            return OutlierRows(source, None, (torch.arange(most, device=device) < count)[None], count)
        row = self.block_rows[source[:count].long() // block_tokens]
        totals = torch.zeros(rows, dtype=torch.int64, device=device).index_add_(0, row, torch.ones_like(row))
        order = row.argsort(stable=True)
        row = row[order]
        place = torch.arange(count, device=device) - (totals.cumsum(0) - totals)[row]
        index = torch.zeros(rows, most, dtype=torch.int64, device=device)
        index[row, place] = order
        return OutlierRows(source, index, torch.arange(most, device=device) < totals[:, None], count)

    def allowed(self, layout: TokenLayout, first_column: int, capacity: int, mask: Tensor) -> Tensor:
        """Return what a mask allows of sinks and of ``capacity`` columns, ``[rows, sinks + capacity]`` bool.

        Of columns that are not there yet, all.
        """
        device, sinks = self.starts.device, layout.window.sink_tokens
        real = mask[:, : layout.columns].to(device, non_blocking=True).ne(0).expand(layout.rows, -1)
        column = (self.starts + torch.arange(sinks, device=device)).clamp(max=layout.columns - 1)
        later = real.new_ones(layout.rows, first_column + capacity - layout.columns)
        return torch.cat([real.gather(1, column), real[:, first_column:], later], 1)

    def exact_seen(self, places: ExactPlaces, sinks: int) -> Tensor:
        """Return which sinks and columns each row's new token sees, ``[rows, sinks + capacity]`` bool."""
        device = self.starts.device
        columns = places.first_column + torch.arange(places.capacity, device=device)
        held = (places.columns - 1 - self.starts).clamp(0, sinks)  # sinks kept before this pass
        seen = columns >= self.starts + torch.where(self.coded > 0, sinks + self.coded, held)
        seen = torch.cat([torch.arange(sinks, device=device) < held, seen & (columns < places.columns)], 1)
        return seen if places.allowed is None else seen & places.allowed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors but `block_rows`, which no kernel reads, with those that kernels keep beside them."""
        rotary = self.rotary
        return (
            self.table,
            self.lengths,
            self.starts,
            self.coded,
            rotary.page_cos,
            rotary.page_sin,
            rotary.offset_cos,
            rotary.offset_sin,
            *hopper.kept_turns(rotary),
        )
