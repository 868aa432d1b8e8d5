"""A decode step that leaves attention to codes to `aquakv.kernels`: one new token a row, codes in pages.

What the kernels need to know of pages is the same at all layers and changes with the pages only, so that a
step in which nothing is compressed makes no tensor out of the host's numbers and waits for nothing. Of what
the host knows only the number of columns changes from step to step; the device has it in one tensor. Where a
block is compressed, records and tables have room for it (`records`, `tables`) and stay where they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import Records, storage_bytes
from aquakv.cache.step import CodesStep
from aquakv.cache.storage import CodedPages, ExactTokens
from aquakv.cache.tables import ExactPlaces, OutlierRows, PageTables
from aquakv.codec import LayerCodec, ModelCodec
from aquakv.config import GuardConfig
from aquakv.kernels import DecodeOperands, PagedCodes, PageRotary, attend_codes
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
    """What a cache keeps for kernels between steps.

    It is brought up to date in place when pages are added, and made anew when rows are selected or there is
    no room.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend = backend
        self._selections = 0
        self._tables: dict[torch.device, PageTables] = {}
        self._outliers: dict[int, OutlierRows] = {}
        self._places: dict[torch.device, ExactPlaces] = {}
        self._unmasked: bool | None = None
        self._last_mask_saw_all: LateAnswer | None = None

    def count_columns(self, device: torch.device, columns: int) -> None:
        """Tell a device how many columns there are, once `places` has told it where they are."""
        self._places[device].columns.fill_(columns)

    def places(
        self,
        layout: TokenLayout,
        device: torch.device,
        first_column: int,
        capacity: int,
        mask: Tensor | None,
    ) -> ExactPlaces:
        """Tell a device where exact tokens are, by tables that are up to date; always in the same place.

        The tail begins at ``first_column`` and has room for ``capacity`` columns; ``mask`` is the pass's.
        """
        sinks, held = layout.window.sink_tokens, self._places.get(device)
        if (
            held is None
            or held.capacity != capacity
            or (held.allowed is None) != (mask is None)
            or (held.allowed is not None and len(held.allowed) != layout.rows)
        ):
            held = ExactPlaces.empty(layout.rows, sinks, capacity, mask is not None, device)
            self._places[device] = held
        held.columns.fill_(layout.columns)
        held.first_column.fill_(first_column)
        if held.allowed is not None and mask is not None:
            held.allowed.copy_(self._tables[device].allowed(layout, first_column, capacity, mask))
        return held

    def tables(
        self,
        layout: TokenLayout,
        adapter: ModelAdapter,
        layer_idx: int,
        device: torch.device,
        records: Records,
    ) -> PageTables:
        """Return the tables of the present pages, which a layer's records hold."""
        if self._selections != layout.selections:
            self._tables.clear()
            self._outliers.clear()
            self._selections = layout.selections
        held = self._tables.get(device)
        if held is None or not held.fit(layout, records):
            held = self._tables[device] = PageTables.build(layout, adapter, layer_idx, device, records)
        elif held.version != layout.version:
            held.update(layout, adapter, layer_idx)
        return held

    def outliers(
        self, layout: TokenLayout, layer_idx: int, records: Records, tables: PageTables, most: int
    ) -> OutlierRows | None:
        """Return a layer's present outliers by row, if it can have some.

        A block was encoded with at most ``most``. One that was packed has at most twice as many, if its
        positions follow each other as they must here: it has taken tokens of two blocks then.
        """
        most = most if layout.holes is None else 2 * most
        if records.places is None:
            return None
        held = self._outliers.get(layer_idx)
        same = held is not None and held.source is records.places.index
        if held is not None and same and held.version == layout.version:
            return held
        found = tables.group(records.places, records.outlier_count, layout.window.block_tokens, most)
        if held is not None and same and held.present.shape == found.present.shape:
            held.renew(found)
        else:
            held = self._outliers[layer_idx] = found
        return held

    @property
    def sees_some_only(self) -> bool:
        """Whether the last mask that was looked at hides compressed tokens."""
        return self._unmasked is False

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
        tables = self._tables.get(mask.device)
        current = tables is not None and tables.version == layout.version
        if self._unmasked and tables is not None and current and not self._tells_at_once(mask):
            column = torch.arange(layout.columns, device=mask.device)
            first = tables.starts + layout.window.sink_tokens
            coded = (column >= first) & (column < first + tables.coded)
            self._last_mask_saw_all = LateAnswer((mask[:, : layout.columns].ne(0) | ~coded).all())
        return bool(self._unmasked)

    @staticmethod
    def _tells_at_once(mask: Tensor) -> bool:
        """Tell whether the host can read a mask without waiting."""
        return mask.device.type == "cpu"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What kernels read, with what they keep beside it."""
        parts = (*self._tables.values(), *self._outliers.values(), *self._places.values())
        return tuple(tensor for part in parts for tensor in part.tensors)

    def footprint(self) -> int:
        """Return the bytes of all tables, room for more included."""
        return storage_bytes(*self.tensors, *(tables.block_rows for tables in self._tables.values()))


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
        self._layers: list[tuple[int, torch.device, Records]] = []

    @property
    def masked(self) -> bool:
        """Whether there is an attention mask."""
        return self._mask is not None

    def places_on(self, device: torch.device, layer_idx: int, records: Records) -> ExactPlaces:
        """Return where exact tokens are, on a device; at the first call, tell the device."""
        if device not in self._places:
            self.state.tables(self.layout, self.adapter, layer_idx, device, records)
            first = self.due.first_column
            self._places[device] = self.state.places(self.layout, device, first, self._capacity, self._mask)
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
        device, layout, records = key_states.device, self.layout, pages.records
        assert records is not None  # `why_not_paged` has seen to it
        guarded = codec.keys.guard is not None and codec.values.guard is not None
        most = self._guard.most(pages.block_tokens)
        records.make_room(layout.rows, most if guarded else 0, exact.sink_keys, exact.sink_values)
        places = self.places_on(device, layer_idx, records)
        exact.reserve(places.capacity)
        tables = self.state.tables(layout, self.adapter, layer_idx, device, records)
        if device not in self._seen:
            self._seen[device] = tables.exact_seen(places, layout.window.sink_tokens)
            self._new[device] = places.new
        exact.add(self._new[device], key_states.transpose(1, 2), value_states.transpose(1, 2))
        chosen = resolve_backend(self.state.backend, key_states, whole_step=True)
        dtype = torch.float32 if chosen == "torch" else torch.float16
        outliers = records.places
        rows = self.state.outliers(layout, layer_idx, records, tables, most)
        tail = exact.key_buffer, exact.value_buffer
        if self._first_kept:  # what is kept moves within the buffers before anything attends
            tail = tail[0].clone(), tail[1].clone()
        held = HeldTokens(
            exact.sink_keys,
            exact.sink_values,
            *tail,
            None if outliers is None else outliers.keys,
            None if outliers is None else outliers.values,
            None if rows is None else rows.index,
            self._seen[device],
            None if rows is None else rows.present,
        )
        view = PagedView(
            self,
            PagedCodes(records.keys, records.values, tables.table, tables.lengths),
            operands_on(self._codec, self.next_layer, 2 * tables.rotary.page_cos.shape[-1], device, dtype),
            tables.rotary,
            held,
            self.state.backend,
        )
        self._take_in(layer_idx, codec, pages, exact, exact.tail_keys, exact.tail_values)
        return view, view

    def compress_layer(
        self, layer_idx: int, codec: LayerCodec, pages: CodedPages, exact: ExactTokens
    ) -> None:
        """Compress what is due at one layer, in whose tail the pass's token is already."""
        assert pages.records is not None  # `why_not_paged` has seen to it
        self.places_on(exact.tail_keys.device, layer_idx, pages.records)
        self._take_in(layer_idx, codec, pages, exact, exact.tail_keys, exact.tail_values)

    def _take_in(
        self,
        layer_idx: int,
        codec: LayerCodec,
        pages: CodedPages,
        exact: ExactTokens,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Note the layer for `settle` as well."""
        super()._take_in(layer_idx, codec, pages, exact, keys, values)
        assert pages.records is not None  # as above
        self._layers.append((layer_idx, keys.device, pages.records))

    def settle(self, tail_columns: int) -> None:
        """Tell devices what was compressed, once all layers have attended.

        ``tail_columns`` are held exactly after the pass.
        """
        if not self.due:
            return
        most = self._guard.most(self.layout.window.block_tokens)
        for layer_idx, device, records in self._layers:
            tables = self.state.tables(self.layout, self.adapter, layer_idx, device, records)
            self.state.outliers(self.layout, layer_idx, records, tables, most)
        first = self.layout.columns - tail_columns
        for device in self._places:
            self.state.places(self.layout, device, first, self._capacity, self._mask)

    def _keep_exact(self, exact: ExactTokens, keys: Tensor, values: Tensor) -> None:
        """Take the sinks out of the tail; forget what has been compressed of it."""
        self._keep_sinks(exact, keys, values)
        first = self._first_kept
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
