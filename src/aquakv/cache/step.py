"""One forward pass through the cache: reconstruct, attend, compress, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.reconstruct import Reconstructor
from aquakv.cache.records import Chunk, Outliers
from aquakv.cache.storage import CodedPages, Decoded, ExactTokens
from aquakv.codec import EncodedTokens, History, LayerCodec, ModelCodec
from aquakv.codec.guard import which_are_outliers
from aquakv.config import GuardConfig
from aquakv.models.adapter import ModelAdapter
from aquakv.models.rotary import RotaryTables, rotate

if TYPE_CHECKING:
    from aquakv.cache.encoding import PageEncoder


@dataclass
class Blocks:
    """Blocks of tokens that all layers treat alike in one pass, and the layers before's view of them.

    Attributes
    ----------
    layout
        Where the tokens are.
    pages
        ``(row, first_column)`` of each block, in storage order.
    first_column
        Tensors of columns begin with this one.
    hats
        The tokens' reconstructions at the layers before, as far as predictors reach back.
    """

    layout: TokenLayout
    pages: list[tuple[int, int]]
    first_column: int = 0
    hats: History = ()
    _index: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)
    _runs: dict[int, slice | None] = field(default_factory=dict)
    _tables: dict[tuple[torch.device, str, bool], RotaryTables] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pages)

    def run(self, width: int) -> slice | None:
        """Return where the tokens are if they are one run of a flat ``[rows, width]``, in order."""
        if width not in self._runs:
            layout, first, found = self.layout, self.first_column, None
            tokens = len(self.pages) * layout.window.block_tokens
            if layout.is_contiguous(self.pages):
                start = self.pages[0][1] - first
                found = slice(start, start + tokens)
            elif layout.rows * width == tokens and self.pages == [(row, first) for row in range(layout.rows)]:
                found = slice(0, tokens)  # one block of every row, and nothing else: rows decode in step
            self._runs[width] = found
        return self._runs[width]

    def history(self, device: torch.device) -> History:
        """Return the reconstructions at the layers before, on a device."""
        return tuple(hat.to(device) for hat in self.hats)

    def index(self, device: torch.device, width: int) -> Tensor:
        """Return the tokens' indices in a flat ``[rows, width]``, see `TokenLayout.page_columns`."""
        which = device, width
        if which not in self._index:
            self._index[which] = self.layout.page_columns(self.pages, device, self.first_column, width)
        return self._index[which]

    def tables(
        self, adapter: ModelAdapter, layer_idx: int, keys: Tensor, inverse: bool = False
    ) -> RotaryTables:
        """Return the tokens' cosines and sines, which all layers share that rotate alike.

        With ``inverse``, those that undo the rotation.
        """
        which = keys.device, adapter.rotary_kind(layer_idx), inverse
        if which not in self._tables and inverse:
            self._tables[which] = self.tables(adapter, layer_idx, keys).inverse()
        elif which not in self._tables:
            positions = self.layout.positions
            assert positions is not None  # set by layout.append
            chosen = positions.flatten()[self.layout.page_columns(self.pages, positions.device)]
            self._tables[which] = adapter.rotary_tables(chosen, layer_idx, keys.dtype, keys.device)
        return self._tables[which]

    def place(self, out: Tensor, vectors: Tensor) -> None:
        """Write the tokens' ``vectors`` ``[tokens, heads * head_dim]`` to their columns of ``out``."""
        vectors, flat = vectors.view(-1, *out.shape[2:]), out.view(-1, *out.shape[2:])
        run = self.run(out.shape[1])
        if run is not None:
            flat[run] = vectors
        else:
            flat.index_copy_(0, self.index(out.device, out.shape[1]), vectors.to(out.dtype))

    def gather(self, columns: Tensor) -> Tensor:
        """Return the tokens' vectors ``[tokens, heads, head_dim]`` of ``[rows, width, heads, head_dim]``."""
        run = self.run(columns.shape[1])
        if run is not None and (len(columns) == 1 or columns.is_contiguous()):
            return columns.flatten(0, 1)[run]
        return columns.flatten(0, 1).index_select(0, self.index(columns.device, columns.shape[1]))


class CacheStep:
    """One forward pass in which every layer's codes are reconstructed, attended to and discarded.

    Parameters
    ----------
    adapter
        The model.
    layout
        The cache's tokens, those of this pass included.
    guard
        How many outliers a block may have.
    columns_before
        Columns held before this pass.
    reconstructor
        What reconstructs layers, in passes that do.
    keep_decoded
        Whether layers keep what was reconstructed.

    Attributes
    ----------
    encoder
        Encodes the blocks that are due; None leaves it to the codec. To be set before the first layer.
    """

    #: Whether `run_layer` puts the columns that it takes in into new tensors that hold nothing else.
    columns_are_own = False

    def __init__(
        self,
        adapter: ModelAdapter,
        layout: TokenLayout,
        guard: GuardConfig,
        columns_before: int,
        reconstructor: Reconstructor | None = None,
        keep_decoded: bool = False,
    ) -> None:
        self.next_layer = 0
        self._reconstructor = reconstructor
        self._keeps_decoded = keep_decoded
        self._undecoded: Blocks | None = None  # those that no layer has decoded yet, where layers keep that
        self._guard = guard
        self.adapter = adapter
        self.layout = layout
        self.columns_before = columns_before
        self.coded = Blocks(layout, list(layout.pages))
        self.due = Blocks(layout, layout.blocks_due())
        self.encoder: PageEncoder | None = None

    def run_layer(
        self,
        layer_idx: int,
        codec: LayerCodec,
        pages: CodedPages,
        exact: ExactTokens,
        key_states: Tensor,
        value_states: Tensor,
    ) -> tuple[Any, Any]:
        """Add the pass's tokens to one layer; return all to attend to, as `AquaCache.update` does."""
        keys = self._assemble(exact.sink_keys, exact.tail_keys, key_states.transpose(1, 2))
        values = self._assemble(exact.sink_values, exact.tail_values, value_states.transpose(1, 2))
        if self.coded:
            self._reconstruct(layer_idx, codec, pages, keys, values)
        self._take_in(layer_idx, codec, pages, exact, keys, values)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _take_in(
        self,
        layer_idx: int,
        codec: LayerCodec,
        pages: CodedPages,
        exact: ExactTokens,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Compress what is due, keep the rest exactly, and go on to the next layer."""
        if self.due:
            self._compress(layer_idx, codec, pages, keys, values)
        self._keep_exact(exact, keys, values)
        self.next_layer += 1

    def finish(self) -> None:
        """Record what was compressed, once all layers are through."""
        self.layout.commit(self.due.pages)

    def _reconstruct(
        self, layer_idx: int, codec: LayerCodec, pages: CodedPages, keys: Tensor, values: Tensor
    ) -> None:
        """Write the older tokens, as their codes give them, to their columns."""
        if self._keeps_decoded:
            decoded = pages.decoded
            known = 0 if decoded is None else decoded.pages
            if self._undecoded is None:
                self._undecoded = Blocks(self.layout, self.coded.pages[known:])
            if self._undecoded:
                new = self._decode(self._undecoded, pages.since(known), layer_idx, codec, keys)
                decoded = pages.decoded = new if decoded is None else decoded.join(new)
            assert decoded is not None  # there are codes
        else:
            decoded = self._decode(self.coded, pages.all(), layer_idx, codec, keys)
        self.coded.place(keys, decoded.keys)
        self.coded.place(values, decoded.values)

    def _decode(
        self, blocks: Blocks, chunk: Chunk, layer_idx: int, codec: LayerCodec, keys: Tensor
    ) -> Decoded:
        """Return what blocks' codes give for attention, in the dtype and with the heads of ``keys``."""
        history = blocks.history(keys.device)
        like = keys.new_empty(0, dtype=reconstruction_dtype(keys))
        assert self._reconstructor is not None  # given to passes that come here
        hat = self._reconstructor.reconstruct(
            self.next_layer, chunk.encoded, self.layout.window.block_tokens, history, like
        )
        tables = blocks.tables(self.adapter, layer_idx, keys)
        key_hat = (hat.keys + codec.keys.mean).view(-1, *keys.shape[2:])
        key_hat = rotate(key_hat, tables).to(keys.dtype)
        value_hat = (hat.values + codec.values.mean).view(-1, *keys.shape[2:]).to(keys.dtype)
        if chunk.outliers is not None:
            key_hat.index_copy_(0, chunk.outliers.index.long(), chunk.outliers.keys)
            value_hat.index_copy_(0, chunk.outliers.index.long(), chunk.outliers.values)
        blocks.hats = codec.extend(history, hat)
        return Decoded(chunk.pages, key_hat, value_hat)

    def _compress(
        self, layer_idx: int, codec: LayerCodec, pages: CodedPages, keys: Tensor, values: Tensor
    ) -> None:
        """Encode the blocks that are due; this pass still attends to their exact values."""
        exact_keys, exact_values = self.due.gather(keys), self.due.gather(values)
        codes, excess = self._encode(layer_idx, codec, exact_keys, exact_values)
        outliers, chosen, block = None, None, pages.block_tokens
        if excess is not None:
            taken = which_are_outliers(excess, block, self._guard.most(block))
            if self.encoder is not None:
                self.encoder.take_out(codes, taken)
            chosen = taken.nonzero().squeeze(1)
            if len(chosen):
                outliers = Outliers(chosen.to(torch.int32), exact_keys[chosen], exact_values[chosen])
        if self.encoder is None:
            codes = codec.seal(codes, block, chosen)
        pages.append(codes, len(self.due.pages), outliers)

    def _encode(
        self, layer_idx: int, codec: LayerCodec, exact_keys: Tensor, exact_values: Tensor
    ) -> tuple[EncodedTokens, Tensor | None]:
        """Encode the tokens that are due; also return their excess, see `LayerCodec.excess`.

        Codes are as rows of tokens without an encoder; otherwise in pages, and all of them attended to.
        """
        tables = self.due.tables(self.adapter, layer_idx, exact_keys, inverse=True)
        key_block, value_block = rotate(exact_keys, tables).flatten(1), exact_values.flatten(1)
        if self.encoder is not None:
            return self.encoder.encode(self.next_layer, key_block, value_block)
        history = self.due.history(exact_keys.device)
        codes, hat = codec.encode(key_block, value_block, history)
        self.due.hats = codec.extend(history, hat)
        return codes, codec.excess(key_block, value_block, hat)

    def _assemble(self, sinks: Tensor, tail: Tensor, new: Tensor) -> Tensor:
        """Lay out all columns ``[rows, columns, heads, head_dim]``, compressed ones not yet written."""
        rows, _, heads, dim = new.shape
        before = self.columns_before
        if before == 0:
            return new
        out = new.new_empty(rows, self.layout.columns, heads, dim)
        tail_start = before - tail.shape[1]
        out[:, tail_start:before] = tail
        out[:, before:] = new
        if tail_start == 0:
            return out
        for row, start in enumerate(self.layout.starts):
            out[row, : min(start, tail_start)] = 0
            held = min(self.layout.window.sink_tokens, before - start)
            if held > 0:
                out[row, start : start + held] = sinks[row, :held]
        return out

    def _keep_exact(self, exact: ExactTokens, keys: Tensor, values: Tensor) -> None:
        """Copy what stays exact out of the columns at hand, so that these can be freed."""
        self._keep_sinks(exact, keys, values)
        first = self._first_kept
        if self.columns_are_own and first == 0:
            exact.replace_tail(keys, values)
            return
        exact.replace_tail(
            keys[:, first:].clone(memory_format=torch.contiguous_format),
            values[:, first:].clone(memory_format=torch.contiguous_format),
        )

    def _keep_sinks(self, exact: ExactTokens, keys: Tensor, values: Tensor) -> None:
        """Copy the pass's sinks out of the columns at hand."""
        for row, held, new in self._new_sinks:
            exact.sink_keys[row, held] = keys[row, new]
            exact.sink_values[row, held] = values[row, new]

    @cached_property
    def _new_sinks(self) -> list[tuple[int, slice, slice]]:
        """Rows that get sinks in this pass; which of their sinks; where in the columns at hand."""
        before, window, found = self.due.first_column, self.layout.window, []
        for row, start in enumerate(self.layout.starts):
            first = max(start, self.columns_before)
            last = min(start + window.sink_tokens, self.layout.columns)
            if first < last:
                found.append((row, slice(first - start, last - start), slice(first - before, last - before)))
        return found

    @cached_property
    def _first_kept(self) -> int:
        """The first of the columns at hand that some row has not compressed after this pass."""
        due = Counter(row for row, _ in self.due.pages)
        first = min(
            first + due[row] * self.layout.window.block_tokens
            for row, first in enumerate(self.layout.first_exact_columns())
        )
        return first - self.due.first_column


class CodesStep(CacheStep):
    """A forward pass that attends to the codes and puts only the columns that layers hold exactly together.

    Parameters
    ----------
    adapter, layout, guard, columns_before
        As for `CacheStep`.
    codec
        Of the whole model.
    tail_columns
        Columns that layers hold exactly behind the compressed ones, before this pass.
    mask
        ``[rows, columns]``, nonzero where a token may be attended to; None if all that are real may.
    """

    columns_are_own = True

    def __init__(
        self,
        adapter: ModelAdapter,
        layout: TokenLayout,
        guard: GuardConfig,
        columns_before: int,
        codec: ModelCodec,
        tail_columns: int,
        mask: Tensor | None,
    ) -> None:
        super().__init__(adapter, layout, guard, columns_before)
        self.due.first_column = columns_before - tail_columns
        self._codec = codec
        self._mask = mask

    def _held(self, exact: ExactTokens, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of held and new columns, ``[rows, columns, heads, head_dim]`` each."""
        keys = torch.cat([exact.tail_keys, key_states.transpose(1, 2)], 1)
        return keys, torch.cat([exact.tail_values, value_states.transpose(1, 2)], 1)


def reconstruction_dtype(key_states: Tensor) -> torch.dtype:
    """Return the dtype that codes are reconstructed in: the keys' own, but not float16 on a CPU."""
    on_cpu_half = key_states.device.type == "cpu" and key_states.dtype == torch.float16
    return torch.float32 if on_cpu_half else key_states.dtype
