"""A decode step that leaves attention to codes to `aquakv.kernels`: one new token a row, codes in pages.

What the kernels need to know of pages is the same at all layers and changes with the pages only, so that a
step in which nothing is compressed makes no tensor out of the host's numbers and waits for nothing. Of what
the host knows only the number of columns changes from step to step; the device has it in one tensor. Where a
block is compressed, records and tables have room for it (`records`, `tables`) and stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.cache.kept_latents import CodedLayer, KeptLatents
from aquakv.cache.layout import TokenLayout
from aquakv.cache.outlier_rows import Taken
from aquakv.cache.paged_state import PagedState
from aquakv.cache.records import Chunk, Records
from aquakv.cache.step import CodesStep
from aquakv.cache.storage import CodedPages, ExactTokens
from aquakv.cache.tables import ExactPlaces, PageTables
from aquakv.codec import LayerCodec, ModelCodec
from aquakv.codec.guard import which_are_outliers
from aquakv.config import GuardConfig
from aquakv.kernels import DecodeOperands, PagedCodes, attend_codes
from aquakv.kernels.backend import Backend, resolve_backend
from aquakv.kernels.exact import HeldTokens, attend_exact
from aquakv.kernels.from_codec import decode_operands
from aquakv.kernels.operands import HEAD_DIMS, MAX_RANK
from aquakv.kernels.pages import attended_bytes, write_attended
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.pages import PAGE_TOKENS


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


@dataclass(frozen=True)
class _Encoded:
    """A layer that has encoded what is due, and by how much that exceeds the tolerated error."""

    layer_idx: int
    records: Records
    exact: ExactTokens
    excess: Tensor | None


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
        self.kept: KeptLatents | None = None  # those that are kept, if they are current
        window = layout.window
        self._capacity = max(window.recent_window + window.block_tokens, tail_columns + 1)
        self._places: dict[torch.device, ExactPlaces] = {}
        self._encoded: list[_Encoded] = []
        self._taken: Taken | None = None
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
        if self.next_layer == 0:
            kept = self.state.kept_latents
            self.kept = kept if kept is not None and kept.are_current(layout, tables.table) else None
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
        coded = self._coded_layer(self.next_layer, records, tables)
        view = PagedView(self, self.next_layer, coded, held, self.state.backend)
        self._take_in(layer_idx, codec, pages, exact, exact.tail_keys, exact.tail_values)
        return view, view

    def _coded_layer(self, order: int, records: Records, tables: PageTables) -> CodedLayer:
        """Return what kernels need of a compressed layer's codes."""
        device, rotary = records.keys.device, tables.rotary
        chosen = resolve_backend(self.state.backend, records.keys, whole_step=True)
        dtype = torch.float32 if chosen == "torch" else torch.float16
        return CodedLayer(
            PagedCodes(records.keys, records.values, tables.table, tables.lengths),
            operands_on(self._codec, order, 2 * rotary.page_cos.shape[-1], device, dtype),
            rotary,
        )

    def keep(self, order: int, query: Tensor, latents: Tensor | None) -> None:
        """Keep the latents with which a layer is about to attend, unless they are soon stale or kept ones."""
        kept = self.state.kept_latents
        if kept is None:
            return
        if order == 0:
            kept.expect(query)
        elif latents is not None and self.kept is None and not self.due:
            kept.take(order, latents)

    def compress_layer(
        self, layer_idx: int, codec: LayerCodec, pages: CodedPages, exact: ExactTokens
    ) -> None:
        """Encode what is due at one layer, in whose tail the pass's token is already; waits for nothing.

        All layers are on one device. `take_outliers` does the rest.
        """
        records, device, block = pages.records, exact.key_buffer.device, pages.block_tokens
        assert records is not None  # `why_not_paged` has seen to it
        self.places_on(device, layer_idx, records)
        keys, values = self.due.gather(exact.key_buffer), self.due.gather(exact.value_buffer)
        codes, excess = self._encode(layer_idx, codec, keys, values)
        if self.encoder is None:
            codes = codec.seal(codes, block)
        records.append(Chunk(len(self.due.pages), codes))
        self._encoded.append(_Encoded(layer_idx, records, exact, excess))
        self._layers.append((layer_idx, device, records))
        self.next_layer += 1

    def take_outliers(self) -> None:
        """Take the outliers out of what `compress_layer` has encoded; forget the exact tokens.

        The host waits for the device once, whatever the number of layers.
        """
        self._taken = self._take_outliers([one for one in self._encoded if one.excess is not None])
        if self._first_kept:
            ExactTokens.drop_first_of([one.exact for one in self._encoded], self._first_kept)

    def _take_outliers(self, layers: list[_Encoded]) -> Taken | None:
        """Move outliers of layers that can have some to their records."""
        if not layers:
            return None
        new, block = len(self.due.pages), self.layout.window.block_tokens
        excess = torch.stack([one.excess for one in layers if one.excess is not None])
        which = which_are_outliers(excess, block, self._guard.most(block))
        kept = attended_bytes(~which).unbind()
        keys, values = zip(*(one.records.newest(new) for one in layers), strict=True)
        write_attended([*keys, *values], [*kept, *kept])
        taken = Taken.read(which)
        # Layers hold the same columns, and had the same blocks before.
        source = self.due.index(torch.device("cpu"), layers[0].exact.key_buffer.shape[1])[taken.tokens]
        index = taken.tokens + (layers[0].records.blocks - new) * block
        sources, indices = torch.stack([source, index]).to(excess.device, non_blocking=True)
        parts = sources.split(taken.counts), indices.int().split(taken.counts)
        for one, count, chosen, own in zip(layers, taken.counts, *parts, strict=True):
            if count:
                tail = one.exact.key_buffer.flatten(0, 1), one.exact.value_buffer.flatten(0, 1)
                one.records.add_outliers(own, *tail, chosen)
        return taken

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
        """Tell devices what was compressed, once all layers have attended, and renew latents that are kept.

        ``tail_columns`` are held exactly after the pass.
        """
        if self.due:
            self._tell_devices(tail_columns)
        kept = self.state.kept_latents
        if kept is None or (not self.due and self.kept is not None):
            return
        tables = [self.state.tables(self.layout, self.adapter, *layer) for layer in self._layers]
        if not self.due:
            kept.complete(self.layout, tables[0].table)
            return
        layers = [
            self._coded_layer(order, records, tables[order])
            for order, (_, _, records) in enumerate(self._layers)
        ]
        kept.renew(self.layout, layers, self.state.backend)

    def _tell_devices(self, tail_columns: int) -> None:
        most = self._guard.most(self.layout.window.block_tokens)
        if self._taken is not None:
            own = [(one.layer_idx, one.records) for one in self._encoded if one.excess is not None]
            tables = self.state.tables(self.layout, self.adapter, *self._layers[0])
            rows = [row for row, _ in self.due.pages]
            self.state.add_outliers(self.layout, tables, own, self._taken, rows, most)
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
        The pass; it carries the latents from layer to layer, unless it has kept ones.
    order
        Which of the compressed layers it is.
    coded, backend
        For the kernels.
    held
        Sinks, the tail and its spare columns, outliers; and which of these are seen.
    """

    step: PagedStep
    order: int
    coded: CodedLayer
    held: HeldTokens
    backend: Backend

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Attend to all tokens; parameters and result as for `CodedView.attend`, with one query a row."""
        asked, coded, kept = query[:, :, 0], self.coded, self.step.kept
        latents = self.step.latents if kept is None else kept.at(self.order)
        latents = None if latents is None else latents.to(query.device)
        self.step.keep(self.order, asked, latents)
        found = attend_codes(
            asked,
            coded.codes,
            latents,
            coded.operands,
            coded.rotary,
            scaling=scaling,
            softcap=softcap,
            carry=kept is None,
            backend=self.backend,
        )
        self.step.latents = found.next_latents
        return attend_exact(
            asked,
            self.held,
            found.out,
            found.lse,
            scaling=scaling,
            softcap=softcap,
            sink_logits=sink_logits,
            backend=self.backend,
        )[:, None]
