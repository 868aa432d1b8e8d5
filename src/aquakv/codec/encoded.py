"""What codes look like, as rows of tokens and as they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.numerics import EntropyCoded, rans
from aquakv.numerics.pages import PAGE_TOKENS


class EncodedVectors(NamedTuple):
    """Codes of a block of vectors, one row per token.

    Attributes
    ----------
    words
        ``[tokens, …]``: packed codes, int32 words or bytes as the quantiser says; for entropy coding, before
        it has taken place, uint8 symbols.
    scales
        ``[tokens, …]``: scales of each token, float16 or one byte as the quantiser says.
    """

    words: Tensor
    scales: Tensor

    def head(self, tokens: int) -> EncodedVectors:
        """Return the first tokens."""
        return EncodedVectors(self.words[:tokens], self.scales[:tokens])

    def tail(self, tokens: int) -> EncodedVectors:
        """Return all but the first tokens."""
        return EncodedVectors(self.words[tokens:], self.scales[tokens:])

    def select(self, pages: Tensor, block_tokens: int) -> EncodedVectors:
        """Return copies of pages of ``block_tokens`` tokens, in the given order (int64 indices)."""
        offsets = torch.arange(block_tokens, device=pages.device)
        tokens = (pages[:, None] * block_tokens + offsets).flatten().to(self.words.device)
        return EncodedVectors(self.words.index_select(0, tokens), self.scales.index_select(0, tokens))

    def clone(self) -> EncodedVectors:
        """Return a copy that owns exactly its bytes."""
        return EncodedVectors(self.words.clone(), self.scales.clone())

    @property
    def code_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold codes."""
        return (self.words,)

    @property
    def scale_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold scales."""
        return (self.scales,)


class EncodedStreams(NamedTuple):
    """Entropy-coded vectors: for every page one stream, decodable by itself.

    Attributes
    ----------
    words
        ``[words]`` int16: the pages' streams one behind the other.
    lengths
        ``[pages]`` int32: words of each page.
    states
        ``[pages, lanes]`` int32: final states of the coder's lanes; the tokens' scales are inside.
    """

    words: Tensor
    lengths: Tensor
    states: Tensor

    def select(self, pages: Tensor, block_tokens: int) -> EncodedStreams:
        """Return copies of pages, in the given order (int64 indices)."""
        chosen = rans.select(EntropyCoded(*self), pages.to(self.words.device))
        return EncodedStreams(chosen.words, chosen.lengths, chosen.states)

    def clone(self) -> EncodedStreams:
        """Return a copy that owns exactly its bytes."""
        return EncodedStreams(*(tensor.clone() for tensor in self))

    @property
    def code_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold codes."""
        return (self.words, self.lengths)

    @property
    def scale_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold scales."""
        return (self.states,)


class EncodedPages(NamedTuple):
    """Vectors in records of pages (`aquakv.numerics.pages`), from which kernels decode.

    Attributes
    ----------
    records
        ``[records, record_bytes]`` uint8: 64 tokens each, with their scale codes and attended bits.
    """

    records: Tensor

    def select(self, pages: Tensor, block_tokens: int) -> EncodedPages:
        """Return copies of pages of ``block_tokens`` tokens, in the given order (int64 indices)."""
        each = block_tokens // PAGE_TOKENS
        offsets = torch.arange(each, device=pages.device)
        index = (pages[:, None] * each + offsets).flatten().to(self.records.device)
        return EncodedPages(self.records.index_select(0, index))

    def clone(self) -> EncodedPages:
        """Return a copy that owns exactly its bytes."""
        return EncodedPages(self.records.clone())

    @property
    def code_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold codes; the scales are among them."""
        return (self.records,)

    @property
    def scale_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold scales by themselves: none."""
        return ()


Encoded = EncodedVectors | EncodedStreams | EncodedPages


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """Join encoded pages of one kind."""
    first = parts[0]
    if isinstance(first, EncodedStreams):
        joined = rans.concatenate([EntropyCoded(*part) for part in parts])
        return EncodedStreams(joined.words, joined.lengths, joined.states)
    if isinstance(first, EncodedPages):
        return EncodedPages(torch.cat([tensor for part in parts for tensor in part]))
    return EncodedVectors(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class EncodedTokens(NamedTuple):
    """Codes of a block of tokens at one layer."""

    keys: Encoded
    values: Encoded

    @property
    def nbytes(self) -> int:
        """Bytes that the codes take."""
        parts = [t for part in self for t in (*part.code_tensors, *part.scale_tensors)]
        return sum(t.numel() * t.element_size() for t in parts)
