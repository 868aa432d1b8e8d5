"""Which token is where: the bookkeeping that all layers of a cache share.

Tokens are addressed by *row* (sequence of the batch) and *column* (index along the sequence axis as the model
sees it, padding included). Columns before a row's first real token are padding and are never stored. A row's
first ``sink_tokens`` real tokens are its sinks; behind them whole blocks of tokens are compressed, oldest
first, so what is compressed of a row does not depend on the rows beside it.

Once tokens are evicted, columns here are the *slots* of `aquakv.cache.holes`: fewer than the model counts,
and some that hold no token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.cache.holes import Holes
from aquakv.config import WindowConfig
from aquakv.errors import CacheStateError

#: Position ids that are appended one at a time get room for one part in so many more.
SPARE_POSITIONS = 16


@dataclass
class TokenLayout:
    """Host-side map of a cache's tokens.

    Attributes
    ----------
    window
        Which tokens stay exact.
    columns
        Columns held so far.
    starts
        Column of each row's first real token; ``columns`` while a row has none.
    coded
        Compressed tokens of each row.
    pages
        ``(row, first_column)`` of every compressed block, in storage order, the same at every layer.
    successive
        For each of ``pages`` whether its tokens have successive positions.
    version
        Rises whenever ``starts``, ``coded`` or ``pages`` change.
    selections
        Rises whenever rows are selected. Otherwise pages are only ever added behind the others, but for
        evictions, after which everything that was made of them is forgotten.
    holes
        Where tokens in columns come from, once some were evicted.
    """

    window: WindowConfig
    columns: int = 0
    starts: list[int] = field(default_factory=list)
    coded: list[int] = field(default_factory=list)
    pages: list[tuple[int, int]] = field(default_factory=list)
    successive: list[bool] = field(default_factory=list)
    version: int = 0
    selections: int = 0
    holes: Holes | None = None
    _positions: Tensor | None = None

    @property
    def positions(self) -> Tensor | None:
        """``[rows, columns]`` int32 position ids, on the device of the first layer; None before any."""
        return None if self._positions is None else self._positions[:, : self.columns]

    @property
    def rows(self) -> int:
        """Batch size; 0 before the first tokens."""
        return len(self.starts)

    @property
    def seen(self) -> int:
        """Columns as the model counts them, those of evicted tokens included."""
        return self.columns if self.holes is None else self.columns + self.holes.shift

    @property
    def ends_with_newest(self) -> bool:
        """Whether the newest column of every row is held."""
        holes = self.holes
        if holes is None or self.columns > holes.slots:
            return True
        return holes.slots > 0 and bool((holes.origins[:, -1] == holes.seen - 1).all())

    def fillers(self) -> int:
        """Return how many of the compressed tokens are none: they fill blocks that eviction left partial."""
        if self.holes is None:
            return 0
        sinks, count = self.window.sink_tokens, 0
        for origins, start, coded in zip(self.holes.origins, self.starts, self.coded, strict=True):
            count += int((origins[start + sinks : start + sinks + coded] < 0).sum())
        return count

    def held_columns(self) -> Tensor:
        """Return which columns that the model counts hold a token, ``[rows, seen]`` bool on the CPU."""
        after = torch.arange(self.columns) >= torch.tensor(self.starts)[:, None]
        if self.holes is None:
            return after
        cpu = torch.device("cpu")
        return torch.cat([self.holes.held(cpu), after[:, self.holes.slots :]], 1)

    def held_tokens(self) -> int:
        """Return the number of tokens held of all rows, without padding."""
        if self.holes is None:
            return sum(self.lengths())
        behind = sum(self.columns - max(start, self.holes.slots) for start in self.starts)
        return int((self.holes.origins >= 0).sum()) + behind

    def lengths(self) -> list[int]:
        """Return the number of real tokens of each row."""
        return [self.columns - start for start in self.starts]

    def first_exact_columns(self) -> list[int]:
        """Return, for each row, the first column of its exact tail (behind sinks and compressed tokens)."""
        sinks = self.window.sink_tokens
        return [
            min(self.columns, start + sinks + coded)
            for start, coded in zip(self.starts, self.coded, strict=True)
        ]

    def append(self, new_columns: int, positions: Tensor, mask: Tensor | None, rows: int) -> None:
        """Add columns.

        Parameters
        ----------
        new_columns
            How many.
        positions
            ``[rows or 1, new_columns]`` position ids.
        mask
            ``[rows, columns after the call]``, nonzero where a token is real, or None if all are.
        rows
            Batch size.

        Raises
        ------
        CacheStateError
            The batch size changed, or positions or mask have another shape than the keys.
        """
        starts = self.starts or [0] * rows
        if rows != len(starts):
            raise CacheStateError(f"the cache holds {self.rows} sequences, but got keys of {rows}")
        if positions.ndim != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != new_columns:
            raise CacheStateError(
                f"expected position ids of shape [{rows} or 1, {new_columns}], got {list(positions.shape)}"
            )
        after = self.columns + new_columns
        if any(start == self.columns for start in starts):  # rows that are empty or all padding so far
            starts = self._find_starts(starts, mask, after)
        self.version += starts != self.starts
        self.starts, self.coded = starts, self.coded or [0] * rows
        self._append_positions(positions.detach().to(torch.int32).expand(rows, -1))
        self.columns = after

    def _append_positions(self, positions: Tensor) -> None:
        old, new_columns = self.positions, positions.shape[1]
        if old is None:
            self._positions = positions.clone()
            return
        after = self.columns + new_columns
        assert self._positions is not None  # or there were no old ones
        if self._positions.shape[1] < after:
            # One at a time they are not moved each time.
            spare = after // SPARE_POSITIONS if new_columns == 1 else 0
            self._positions = torch.cat([old, old.new_zeros(len(old), new_columns + spare)], 1)
        self._positions[:, self.columns : after] = positions.to(old.device)

    def _find_starts(self, starts: list[int], mask: Tensor | None, after: int) -> list[int]:
        rows = len(starts)
        leading = [0] * rows
        if mask is not None:
            if mask.shape[0] not in (1, rows) or mask.shape[1] < after:
                raise CacheStateError(
                    f"expected an attention mask of shape [{rows}, {after}], got {list(mask.shape)}"
                )
            real = mask[:, :after].ne(0).expand(rows, -1)
            leading = torch.where(real.any(1), real.int().argmax(1), after).tolist()
        return [
            max(start, first) if start == self.columns else start
            for start, first in zip(starts, leading, strict=True)
        ]

    def blocks_due(self, more: int = 0) -> list[tuple[int, int]]:
        """Return ``(row, first_column)`` of the blocks to compress now, row by row, oldest first.

        Or those to compress once there are so many columns ``more``.
        """
        due = []
        for row, start in enumerate(self.starts):
            length = self.columns + more - start
            first = self.starts[row] + self.window.sink_tokens
            tokens = range(self.coded[row], self.window.coded_tokens(length), self.window.block_tokens)
            due.extend((row, first + token) for token in tokens)
        return due

    def commit(self, blocks: list[tuple[int, int]]) -> None:
        """Record blocks as compressed."""
        if not blocks:
            return
        assert self.positions is not None  # set by append
        columns = self.page_columns(blocks, self.positions.device)
        steps = self.positions.flatten()[columns].view(len(blocks), -1).diff(dim=1)
        successive = (steps == 1).all(1).tolist()
        for row, _ in blocks:
            self.coded[row] += self.window.block_tokens
        self.pages.extend(blocks)
        self.successive.extend(successive)
        self.version += 1

    def restore(
        self,
        columns: int,
        starts: list[int],
        positions: Tensor,
        pages: list[tuple[int, int]],
        holes: Holes | None = None,
    ) -> None:
        """Make the layout that of tokens which another one described, by its attributes."""
        self.columns, self.starts, self.coded = columns, list(starts), [0] * len(starts)
        self._positions, self.holes = positions, holes
        self.pages, self.successive = [], []
        self.version += 1
        self.commit(pages)

    def crop(self, tokens: int) -> bool:
        """Forget the newest ``tokens`` columns that the model counts, none of which may be compressed.

        Returns
        -------
        bool
            False, and nothing has changed, if some of them were evicted: rows may then lose different numbers
            of tokens.
        """
        if self.holes is not None and self.columns - tokens < self.holes.slots:
            last = self.holes.columns_of_slots(self.columns)
            for row, (start, coded) in enumerate(zip(self.starts, self.coded, strict=True)):
                first = start + self.window.sink_tokens
                if coded and int(last[row, first : first + coded].max()) >= self.seen - tokens:
                    raise CacheStateError(self._cannot_crop(tokens, row))
            return False
        after = self.columns - tokens
        for row, coded in enumerate(self.coded):
            if coded and after < self.starts[row] + self.window.sink_tokens + coded:
                raise CacheStateError(self._cannot_crop(tokens, row))
        self.columns = after
        self.starts = [min(start, after) for start in self.starts]
        self.version += 1
        if self.positions is not None:
            self._positions = self.positions.clone()
        return True

    def _cannot_crop(self, tokens: int, row: int) -> str:
        held = self.columns - self.starts[row] - self.window.sink_tokens - self.coded[row]
        return (
            f"cannot remove {tokens} tokens: only {held} of sequence {row} are still exact; "
            f"build the cache with a recent_window of at least {tokens}"
        )

    def select(self, rows: list[int]) -> list[int]:
        """Make the batch ``rows`` of the present one; return the present page that each new page copies."""
        by_row: dict[int, list[int]] = {row: [] for row in range(self.rows)}
        for index, (row, _) in enumerate(self.pages):
            by_row[row].append(index)
        source = [index for row in rows for index in by_row[row]]
        self.pages = [
            (new_row, self.pages[index][1]) for new_row, row in enumerate(rows) for index in by_row[row]
        ]
        self.successive = [self.successive[index] for index in source]
        self.version += 1
        self.selections += 1
        self.starts = [self.starts[row] for row in rows]
        self.coded = [self.coded[row] for row in rows]
        self.holes = None if self.holes is None else self.holes.select(rows)
        if self.positions is not None:
            self._positions = self.positions[rows]
        return source

    def page_columns(
        self,
        blocks: list[tuple[int, int]],
        device: torch.device,
        first_column: int = 0,
        width: int | None = None,
    ) -> Tensor:
        """Return the flat index of every token of ``blocks``, in order, int64.

        The index is that of ``[rows, width]``, whose columns begin with ``first_column``; by default they end
        with the last one.
        """
        width = self.columns - first_column if width is None else width
        first = torch.tensor([row * width + column - first_column for row, column in blocks])
        offsets = torch.arange(self.window.block_tokens)
        return (first.long()[:, None] + offsets).flatten().to(device, non_blocking=True)

    def is_contiguous(self, blocks: list[tuple[int, int]]) -> bool:
        """Tell whether ``blocks`` cover one run of columns of a single row, in order."""
        if self.rows != 1 or not blocks:
            return False
        step = self.window.block_tokens
        return all(column == blocks[0][1] + i * step for i, (_, column) in enumerate(blocks))
