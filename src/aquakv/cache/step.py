"""One forward pass through the cache: reconstruct, attend, compress, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.reconstruct import Reconstructor
from aquakv.cache.records import Chunk, Outliers
from aquakv.cache.storage import CodedPages, Decoded, ExactTokens
from aquakv.codec import History, LayerCodec, ModelCodec
from aquakv.codec.guard import choose_outliers
from aquakv.config import GuardConfig
from aquakv.models.adapter import ModelAdapter
from aquakv.models.rotary import RotaryTables, rotate, unrotate

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
    _index: dict[torch.device, Tensor] = field(default_factory=dict)
    _tables: dict[tuple[torch.device, str], RotaryTables] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pages)

    @cached_property
    def run(self) -> slice | None:
        """The blocks' columns if they are one run of a single row."""
        if not self.layout.is_contiguous(self.pages):
            return None
        first = self.pages[0][1] - self.first_column
        return slice(first, first + len(self.pages) * self.layout.window.block_tokens)

    def history(self, device: torch.device) -> History:
        """Return the reconstructions at the layers before, on a device."""
        return tuple(hat.to(device) for hat in self.hats)

    def index(self, device: torch.device) -> Tensor:
        """Return the tokens' flat indices, see `TokenLayout.page_columns`."""
        if device not in self._index:
            self._index[device] = self.layout.page_columns(self.pages, device, self.first_column)
        return self._index[device]

    def tables(self, adapter: ModelAdapter, layer_idx: int, keys: Tensor) -> RotaryTables:
        """Return the tokens' cosines and sines, which all layers share that rotate alike."""
        which = keys.device, adapter.rotary_kind(layer_idx)
        if which not in self._tables:
            positions = self.layout.positions
            assert positions is not None  # set by layout.append
            chosen = positions.flatten()[self.layout.page_columns(self.pages, positions.device)]
            self._tables[which] = adapter.rotary_tables(chosen, layer_idx, keys.dtype, keys.device)
        return self._tables[which]

    def place(self, out: Tensor, vectors: Tensor) -> None:
        """Write the tokens' ``vectors`` ``[tokens, heads * head_dim]`` to their columns of ``out``."""
        vectors = vectors.view(-1, *out.shape[2:])
        if self.run is not None:
            out[0, self.run] = vectors
        else:
            out.view(-1, *out.shape[2:]).index_copy_(0, self.index(out.device), vectors.to(out.dtype))

    def gather(self, columns: Tensor) -> Tensor:
        """Return the tokens' vectors, ``[tokens, heads, head_dim]``."""
        if self.run is not None:
            return columns[0, self.run]
        return columns.flatten(0, 1).index_select(0, self.index(columns.device))


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
        tables = self.due.tables(self.adapter, layer_idx, keys)
        exact_keys, exact_values = self.due.gather(keys), self.due.gather(values)
        key_block, value_block = unrotate(exact_keys, tables).flatten(1), exact_values.flatten(1)
        if self.encoder is None:
            history = self.due.history(keys.device)
            codes, hat = codec.encode(key_block, value_block, history)
            excess = codec.excess(key_block, value_block, hat)
            self.due.hats = codec.extend(history, hat)
        else:
            codes, excess = self.encoder.encode(self.next_layer, key_block, value_block)
        outliers, chosen = None, None
        if excess is not None:
            chosen = choose_outliers(excess, pages.block_tokens, self._guard.most(pages.block_tokens))
            if len(chosen):
                outliers = Outliers(chosen.to(torch.int32), exact_keys[chosen], exact_values[chosen])
        if self.encoder is None:
            codes = codec.seal(codes, pages.block_tokens, chosen)
        elif outliers is not None:
            self.encoder.take_out(codes, outliers.index)
        pages.append(codes, len(self.due.pages), outliers)

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
        first = self._first_kept()
        if self.columns_are_own and first == 0:
            exact.replace_tail(keys, values)
            return
        exact.replace_tail(
            keys[:, first:].clone(memory_format=torch.contiguous_format),
            values[:, first:].clone(memory_format=torch.contiguous_format),
        )

    def _keep_sinks(self, exact: ExactTokens, keys: Tensor, values: Tensor) -> None:
        """Copy the pass's sinks out of the columns at hand."""
        before, window = self.due.first_column, self.layout.window
        for row, start in enumerate(self.layout.starts):
            first = max(start, self.columns_before)
            last = min(start + window.sink_tokens, self.layout.columns)
            if first < last:
                held, new = slice(first - start, last - start), slice(first - before, last - before)
                exact.sink_keys[row, held] = keys[row, new]
                exact.sink_values[row, held] = values[row, new]

    def _first_kept(self) -> int:
        """Return the first of the columns at hand that some row has not compressed after this pass."""
        due_rows = [row for row, _ in self.due.pages]
        first = min(
            first + due_rows.count(row) * self.layout.window.block_tokens
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
