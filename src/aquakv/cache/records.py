"""Records of one layer with room for more, so that what reads them need not be told with every block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.codec import EncodedPages, EncodedTokens

#: Room that steps of one token a row make: for one part in so many more blocks, …
SPARE_BLOCKS = 20
#: … but for at least so many of each row.
LEAST_SPARE_BLOCKS = 4


def storage_bytes(*tensors: Tensor | None) -> int:
    """Return the bytes of the storages behind tensors, each storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


@dataclass(frozen=True)
class Outliers:
    """Compressed tokens of one layer that attention sees exactly nevertheless.

    Attributes
    ----------
    index
        ``[n]`` int32, rising: which token of the chunk.
    keys, values
        ``[n, num_kv_heads, head_dim]`` in the model's dtype, keys after rotary embedding.
    """

    index: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def join(cls, parts: list[Outliers | None], first_tokens: list[int]) -> Outliers | None:
        """Join the outliers of chunks that begin at the given tokens of the joint one."""
        present = [(part, first) for part, first in zip(parts, first_tokens, strict=True) if part is not None]
        if not present:
            return None
        return cls(
            torch.cat([part.index + first for part, first in present]),
            torch.cat([part.keys for part, _ in present]),
            torch.cat([part.values for part, _ in present]),
        )

    def select(self, pages: Tensor, block_tokens: int) -> Outliers | None:
        """Return the outliers of pages, in the given order, or None if there are none."""
        own_page = (self.index // block_tokens).cpu()
        new_page, which = (pages.cpu()[:, None] == own_page[None]).nonzero(as_tuple=True)
        if not len(which):
            return None
        which = which.to(self.index.device)
        index = self.index[which] % block_tokens + new_page.to(self.index) * block_tokens
        return Outliers(index, self.keys[which], self.values[which])

    def first(self, count: int) -> Outliers:
        """Return views of the first ones."""
        return Outliers(self.index[:count], self.keys[:count], self.values[:count])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index, keys and values."""
        return self.index, self.keys, self.values


@dataclass(frozen=True)
class Chunk:
    """Codes of some pages of one layer, as they are kept."""

    pages: int
    encoded: EncodedTokens
    outliers: Outliers | None = None

    def select(self, pages: Tensor, block_tokens: int) -> Chunk:
        """Return copies of pages, in the given order (int64 indices, repeats allowed)."""
        return Chunk(
            len(pages),
            EncodedTokens(*(kind.select(pages, block_tokens) for kind in self.encoded)),
            None if self.outliers is None else self.outliers.select(pages, block_tokens),
        )


@dataclass
class Records:
    """Records and outliers of one layer, in buffers that hold more than is in use.

    Buffers stay where they are while there is room. They grow one at a time, so that no more than one of them
    is there twice. What is not in use is zeros.

    Attributes
    ----------
    block_tokens
        Tokens of a block.
    block_records
        Records of keys, or of values, of a block.
    keys, values
        ``[capacity * block_records, record_bytes]`` uint8, in storage order.
    blocks
        How many blocks are in use.
    places
        Room for outliers, those in use first; None while none were taken out and no room was asked for.
    outlier_count
        How many of these are in use.
    """

    block_tokens: int
    block_records: int
    keys: Tensor
    values: Tensor
    blocks: int = 0
    places: Outliers | None = None
    outlier_count: int = 0

    @classmethod
    def of(cls, chunk: Chunk, block_tokens: int) -> Records:
        """Return a copy of a chunk of records, without room for more."""
        keys, values = _records(chunk)
        records = cls(block_tokens, len(keys) // chunk.pages, keys[:0], values[:0])
        records.append(chunk)
        return records

    @property
    def capacity(self) -> int:
        """Blocks that fit."""
        return len(self.keys) // self.block_records

    @property
    def room(self) -> int:
        """Blocks that fit beside those in use."""
        return self.capacity - self.blocks

    @property
    def chunk(self) -> Chunk:
        """Views of what is in use."""
        used = self.blocks * self.block_records
        outliers = None
        if self.places is not None and self.outlier_count:
            outliers = self.places.first(self.outlier_count)
        codes = EncodedTokens(EncodedPages(self.keys[:used]), EncodedPages(self.values[:used]))
        return Chunk(self.blocks, codes, outliers)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All buffers."""
        return self.keys, self.values, *(() if self.places is None else self.places.tensors)

    def make_room(self, rows: int, most_outliers: int, keys: Tensor, values: Tensor) -> None:
        """Have room for another block of each row; where there is none, make room for many.

        Parameters
        ----------
        rows
            Sequences.
        most_outliers
            Outliers that a block can have; 0 if none are ever taken out.
        keys, values
            ``[…, num_kv_heads, head_dim]``: any of the layer's exact tokens.
        """
        if self.room < rows:
            spare = max(LEAST_SPARE_BLOCKS * rows, self.blocks // SPARE_BLOCKS)
            self._reserve(self.blocks + spare)
        if most_outliers:
            self._reserve_places(self.outlier_count + self.room * most_outliers, keys, values)

    def append(self, chunk: Chunk) -> None:
        """Add the records and outliers of whole blocks; what does not fit gets just the room it needs."""
        first = self.blocks
        self._reserve(first + chunk.pages)
        self.blocks += chunk.pages
        for own, new in zip(self.newest(chunk.pages), _records(chunk), strict=True):
            own.copy_(new)
        if chunk.outliers is not None:
            index, keys, values = chunk.outliers.tensors
            self.add_outliers(index + first * self.block_tokens, keys, values)

    def newest(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Return views of the records, keys' and values', of the last so many blocks."""
        own = slice((self.blocks - blocks) * self.block_records, self.blocks * self.block_records)
        return self.keys[own], self.values[own]

    def add_outliers(self, index: Tensor, keys: Tensor, values: Tensor, chosen: Tensor | None = None) -> None:
        """Add outliers behind the others.

        Parameters
        ----------
        index
            ``[n]`` int32, rising: which of the layer's tokens.
        keys, values
            ``[n, num_kv_heads, head_dim]``.
        chosen
            ``[n]`` int64: where in ``keys`` and ``values``, which may have more, the outliers' are.
        """
        used, count = self.outlier_count, self.outlier_count + len(index)
        self._reserve_places(count, keys, values)
        assert self.places is not None  # there are such places now
        self.places.index[used:count] = index
        for own, vectors in ((self.places.keys, keys), (self.places.values, values)):
            if chosen is None:
                own[used:count] = vectors
            else:
                torch.index_select(vectors, 0, chosen, out=own[used:count])
        self.outlier_count = count

    def select(self, pages: Tensor) -> Records | None:
        """Return copies of blocks, in the given order, with as much room for more; None of no blocks.

        ``pages`` are int64 indices; they may repeat.
        """
        if not len(pages):
            return None
        each, count = self.block_records, len(pages)
        index = (
            (pages[:, None] * each + torch.arange(each, device=pages.device)).flatten().to(self.keys.device)
        )
        keys, values = (
            _chosen(tensor, index, (count + self.room) * each) for tensor in (self.keys, self.values)
        )
        chosen = Records(self.block_tokens, each, keys, values, count)
        if self.places is not None:
            spare = len(self.places.index) - self.outlier_count
            own = self.places.first(self.outlier_count).select(pages, self.block_tokens)
            own = self.places.first(0) if own is None else own
            chosen.outlier_count = len(own.index)
            room = chosen.outlier_count + spare
            chosen.places = Outliers(*(_longer(tensor, len(tensor), room) for tensor in own.tensors))
        return chosen

    def footprint(self) -> tuple[int, int, int]:
        """Return the bytes of codes in use, of outliers in use, and of the room for more of both."""
        held = self.chunk
        codes = held.encoded.nbytes
        outliers = sum(t.nbytes for t in held.outliers.tensors) if held.outliers is not None else 0
        return codes, outliers, storage_bytes(*self.tensors) - codes - outliers

    def _reserve(self, blocks: int) -> None:
        if self.capacity < blocks:
            used = self.blocks * self.block_records
            self.keys = _longer(self.keys, used, blocks * self.block_records)
            self.values = _longer(self.values, used, blocks * self.block_records)

    def _reserve_places(self, count: int, keys: Tensor, values: Tensor) -> None:
        if self.places is None:
            none = keys.new_empty(0, dtype=torch.int32)
            self.places = Outliers(
                none, keys.new_empty(0, *keys.shape[-2:]), values.new_empty(0, *values.shape[-2:])
            )
        if len(self.places.index) < count:
            used = self.outlier_count
            self.places = Outliers(*(_longer(tensor, used, count) for tensor in self.places.tensors))


def _records(chunk: Chunk) -> tuple[Tensor, Tensor]:
    keys, values = chunk.encoded
    assert isinstance(keys, EncodedPages)  # such chunks come here
    assert isinstance(values, EncodedPages)
    return keys.records, values.records


def _chosen(held: Tensor, index: Tensor, length: int) -> Tensor:
    """Return a buffer of a length that begins with the chosen entries of another; the rest is zeros."""
    buffer = held.new_empty(length, *held.shape[1:])
    torch.index_select(held, 0, index, out=buffer[: len(index)])
    buffer[len(index) :] = 0
    return buffer


def _longer(held: Tensor, used: int, length: int) -> Tensor:
    """Return a buffer of a length that begins with what is used of another; the rest is zeros."""
    buffer = held.new_empty(length, *held.shape[1:])
    buffer[:used] = held[:used]
    buffer[used:] = 0
    return buffer
