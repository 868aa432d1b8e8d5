"""Take tokens out of a cache: what stays goes on as it is held, codes included, and the rest is freed.

Exact tokens move together. Of compressed ones, blocks that stay whole stay as they are; what is left of other
blocks of a row is packed together into as few new ones, token by token, codes as they are: entropy coding is
undone and redone, quantisation is not. The last of these blocks is filled up with copies of its last token,
which nobody sees, so that a row never holds more than ``block_tokens - 1`` tokens too many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.holes import Holes
from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import Outliers
from aquakv.cache.storage import CodedPages, ExactTokens
from aquakv.codec import EncodedTokens, EncodedVectors, LayerCodec
from aquakv.errors import ShapeError

_NONE = torch.zeros(0, dtype=torch.long)


def required_mask(keep: Tensor, rows: int, columns: int) -> Tensor:
    """Return which tokens are to stay, ``[rows, columns]`` bool on the CPU.

    Raises
    ------
    ShapeError
        ``keep`` is no bool tensor ``[rows, columns]`` or ``[columns]``.
    """
    wanted = f"[{rows}, {columns}] or [{columns}]"
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        found = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise ShapeError(f"evict: expected keep as a bool tensor {wanted}, True for what stays, got {found}")
    if tuple(keep.shape) not in ((rows, columns), (columns,)):
        raise ShapeError(
            f"evict: expected keep of shape {wanted}, all columns that the model counts "
            f"(get_seq_length()), got {list(keep.shape)}"
        )
    return keep.cpu().expand(rows, columns)


@dataclass(frozen=True)
class _Row:
    """What stays of one row.

    Attributes
    ----------
    source, real
        ``[slots]`` int64 and bool: the present slot that each slot copies, and whether that is a token.
    sinks, tail
        Which of the present exact tokens (sinks, then the tail) are its sinks and its tail; -1 for none.
    whole
        Present blocks that stay, in storage order.
    packed, fillers
        Compressed tokens, by their index in storage, that go into new blocks, and which of them fill up.
    """

    source: Tensor
    real: Tensor
    sinks: Tensor
    tail: Tensor
    whole: list[int]
    packed: Tensor
    fillers: Tensor


@dataclass(frozen=True)
class Eviction:
    """Where everything that stays goes; the same at all layers.

    Attributes
    ----------
    pages
        ``(row, first slot)`` of each block afterwards, in storage order.
    whole
        ``[n]`` int64: present blocks that stay as they are; they come first.
    packed, fillers
        ``[tokens]`` int64 and bool: compressed tokens, by their index in storage, that new blocks hold, and
        which of them only fill a block up.
    sinks, tail
        ``[rows, sink_tokens]`` and ``[rows, columns]`` int64: which of a row's present exact tokens (sinks,
        then the tail) go there; -1 for none.
    starts
        Slot of each row's first token.
    positions
        ``[rows, slots]`` int32.
    holes
        Where tokens come from.
    """

    pages: list[tuple[int, int]]
    whole: Tensor
    packed: Tensor
    fillers: Tensor
    sinks: Tensor
    tail: Tensor
    starts: list[int]
    positions: Tensor
    holes: Holes | None

    @classmethod
    def plan(cls, layout: TokenLayout, keep: Tensor, tail_columns: int, seen: int) -> Eviction:
        """Work it out.

        Parameters
        ----------
        layout
            Of the present tokens.
        keep
            ``[rows, columns]`` bool on the CPU, by the model's columns: what stays.
        tail_columns
            Columns that layers hold exactly.
        seen
            Columns that the model counts afterwards.
        """
        slots, block = layout.columns, layout.window.block_tokens
        assert layout.positions is not None  # there are rows
        columns = torch.arange(slots).expand(layout.rows, -1)
        if layout.holes is not None:
            columns = layout.holes.columns_of_slots(slots)
        before = torch.arange(slots) < torch.tensor(layout.starts)[:, None]
        real = (columns >= 0) & ~before
        stays = real & keep.gather(1, columns.clamp(min=0)) if slots else real
        blocks: list[list[int]] = [[] for _ in layout.starts]
        for page, (row, _) in enumerate(layout.pages):
            blocks[row].append(page)
        rows = [
            _plan_row(layout, row, blocks[row], stays[row], real[row], tail_columns)
            for row in range(layout.rows)
        ]
        after = max(len(row.source) for row in rows)
        starts = [after - len(row.source) for row in rows]
        source = _aligned([row.source for row in rows], after)
        firsts = [start + layout.window.sink_tokens for start in starts]
        pages = [
            (index, first + block * number)
            for index, (first, row) in enumerate(zip(firsts, rows, strict=True))
            for number in range(len(row.whole))
        ] + [
            (index, first + block * (len(row.whole) + number))
            for index, (first, row) in enumerate(zip(firsts, rows, strict=True))
            for number in range(len(row.packed) // block)
        ]
        origins = columns.gather(1, source.clamp(min=0)) if slots else columns
        origins.masked_fill_(~(_aligned([row.real.long() for row in rows], after) > 0), -1)
        holes = Holes(seen, origins.int())
        # Of a row's first tokens that are gone only the holes tell: masks do not, as they do of padding.
        nothing_gone = layout.holes is None and torch.equal(stays, real)
        device = layout.positions.device
        return cls(
            pages,
            torch.tensor([page for row in rows for page in row.whole], dtype=torch.long),
            torch.cat([row.packed for row in rows]),
            torch.cat([row.fillers for row in rows]),
            _aligned([row.sinks for row in rows], layout.window.sink_tokens, left=True),
            _aligned([row.tail for row in rows], max(len(row.tail) for row in rows)),
            starts,
            layout.positions.gather(1, source.clamp(min=0).to(device)) if slots else layout.positions,
            None if nothing_gone or not seen else holes,
        )

    def apply_to_exact(self, exact: ExactTokens) -> None:
        """Let exact tokens of a layer hold what stays of them."""
        sinks, tail = (index.to(exact.sink_keys.device) for index in (self.sinks, self.tail))
        keys = torch.cat([exact.sink_keys, exact.tail_keys], 1)
        sink_keys, tail_keys = _chosen(keys, sinks), _chosen(keys, tail)
        del keys
        values = torch.cat([exact.sink_values, exact.tail_values], 1)
        exact.sink_values = _chosen(values, sinks)
        exact.sink_keys = sink_keys
        exact.replace_tail(tail_keys, _chosen(values, tail))

    def apply_to_codes(self, pages: CodedPages, codec: LayerCodec) -> None:
        """Let codes of a layer be those of what stays; ``codec`` is the layer's, on its device."""
        present = sum(chunk.pages for chunk in pages.chunks)
        if not len(self.packed) and torch.equal(self.whole, torch.arange(present)):
            return
        packed = self._packed_codes(pages, codec) if len(self.packed) else None
        pages.select(self.whole)
        if packed is not None:
            pages.append(*packed)

    def _packed_codes(
        self, pages: CodedPages, codec: LayerCodec
    ) -> tuple[EncodedTokens, int, Outliers | None]:
        """Return the new blocks of a layer: codes, how many, and outliers."""
        block, chunk = pages.block_tokens, pages.all()
        present, own = (self.packed // block).unique(return_inverse=True)
        rows = codec.unseal(EncodedTokens(*(kind.select(present, block) for kind in chunk.encoded)), block)
        device = codec.keys.mean.device
        index = (own * block + self.packed % block).to(device)
        picked = EncodedTokens(*(_rows(kind, index) for kind in rows))
        hidden, outliers = self.fillers.nonzero().squeeze(1).to(device), None
        if chunk.outliers is not None:
            number = torch.full((chunk.pages * block,), -1, device=device)
            number[chunk.outliers.index.long()] = torch.arange(len(chunk.outliers.index), device=device)
            number = number[self.packed.to(device)].masked_fill(self.fillers.to(device), -1)
            at = (number >= 0).nonzero().squeeze(1)
            if len(at):
                keys, values = (t[number[at]] for t in (chunk.outliers.keys, chunk.outliers.values))
                outliers = Outliers(at.to(torch.int32), keys, values)
                hidden = torch.cat([hidden, at])
        sealed = codec.seal(picked, block, hidden)
        return sealed, len(self.packed) // block, outliers


def _plan_row(
    layout: TokenLayout, row: int, blocks: list[int], stays: Tensor, real: Tensor, tail_columns: int
) -> _Row:
    """Work out what stays of a row, whose blocks are these in storage; slots that stay or are tokens."""
    window, start, coded = layout.window, layout.starts[row], layout.coded[row]
    block, sinks = window.block_tokens, window.sink_tokens
    first = min(layout.columns, start + sinks)  # behind the sinks
    kept = stays[first : first + coded].view(-1, block)
    counts, before = kept.sum(1), real[first : first + coded].view(-1, block).sum(1)
    whole, partial = counts == block, (counts > 0) & (counts < block)
    if int(partial.sum()) == 1 and bool((counts == before)[partial].all()):
        whole, partial = whole | partial, torch.zeros_like(partial)  # as full as it can be
    tokens = (kept & partial[:, None]).flatten().nonzero().squeeze(1)
    fill = -len(tokens) % block
    packed = torch.cat([tokens, tokens[-1:].expand(fill)]) if fill else tokens
    fillers = torch.arange(len(packed)) >= len(tokens)
    storage = torch.tensor(blocks, dtype=torch.long)
    own_sinks = stays[start:first].nonzero().squeeze(1) + start
    tail = stays[first + coded :].nonzero().squeeze(1) + first + coded

    def exact(slots: Tensor) -> Tensor:
        """Return where among sinks and tail slots are."""
        tail_start = layout.columns - tail_columns
        return torch.where(slots < first, slots - start, sinks + slots - tail_start)

    if not len(packed) and not bool(whole.any()):  # all is exact: the first tokens are sinks again
        left = torch.cat([own_sinks, tail])
        held = exact(left)
        return _Row(
            left, torch.ones_like(left, dtype=torch.bool), held[:sinks], held[sinks:], [], _NONE, _NONE > 0
        )
    whole_slots = whole.nonzero() * block + torch.arange(block) + first
    sink_slots = torch.arange(start, first)
    source = torch.cat([sink_slots, whole_slots.flatten(), packed + first, tail])
    there = real[source]
    there[: len(sink_slots)] = stays[start:first]
    packed_start = len(source) - len(tail) - len(packed)
    there[packed_start : packed_start + len(packed)] = ~fillers
    return _Row(
        source,
        there,
        torch.where(stays[start:first], exact(sink_slots), -1),
        exact(tail),
        storage[whole].tolist(),
        storage[packed // block] * block + packed % block,
        fillers,
    )


def _aligned(rows: list[Tensor], width: int, left: bool = False) -> Tensor:
    """Return rows of int64 numbers as one tensor, on its right unless ``left``; -1 elsewhere."""
    out = torch.full((len(rows), width), -1)
    for place, row in zip(out, rows, strict=True):
        if len(row):
            place[slice(len(row)) if left else slice(width - len(row), width)] = row
    return out


def _chosen(held: Tensor, index: Tensor) -> Tensor:
    """Return ``held[row, index[row]]`` of ``[rows, n, heads, dim]``; zeros for an index of -1."""
    rows = torch.arange(len(held), device=held.device)[:, None]
    return held[rows, index.clamp(min=0)].masked_fill_((index < 0)[..., None, None], 0)


def _rows(codes: EncodedVectors | object, index: Tensor) -> EncodedVectors:
    assert isinstance(codes, EncodedVectors)  # as what was unsealed is
    return EncodedVectors(codes.words.index_select(0, index), codes.scales.index_select(0, index))
