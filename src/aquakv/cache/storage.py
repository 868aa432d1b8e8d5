"""What one layer of the cache holds: coded pages, and exact tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.codec import EncodedPages, EncodedTokens
from aquakv.codec.encoded import concatenate

#: Neighbouring chunks of equal size are merged up to this many pages, so that a layer holds few tensors and
#: merging never needs much memory beside them.
MAX_CHUNK_PAGES = 64


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


@dataclass(frozen=True)
class Chunk:
    """Codes of some pages of one layer, as they are kept."""

    pages: int
    encoded: EncodedTokens
    outliers: Outliers | None = None


@dataclass
class CodedPages:
    """Codes of one layer, append-only, in pages of ``block_tokens`` tokens.

    The pages live in a short list of chunks, each with exactly the tensors that the codes need and no spare
    capacity. Records, in which kernels look pages up, are one chunk: they are moved when a block is added, a
    few percent of the work of encoding it.
    """

    block_tokens: int
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(chunk.pages for chunk in self.chunks) * self.block_tokens

    def append(self, encoded: EncodedTokens, pages: int, outliers: Outliers | None = None) -> None:
        """Add the codes of whole pages."""
        if self.chunks and isinstance(encoded.keys, EncodedPages):
            self.chunks = [self._join([*self.chunks, Chunk(pages, encoded, outliers)])]
            return
        owned = EncodedTokens(encoded.keys.clone(), encoded.values.clone())
        self.chunks.append(Chunk(pages, owned, outliers))
        while len(self.chunks) > 1 and self._should_merge():
            last, before = self.chunks.pop(), self.chunks.pop()
            self.chunks.append(self._join([before, last]))

    def _should_merge(self) -> bool:
        before, last = (chunk.pages for chunk in self.chunks[-2:])
        return before <= last and before + last <= MAX_CHUNK_PAGES

    def _join(self, chunks: list[Chunk]) -> Chunk:
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.pages * self.block_tokens)
        encoded = EncodedTokens(
            concatenate([chunk.encoded.keys for chunk in chunks]),
            concatenate([chunk.encoded.values for chunk in chunks]),
        )
        outliers = Outliers.join([chunk.outliers for chunk in chunks], starts[:-1])
        return Chunk(sum(chunk.pages for chunk in chunks), encoded, outliers)

    def select(self, pages: Tensor) -> None:
        """Keep copies of the given pages, in the given order (int64 indices, repeats allowed)."""
        if not self.chunks:
            return
        whole = self.all()
        self.chunks = [
            Chunk(
                len(part),
                EncodedTokens(*(kind.select(part, self.block_tokens) for kind in whole.encoded)),
                None if whole.outliers is None else whole.outliers.select(part, self.block_tokens),
            )
            for part in (
                [pages] if isinstance(whole.encoded.keys, EncodedPages) else pages.split(MAX_CHUNK_PAGES)
            )
            if len(part)
        ]

    def all(self) -> Chunk:
        """Return all codes as one chunk, in storage order."""
        return self.chunks[0] if len(self.chunks) == 1 else self._join(self.chunks)

    def footprint(self) -> tuple[int, int, int]:
        """Return the bytes of codes, of scales and of outliers."""
        kinds = [kind for chunk in self.chunks for kind in chunk.encoded]
        outliers = [chunk.outliers for chunk in self.chunks if chunk.outliers is not None]
        return (
            storage_bytes(*(tensor for kind in kinds for tensor in kind.code_tensors)),
            storage_bytes(*(tensor for kind in kinds for tensor in kind.scale_tensors)),
            storage_bytes(*(tensor for o in outliers for tensor in (o.index, o.keys, o.values))),
        )


@dataclass
class ExactTokens:
    """Tokens of one layer in the model's dtype, keys after rotary embedding, as the exact cache holds them.

    The tail is what is held of two buffers, which have no spare columns until `reserve` makes some. Spare
    columns are zeros.

    Attributes
    ----------
    sink_keys, sink_values
        ``[rows, sink_tokens, num_kv_heads, head_dim]``: each row's first real tokens; zero where a row has
        fewer.
    key_buffer, value_buffer
        ``[rows, capacity, num_kv_heads, head_dim]``: the newest columns, from the first one that some row has
        not compressed.
    tail_columns
        How many of these are held.
    """

    sink_keys: Tensor
    sink_values: Tensor
    key_buffer: Tensor
    value_buffer: Tensor
    tail_columns: int = 0

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, sink_tokens: int) -> ExactTokens:
        """Return an empty store for keys and values like ``[rows, columns, num_kv_heads, head_dim]``."""
        rows, _, heads, dim = keys.shape
        value_heads, value_dim = values.shape[2:]
        return cls(
            keys.new_zeros(rows, sink_tokens, heads, dim),
            values.new_zeros(rows, sink_tokens, value_heads, value_dim),
            keys.new_empty(rows, 0, heads, dim),
            values.new_empty(rows, 0, value_heads, value_dim),
        )

    @property
    def tail_keys(self) -> Tensor:
        """``[rows, tail_columns, num_kv_heads, head_dim]``: a view of the keys held."""
        return self.key_buffer[:, : self.tail_columns]

    @property
    def tail_values(self) -> Tensor:
        """``[rows, tail_columns, num_kv_heads, head_dim]``: a view of the values held."""
        return self.value_buffer[:, : self.tail_columns]

    def replace_tail(self, keys: Tensor, values: Tensor) -> None:
        """Hold these columns, ``[rows, columns, num_kv_heads, head_dim]``, which are the store's from now."""
        self.key_buffer, self.value_buffer, self.tail_columns = keys, values, keys.shape[1]

    def reserve(self, columns: int) -> None:
        """Have room for so many columns in all; buffers that have it stay where they are."""
        if self.key_buffer.shape[1] < columns:
            self.key_buffer = _widened(self.tail_keys, columns)
            self.value_buffer = _widened(self.tail_values, columns)

    def add(self, place: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add one column, ``[rows, 1, num_kv_heads, head_dim]``, in place.

        ``place`` is its index ``tail_columns``, ``[1]`` int64 on the device, so that a graph that captures
        this can be replayed for the columns that follow.
        """
        self.key_buffer.index_copy_(1, place, keys)
        self.value_buffer.index_copy_(1, place, values)
        self.tail_columns += 1

    def drop_first(self, columns: int) -> None:
        """Forget the oldest columns, in place."""
        kept = self.tail_columns - columns
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[:, :kept] = buffer[:, columns : self.tail_columns].clone()
            buffer[:, kept : self.tail_columns] = 0
        self.tail_columns = kept

    def crop(self, columns: int) -> None:
        """Forget the newest columns."""
        kept = max(0, self.tail_columns - columns)
        self.replace_tail(self.tail_keys[:, :kept].clone(), self.tail_values[:, :kept].clone())

    def select(self, rows: Tensor) -> None:
        """Keep copies of the given rows."""
        for name in ("sink_keys", "sink_values", "key_buffer", "value_buffer"):
            tensor = getattr(self, name)
            setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def footprint(self) -> tuple[int, int]:
        """Return the bytes of sinks and of the tail, spare columns included."""
        sinks = storage_bytes(self.sink_keys, self.sink_values)
        return sinks, storage_bytes(self.key_buffer, self.value_buffer)


def _widened(held: Tensor, columns: int) -> Tensor:
    """Return a buffer of so many columns that begins with those held; the others are zeros."""
    buffer = held.new_zeros(held.shape[0], columns, *held.shape[2:])
    buffer[:, : held.shape[1]] = held
    return buffer
