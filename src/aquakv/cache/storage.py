"""What one layer of the cache holds: coded pages, and exact tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquakv.codec import EncodedTokens, EncodedVectors

#: Neighbouring chunks of equal size are merged up to this many pages, so that a layer holds few tensors and
#: merging never needs much memory beside them.
MAX_CHUNK_PAGES = 64


def storage_bytes(*tensors: Tensor | None) -> int:
    """Return the bytes of the storages behind tensors, each storage counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


@dataclass
class CodedPages:
    """Codes of one layer, append-only, in pages of ``block_tokens`` tokens.

    The pages live in a short list of chunks, each with exactly the tensors that the codes need and no spare
    capacity: ``words`` ``[pages * block_tokens, words_per_token]`` int32 and ``scales``
    ``[pages * block_tokens, groups]`` float16, for keys and for values.
    """

    block_tokens: int
    chunks: list[EncodedTokens] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(chunk.keys.words.shape[0] for chunk in self.chunks)

    def append(self, encoded: EncodedTokens) -> None:
        """Add the codes of whole pages."""
        self.chunks.append(_map(lambda tensor: tensor.clone(), encoded))
        while len(self.chunks) > 1 and self._should_merge():
            last, before = self.chunks.pop(), self.chunks.pop()
            self.chunks.append(_concatenate([before, last]))

    def _should_merge(self) -> bool:
        before, last = (chunk.keys.words.shape[0] for chunk in self.chunks[-2:])
        return before <= last and before + last <= MAX_CHUNK_PAGES * self.block_tokens

    def select(self, pages: Tensor) -> None:
        """Keep copies of the given pages, in the given order (int64 indices, repeats allowed)."""
        if not self.chunks:
            return
        tokens = (
            pages[:, None] * self.block_tokens + torch.arange(self.block_tokens, device=pages.device)
        ).flatten()
        whole = self.all()
        size = MAX_CHUNK_PAGES * self.block_tokens
        self.chunks = [
            _map(lambda tensor, part=part: tensor.index_select(0, part.to(tensor.device)), whole)
            for part in tokens.split(size)
            if len(part)
        ]

    def all(self) -> EncodedTokens:
        """Return all codes as one block, in storage order."""
        return self.chunks[0] if len(self.chunks) == 1 else _concatenate(self.chunks)

    def footprint(self) -> tuple[int, int]:
        """Return the bytes of words and of scales."""
        words = [t for chunk in self.chunks for t in (chunk.keys.words, chunk.values.words)]
        scales = [t for chunk in self.chunks for t in (chunk.keys.scales, chunk.values.scales)]
        return storage_bytes(*words), storage_bytes(*scales)


@dataclass
class ExactTokens:
    """Tokens of one layer in the model's dtype, keys after rotary embedding, as the exact cache holds them.

    Attributes
    ----------
    sink_keys, sink_values
        ``[rows, sink_tokens, num_kv_heads, head_dim]``: each row's first real tokens; zero where a row has
        fewer.
    tail_keys, tail_values
        ``[rows, tail_columns, num_kv_heads, head_dim]``: the newest columns, from the first one that some row
        has not compressed.
    """

    sink_keys: Tensor
    sink_values: Tensor
    tail_keys: Tensor
    tail_values: Tensor

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

    def select(self, rows: Tensor) -> None:
        """Keep copies of the given rows."""
        for name in ("sink_keys", "sink_values", "tail_keys", "tail_values"):
            tensor = getattr(self, name)
            setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def footprint(self) -> tuple[int, int]:
        """Return the bytes of sinks and of the tail."""
        sinks = storage_bytes(self.sink_keys, self.sink_values)
        return sinks, storage_bytes(self.tail_keys, self.tail_values)


def _map(function: Callable[[Tensor], Tensor], encoded: EncodedTokens) -> EncodedTokens:
    return EncodedTokens(*(EncodedVectors(*(function(t) for t in part)) for part in encoded))


def _concatenate(chunks: list[EncodedTokens]) -> EncodedTokens:
    def join(kind: int, part: int) -> Tensor:
        return torch.cat([chunk[kind][part] for chunk in chunks])

    return EncodedTokens(*(EncodedVectors(join(kind, 0), join(kind, 1)) for kind in range(2)))
