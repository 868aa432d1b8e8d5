"""A decode step that leaves attention to codes to `aquakv.kernels`: one new token a row, codes in pages.

What the kernels need to know of pages is the same at all layers and changes with the pages only, so that a
step in which nothing is compressed makes no tensor out of the host's numbers and waits for nothing. Of what
the host knows only the number of columns changes from step to step; the device has it in one tensor.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.step import CodesStep
from aquakv.cache.storage import CodedPages, ExactTokens, Outliers, storage_bytes
from aquakv.codec import EncodedPages, LayerCodec, ModelCodec
from aquakv.config import GuardConfig
from aquakv.kernels import DecodeOperands, PagedCodes, PageRotary, attend_codes, hopper
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.exact import HeldTokens, attend_exact
from aquakv.kernels.from_codec import decode_operands
from aquakv.kernels.operands import HEAD_DIMS, MAX_RANK
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.pages import PAGE_TOKENS

_log = logging.getLogger(__name__)


def why_not_paged(codec: ModelCodec, block_tokens: int) -> str | None:
    """Return why kernels cannot attend to a codec's pages, or None if they can."""
    if block_tokens % PAGE_TOKENS:
        return f"blocks of {block_tokens} tokens are no whole pages of {PAGE_TOKENS}"
    for layer in codec.layers:
        if layer.keys.pages is None or layer.values.pages is None:
            return "the codec keeps its codes as rows of tokens"
        if layer.keys.predictor is not None and (layer.keys.predictor.rank or 0) > MAX_RANK:
            return f"its latents have more than {MAX_RANK} numbers"
    if codec.fingerprint.head_dim % 2:
        return "heads have an odd number of coordinates"
    return None


def attends_with_kernels(backend: Backend, head_dim: int, like: Tensor) -> bool:
    """Tell whether kernels are to attend on a tensor's device: where they run, or because it was asked for.

    Raises
    ------
    ConfigError
        A backend was asked for that cannot run there.
    """
    chosen = resolve_backend(backend, like, whole_step=True)
    return backend != "auto" or (chosen == "triton" and head_dim in HEAD_DIMS)


@dataclass(frozen=True)
class OutlierRows:
    """A layer's outliers by row.

    Attributes
    ----------
    index
        ``[rows, most]`` int64: which of the layer's outliers; None for a single row, which has them all.
    present
        ``[rows, most]`` bool: whether there is such an outlier.
    """

    index: Tensor | None
    present: Tensor


@dataclass(frozen=True)
class PageTables:
    """Where the pages of each row are, on one device; the same at all layers.

    Attributes
    ----------
    table, lengths
        As in `PagedCodes`.
    rotary
        Of the pages.
    starts, coded
        ``[rows, 1]`` int64: column of each row's first token; its compressed tokens.
    block_rows
        ``[blocks]`` int64: the row of every block, in storage order.
    most_blocks
        Blocks of the row that has most.
    """

    table: Tensor
    lengths: Tensor
    rotary: PageRotary
    starts: Tensor
    coded: Tensor
    block_rows: Tensor
    most_blocks: int

    @classmethod
    def build(
        cls,
        layout: TokenLayout,
        adapter: ModelAdapter,
        layer_idx: int,
        device: torch.device,
    ) -> PageTables:
        """Build the tables."""
        each = layout.window.block_tokens // PAGE_TOKENS
        numbers: list[list[int]] = [[] for _ in range(layout.rows)]
        columns: list[list[int]] = [[] for _ in range(layout.rows)]
        for block, (row, first) in enumerate(layout.pages):
            numbers[row].extend(range(block * each, (block + 1) * each))
            columns[row].extend(row * layout.columns + first + PAGE_TOKENS * page for page in range(each))
        most = max(map(len, numbers))

        def on_device(values: list[list[int]] | list[int], kind: torch.dtype) -> Tensor:
            # From memory that is not pinned the copy is over when the call returns, but nobody waits for it.
            return torch.tensor(values, dtype=kind).to(device, non_blocking=True)

        def padded(lists: list[list[int]]) -> list[list[int]]:
            return [[*numbers, *[0] * (most - len(numbers))] for numbers in lists]

        assert layout.positions is not None  # set by layout.append
        first_tokens = on_device(padded(columns), torch.int64)
        positions = layout.positions.to(device).flatten()[first_tokens.flatten()]
        offsets = torch.arange(PAGE_TOKENS, device=device)
        found = adapter.rotary_tables(torch.cat([positions, offsets]), layer_idx, torch.float32, device)
        cos, sin = found.cos[:, 0], found.sin[:, 0]
        shape = (layout.rows, most, -1)
        rotary = PageRotary.from_model(
            (cos[:-PAGE_TOKENS].view(shape), sin[:-PAGE_TOKENS].view(shape)),
            (cos[-PAGE_TOKENS:], sin[-PAGE_TOKENS:]),
            torch.float32,
        )
        return cls(
            on_device(padded(numbers), torch.int32),
            on_device(layout.coded, torch.int32),
            rotary,
            on_device(layout.starts, torch.int64)[:, None],
            on_device(layout.coded, torch.int64)[:, None],
            on_device([row for row, _ in layout.pages], torch.int64),
            most // each,
        )

    def group(self, outliers: Outliers, block_tokens: int, most_per_block: int) -> OutlierRows:
        """Return outliers by row, without asking the device how many each row has."""
        count, rows = len(outliers.index), len(self.table)
        if rows == 1:
            return OutlierRows(None, torch.ones(1, count, dtype=torch.bool, device=outliers.index.device))
        most = min(count, self.most_blocks * most_per_block)
        row = self.block_rows[outliers.index.long() // block_tokens]
        own = row[:, None] == torch.arange(rows, device=row.device)
        place = own.cumsum(0).gather(1, row[:, None])[:, 0] - 1
        index = torch.zeros(rows, most, dtype=torch.int64, device=row.device)
        index[row, place] = torch.arange(count, device=row.device)
        present = torch.arange(most, device=row.device) < own.sum(0)[:, None]
        return OutlierRows(index, present)

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
        device, first = self.starts.device, places.first_column
        columns = torch.arange(first, first + places.capacity, device=device)
        held = (places.columns - 1 - self.starts).clamp(0, sinks)  # sinks kept before this pass
        seen = columns >= self.starts + torch.where(self.coded > 0, sinks + self.coded, held)
        seen = torch.cat([torch.arange(sinks, device=device) < held, seen & (columns < places.columns)], 1)
        return seen if places.allowed is None else seen & places.allowed


@dataclass(frozen=True)
class ExactPlaces:
    """Where a pass's exact tokens are, on one device; the same at all layers.

    Attributes
    ----------
    columns
        ``[1]`` int64: all columns, the new one included. Nothing else changes from pass to pass until
        something is compressed.
    first_column
        Where the tail begins.
    capacity
        Columns that the tail has room for.
    allowed
        ``[rows, sinks + capacity]`` bool: what the mask allows; None without a mask.
    """

    columns: Tensor
    first_column: int
    capacity: int
    allowed: Tensor | None

    @property
    def new(self) -> Tensor:
        """``[1]`` int64: where in the tail the new column goes."""
        return self.columns - (self.first_column + 1)


class LateAnswer:
    """A truth that a device works out, read later: by then the host hardly has to wait for it.

    Parameters
    ----------
    value
        One bool, on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._known: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._known = torch.cuda.Event()
            self._known.record(torch.cuda.current_stream(value.device))

    def get(self) -> bool:
        """Return it; waits for what the device had to do before it, and no more."""
        if self._known is not None:
            self._known.synchronize()
        return bool(self._value)


class PagedState:
    """What a cache keeps for kernels between steps, made anew when its pages or rows have changed."""

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend = backend
        self._version = -1
        self._tables: dict[torch.device, PageTables] = {}
        self._outliers: dict[int, OutlierRows] = {}
        self._unmasked: bool | None = None
        self._last_mask_saw_all: LateAnswer | None = None
        self._columns: dict[torch.device, Tensor] = {}

    def columns_on(self, device: torch.device, columns: int) -> Tensor:
        """Return the number of columns, ``[1]`` int64 on a device, always in the same place."""
        if device not in self._columns:
            self._columns[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._columns[device].fill_(columns)

    def tables(
        self,
        layout: TokenLayout,
        adapter: ModelAdapter,
        layer_idx: int,
        device: torch.device,
    ) -> PageTables:
        """Return the tables of the present pages."""
        self._drop_old(layout)
        if device not in self._tables:
            self._tables[device] = PageTables.build(layout, adapter, layer_idx, device)
        return self._tables[device]

    def outliers(
        self, layout: TokenLayout, layer_idx: int, outliers: Outliers, tables: PageTables, most: int
    ) -> OutlierRows:
        """Return a layer's present outliers by row; a block has at most ``most``."""
        self._drop_old(layout)
        if layer_idx not in self._outliers:
            self._outliers[layer_idx] = tables.group(outliers, layout.window.block_tokens, most)
        return self._outliers[layer_idx]

    def _drop_old(self, layout: TokenLayout) -> None:
        if self._version != layout.version:
            self._tables.clear()
            self._outliers.clear()
            self._version = layout.version

    def look_at(self, layout: TokenLayout, mask: Tensor | None) -> None:
        """Find out whether a mask hides compressed tokens, which may take a wait for the device."""
        self._unmasked = self._last_mask_saw_all = None
        if mask is None or mask.shape[1] < layout.columns:
            return
        index = layout.page_columns(layout.pages, mask.device)
        real = mask[:, : layout.columns].ne(0).expand(layout.rows, -1).reshape(-1)
        self._unmasked = bool(real[index].all())

    def sees_all(self, layout: TokenLayout, mask: Tensor | None) -> bool:
        """Tell whether all compressed tokens are seen, without waiting for what a device has yet to do.

        On a GPU a mask says of compressed tokens what the last one said, which was looked at then or, if not,
        was left to the device: so a mask that comes to hide some is noticed one step late.
        """
        if mask is None:
            self._unmasked = self._last_mask_saw_all = None
            return True
        if self._unmasked is None or self._tells_at_once(mask):
            self.look_at(layout, mask)
        elif self._last_mask_saw_all is not None and not self._last_mask_saw_all.get():
            self._unmasked = False
            _log.warning("an attention mask came to hide compressed tokens; the step before attended to them")
        self._last_mask_saw_all = None
        tables = self._tables.get(mask.device) if self._version == layout.version else None
        if self._unmasked and tables is not None and not self._tells_at_once(mask):
            column = torch.arange(layout.columns, device=mask.device)
            first = tables.starts + layout.window.sink_tokens
            coded = (column >= first) & (column < first + tables.coded)
            self._last_mask_saw_all = LateAnswer((mask[:, : layout.columns].ne(0) | ~coded).all())
        return bool(self._unmasked)

    @staticmethod
    def _tells_at_once(mask: Tensor) -> bool:
        """Tell whether the host can read a mask without waiting."""
        return mask.device.type == "cpu"

    def footprint(self) -> int:
        """Return the bytes of all tables, with those that kernels keep beside them."""
        turns = [tensor for one in self._tables.values() for tensor in hopper.kept_turns(one.rotary)]
        tables = [
            tensor
            for one in self._tables.values()
            for part in (one, one.rotary)
            for tensor in vars(part).values()
            if isinstance(tensor, Tensor)
        ]
        return storage_bytes(
            *tables,
            *self._columns.values(),
            *turns,
            *(tensor for rows in self._outliers.values() for tensor in (rows.index, rows.present)),
        )


def operands_on(
    codec: ModelCodec, index: int, rotary_dim: int, device: torch.device, dtype: torch.dtype
) -> DecodeOperands:
    """Return what the kernels multiply with at compressed layer ``index``, kept by the codec."""

    def make() -> DecodeOperands:
        following = codec.layer_on(index + 1, device) if index + 1 < len(codec.layers) else None
        return decode_operands(
            codec.layer_on(index, device),
            following,
            num_kv_heads=codec.fingerprint.num_kv_heads,
            rotary_dim=rotary_dim,
            dtype=dtype,
        )

    return codec.derived(("decode operands", index, rotary_dim, device, dtype), make)


class PagedStep(CodesStep):
    """A forward pass of one token a row in which kernels attend to the codes.

    Parameters
    ----------
    adapter, layout, guard, columns_before, codec, tail_columns, mask
        As for `CodesStep`; `why_not_paged` must find nothing in the codec, and the mask hides no compressed
        token.
    state
        The cache's.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        layout: TokenLayout,
        guard: GuardConfig,
        columns_before: int,
        codec: ModelCodec,
        tail_columns: int,
        mask: Tensor | None,
        state: PagedState,
    ) -> None:
        super().__init__(adapter, layout, guard, columns_before, codec, tail_columns, mask)
        self.state = state
        self.latents: Tensor | None = None
        window = layout.window
        self._capacity = max(window.recent_window + window.block_tokens, tail_columns + 1)
        self._places: dict[torch.device, ExactPlaces] = {}
        # Of the device's making, so that a graph makes them anew.
        self._seen: dict[torch.device, Tensor] = {}
        self._new: dict[torch.device, Tensor] = {}

    @property
    def masked(self) -> bool:
        """Whether there is an attention mask."""
        return self._mask is not None

    def places_on(self, device: torch.device, layer_idx: int) -> ExactPlaces:
        """Return where exact tokens are, on a device; at the first call, tell the device the columns."""
        if device not in self._places:
            first, allowed = self.due.first_column, None
            if self._mask is not None:
                tables = self.state.tables(self.layout, self.adapter, layer_idx, device)
                allowed = tables.allowed(self.layout, first, self._capacity, self._mask)
            columns = self.state.columns_on(device, self.layout.columns)
            self._places[device] = ExactPlaces(columns, first, self._capacity, allowed)
        return self._places[device]

    def run_layer(
        self,
        layer_idx: int,
        codec: LayerCodec,
        pages: CodedPages,
        exact: ExactTokens,
        key_states: Tensor,
        value_states: Tensor,
    ) -> tuple[PagedView, PagedView]:
        """Add the pass's token to one layer; return what attention takes in place of keys and values."""
        device, layout = key_states.device, self.layout
        places = self.places_on(device, layer_idx)
        exact.reserve(places.capacity)
        tables = self.state.tables(layout, self.adapter, layer_idx, device)
        if device not in self._seen:
            self._seen[device] = tables.exact_seen(places, layout.window.sink_tokens)
            self._new[device] = places.new
        exact.add(self._new[device], key_states.transpose(1, 2), value_states.transpose(1, 2))
        chosen = resolve_backend(self.state.backend, key_states, whole_step=True)
        dtype = torch.float32 if chosen == "torch" else torch.float16
        seen, chunk = self._seen[device], pages.all()
        outliers, index = chunk.outliers, None
        if outliers is not None:
            most = self._guard.most(pages.block_tokens)
            rows = self.state.outliers(layout, layer_idx, outliers, tables, most)
            index, seen = rows.index, torch.cat([seen, rows.present], 1)
        tail = exact.key_buffer, exact.value_buffer
        if self._first_kept():  # what is kept moves within the buffers before anything attends
            tail = tail[0].clone(), tail[1].clone()
        held = HeldTokens(
            exact.sink_keys,
            exact.sink_values,
            *tail,
            None if outliers is None else outliers.keys,
            None if outliers is None else outliers.values,
            index,
            seen,
        )
        encoded_keys, encoded_values = chunk.encoded
        assert isinstance(encoded_keys, EncodedPages)  # `why_not_paged` has seen to it
        assert isinstance(encoded_values, EncodedPages)
        view = PagedView(
            self,
            PagedCodes(encoded_keys.records, encoded_values.records, tables.table, tables.lengths),
            operands_on(self._codec, self.next_layer, 2 * tables.rotary.page_cos.shape[-1], device, dtype),
            tables.rotary,
            held,
            self.state.backend,
        )
        self._take_in(layer_idx, codec, pages, exact, exact.tail_keys, exact.tail_values)
        return view, view

    def _keep_exact(self, exact: ExactTokens, keys: Tensor, values: Tensor) -> None:
        """Take the sinks out of the tail; forget what has been compressed of it."""
        self._keep_sinks(exact, keys, values)
        first = self._first_kept()
        if first:
            exact.drop_first(first)


@dataclass(frozen=True)
class PagedView:
    """One layer's tokens, in place of keys and values, for `attend`, which must be called once.

    Attributes
    ----------
    step
        The pass; it carries the latents from layer to layer.
    codes, operands, rotary, backend
        For the kernels.
    held
        Sinks, the tail and its spare columns, outliers; and which of these are seen.
    """

    step: PagedStep
    codes: PagedCodes
    operands: DecodeOperands
    rotary: PageRotary
    held: HeldTokens
    backend: Backend

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Attend to all tokens; parameters and result as for `CodedView.attend`, with one query a row."""
        latents, asked = self.step.latents, query[:, :, 0]
        coded = attend_codes(
            asked,
            self.codes,
            None if latents is None else latents.to(query.device),
            self.operands,
            self.rotary,
            scaling=scaling,
            softcap=softcap,
            backend=self.backend,
        )
        self.step.latents = coded.next_latents
        return attend_exact(
            asked,
            self.held,
            coded.out,
            coded.lse,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
            backend=self.backend,
        )[:, None]
