"""What one layer of the cache holds: coded pages, and exact tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.cache.records import Chunk, Outliers, Records, storage_bytes
from aquakv.codec import EncodedPages, EncodedTokens
from aquakv.codec.encoded import concatenate

#: Neighbouring chunks of equal size are merged up to this many pages, so that a layer holds few tensors and
#: merging never needs much memory beside them.
MAX_CHUNK_PAGES = 64


@dataclass(frozen=True)
class Decoded:
    """What a layer's first pages were decoded to, as attention takes them.

    Attributes
    ----------
    pages
        How many.
    keys, values
        ``[tokens, num_kv_heads, head_dim]`` in the model's dtype, in storage order: keys after rotary
        embedding, outliers exactly.
    """

    pages: int
    keys: Tensor
    values: Tensor

    def join(self, other: Decoded) -> Decoded:
        """Return these pages and those behind them."""
        return Decoded(
            self.pages + other.pages,
            torch.cat([self.keys, other.keys]),
            torch.cat([self.values, other.values]),
        )

    def select(self, pages: Tensor, block_tokens: int) -> Decoded | None:
        """Return copies of pages, in the given order, up to the first that is not among these."""
        known = (pages < self.pages).cumprod(0).sum()
        chosen, offsets = pages[:known, None] * block_tokens, torch.arange(block_tokens)
        tokens = (chosen.cpu() + offsets).flatten().to(self.keys.device)
        return Decoded(int(known), self.keys.index_select(0, tokens), self.values.index_select(0, tokens))


@dataclass
class CodedPages:
    """Codes of one layer, append-only, in pages of ``block_tokens`` tokens.

    Records, in which kernels look pages up, are in buffers with room for more. Other codes live in a short
    list of chunks, each with exactly the tensors that the codes need and no spare capacity.

    Attributes
    ----------
    block_tokens
        Tokens of a page.
    records
        The codes, if they are records.
    decoded
        What the first pages were decoded to, where a cache keeps that.
    """

    block_tokens: int
    records: Records | None = None
    decoded: Decoded | None = None
    _others: list[Chunk] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        """All codes; one chunk at most if they are records."""
        return self._others if self.records is None else [self.records.chunk]

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(chunk.pages for chunk in self.chunks) * self.block_tokens

    def append(self, encoded: EncodedTokens, pages: int, outliers: Outliers | None = None) -> None:
        """Add the codes of whole pages."""
        if isinstance(encoded.keys, EncodedPages):
            new = Chunk(pages, encoded, outliers)
            if self.records is None:
                self.records = Records.of(new, self.block_tokens)
            else:
                self.records.append(new)
            return
        chunks = self._others
        owned = EncodedTokens(encoded.keys.clone(), encoded.values.clone())
        chunks.append(Chunk(pages, owned, outliers))
        while len(chunks) > 1 and self._should_merge():
            last, before = chunks.pop(), chunks.pop()
            chunks.append(self._join([before, last]))

    def _should_merge(self) -> bool:
        before, last = (chunk.pages for chunk in self._others[-2:])
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
        if self.decoded is not None:
            self.decoded = self.decoded.select(pages, self.block_tokens)
        if self.records is not None:
            self.records = self.records.select(pages)
        if not self._others:
            return
        whole, parts = self.all(), pages.split(MAX_CHUNK_PAGES)
        self._others = [whole.select(part, self.block_tokens) for part in parts if len(part)]

    def clear(self) -> None:
        """Drop everything."""
        self.records, self.decoded, self._others = None, None, []

    def all(self) -> Chunk:
        """Return all codes as one chunk, in storage order."""
        return self.chunks[0] if len(self.chunks) == 1 else self._join(self.chunks)

    def since(self, page: int) -> Chunk:
        """Return the codes from a page on as one chunk, in storage order."""
        whole = self.all()
        return whole.select(torch.arange(page, whole.pages), self.block_tokens) if page else whole

    def decoded_bytes(self) -> int:
        """Return the bytes of what is kept decoded."""
        return 0 if self.decoded is None else storage_bytes(self.decoded.keys, self.decoded.values)

    def footprint(self) -> tuple[int, int, int, int]:
        """Return the bytes of codes, of scales and of outliers in use, and of room for more."""
        if self.records is not None:
            codes, exact, spare = self.records.footprint()
            return codes, 0, exact, spare
        kinds = [kind for chunk in self._others for kind in chunk.encoded]
        outliers = [chunk.outliers for chunk in self._others if chunk.outliers is not None]
        return (
            storage_bytes(*(tensor for kind in kinds for tensor in kind.code_tensors)),
            storage_bytes(*(tensor for kind in kinds for tensor in kind.scale_tensors)),
            storage_bytes(*(tensor for o in outliers for tensor in o.tensors)),
            0,
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

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sinks, and the tail with its spare columns."""
        return self.sink_keys, self.sink_values, self.key_buffer, self.value_buffer

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
        self.drop_first_of([self], columns)

    @staticmethod
    def drop_first_of(layers: Sequence[ExactTokens], columns: int) -> None:
        """Forget the oldest columns of several layers, in place."""
        spare = []
        for one in layers:
            kept = one.tail_columns - columns
            for buffer in (one.key_buffer, one.value_buffer):
                if kept:
                    moved = buffer[:, columns : one.tail_columns]
                    buffer[:, :kept] = moved if kept <= columns else moved.clone()
                spare.append(buffer[:, kept : one.tail_columns])
            one.tail_columns = kept
        torch._foreach_zero_(spare)  # pyright: ignore[reportPrivateImportUsage]

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
