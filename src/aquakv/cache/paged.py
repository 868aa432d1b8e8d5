"""A decode step that leaves attention to codes to `aquakv.kernels`: one new token a row, codes in pages.

What the kernels need to know of pages is the same at all layers and changes with the pages only, so that a
step in which nothing is compressed makes no tensor out of the host's numbers and waits for nothing.
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
        cos, sin = (table[:, 0] for table in found)
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

    def exact_seen(self, layout: TokenLayout, first_column: int, mask: Tensor | None) -> Tensor:
        """Return which sinks and held columns each row's new token sees, ``[rows, sinks + columns]`` bool."""
        device, sinks = self.starts.device, layout.window.sink_tokens
        number = torch.arange(sinks, device=device)
        columns = torch.arange(first_column, layout.columns, device=device)
        held = (layout.columns - 1 - self.starts).clamp(0, sinks)  # sinks kept before this pass
        seen_sinks = number < held
        seen = columns >= self.starts + torch.where(self.coded > 0, sinks + self.coded, held)
        if mask is not None:
            allowed = mask[:, : layout.columns].to(device, non_blocking=True).ne(0)
            allowed = allowed.expand(layout.rows, -1)
            column = (self.starts + number).clamp(max=layout.columns - 1)
            seen_sinks = seen_sinks & allowed.gather(1, column)
            seen = seen & allowed[:, first_column:]
        return torch.cat([seen_sinks, seen], 1)


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
        self._seen: dict[torch.device, Tensor] = {}

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
        keys, values = self._held(exact, key_states, value_states)
        chosen = resolve_backend(self.state.backend, key_states, whole_step=True)
        dtype = torch.float32 if chosen == "torch" else torch.float16
        tables = self.state.tables(layout, self.adapter, layer_idx, device)
        if device not in self._seen:
            self._seen[device] = tables.exact_seen(layout, self.due.first_column, self._mask)
        exact_keys, exact_values = [exact.sink_keys, keys], [exact.sink_values, values]
        seen, chunk = [self._seen[device]], pages.all()
        if chunk.outliers is not None:
            most = self._guard.most(pages.block_tokens)
            rows = self.state.outliers(layout, layer_idx, chunk.outliers, tables, most)
            for parts, vectors in ((exact_keys, chunk.outliers.keys), (exact_values, chunk.outliers.values)):
                parts.append(vectors[None] if rows.index is None else vectors[rows.index])
            seen.append(rows.present)
        encoded_keys, encoded_values = chunk.encoded
        assert isinstance(encoded_keys, EncodedPages)  # `why_not_paged` has seen to it
        assert isinstance(encoded_values, EncodedPages)
        view = PagedView(
            self,
            PagedCodes(encoded_keys.records, encoded_values.records, tables.table, tables.lengths),
            operands_on(self._codec, self.next_layer, 2 * tables.rotary.page_cos.shape[-1], device, dtype),
            tables.rotary,
            torch.cat(exact_keys, 1),
            torch.cat(exact_values, 1),
            torch.cat(seen, 1),
            self.state.backend,
        )
        self._take_in(layer_idx, codec, pages, exact, keys, values)
        return view, view


@dataclass(frozen=True)
class PagedView:
    """One layer's tokens, in place of keys and values, for `attend`, which must be called once.

    Attributes
    ----------
    step
        The pass; it carries the latents from layer to layer.
    codes, operands, rotary, backend
        For the kernels.
    exact_keys, exact_values
        ``[rows, n, num_kv_heads, head_dim]``: sinks, held columns, outliers.
    seen
        ``[rows, n]`` bool: which of these are.
    """

    step: PagedStep
    codes: PagedCodes
    operands: DecodeOperands
    rotary: PageRotary
    exact_keys: Tensor
    exact_values: Tensor
    seen: Tensor
    backend: Backend

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Attend to all tokens; parameters and result as for `CodedView.attend`, with one query a row."""
        rows, heads, _, dim = query.shape
        kv_heads = self.exact_keys.shape[2]
        latents = self.step.latents
        coded = attend_codes(
            query[:, :, 0],
            self.codes,
            None if latents is None else latents.to(query.device),
            self.operands,
            self.rotary,
            scaling=scaling,
            softcap=softcap,
            backend=self.backend,
        )
        self.step.latents = coded.next_latents
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        grouped = (query.to(precise) * scaling).view(rows, kv_heads, -1, dim)
        exact = grouped @ self.exact_keys.permute(0, 2, 3, 1).to(precise)
        if softcap is not None:
            exact = softcap * torch.tanh(exact / softcap)
        exact = exact.masked_fill(~self.seen[:, None, None], -torch.inf)
        lse = coded.lse.to(precise).view(rows, kv_heads, -1, 1)
        highest = torch.maximum(exact.amax(-1, keepdim=True), lse)
        sink = None
        if sink_logits is not None:
            sink = sink_logits.to(precise).view(1, kv_heads, -1, 1)
            highest = torch.maximum(highest, sink)
        # A row that is nothing but padding sees nothing; it gets zeros and nobody reads it.
        highest = highest.clamp(min=torch.finfo(precise).min)
        exact, share = (exact - highest).exp_(), (lse - highest).exp_()
        total = exact.sum(-1, keepdim=True) + share
        if sink is not None:
            total = total + (sink - highest).exp()
        total = total.clamp(min=torch.finfo(precise).tiny)
        out = (exact / total) @ self.exact_values.transpose(1, 2).to(precise)
        out = out + coded.out.to(precise).view(rows, kv_heads, -1, dim) * (share / total)
        return out.reshape(rows, 1, heads, dim).to(query.dtype)
