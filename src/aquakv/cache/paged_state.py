"""What a cache keeps between steps for kernels that attend to its pages, and what it knows of masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from aquakv.cache.kept_latents import KeptLatents
from aquakv.cache.layout import TokenLayout
from aquakv.cache.outlier_rows import OutlierRows, Taken
from aquakv.cache.records import Records, storage_bytes
from aquakv.cache.tables import ExactPlaces, PageTables
from aquakv.kernels.backend import Backend
from aquakv.models.adapter import ModelAdapter

_log = logging.getLogger(__name__)


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

    Parameters
    ----------
    backend
        What is to attend.
    kept_latents
        Where latents are kept; None makes them anew in every step.
    """

    def __init__(self, backend: Backend, kept_latents: KeptLatents | None = None) -> None:
        self.backend: Backend = backend
        self.kept_latents = kept_latents
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
        source = records.places.index
        fits = held is not None and held.fits(source, tables.outlier_shape(source, most))
        if held is not None and fits and held.count == records.outlier_count:
            return held
        found = tables.group(source, records.outlier_count, layout.window.block_tokens, most)
        if held is not None and fits:
            held.renew(found)
        else:
            held = self._outliers[layer_idx] = found
        return held

    def add_outliers(
        self,
        layout: TokenLayout,
        tables: PageTables,
        layers: Sequence[tuple[int, Records]],
        taken: Taken,
        block_rows: Sequence[int],
        most: int,
    ) -> None:
        """Add what layers on the device of ``tables`` have taken out of new blocks, of these rows.

        Where it does not fit `outliers` finds that and groups anew.
        """
        most, fitting = most if layout.holes is None else 2 * most, []
        for (layer_idx, records), new in zip(layers, taken.counts, strict=True):
            held = self._outliers.get(layer_idx)
            if held is None or records.places is None or held.count + new != records.outlier_count:
                return
            source = records.places.index
            if not held.fits(source, tables.outlier_shape(source, most)):
                return
            fitting.append(held)
        OutlierRows.extend(fitting, taken, block_rows, layout.window.block_tokens)

    @property
    def sees_some_only(self) -> bool:
        """Whether the last mask that was looked at hides compressed tokens."""
        return self._unmasked is False

    def look_at(self, layout: TokenLayout, mask: Tensor | None) -> None:
        """Find out whether a mask hides compressed tokens, which may take a wait for the device."""
        self._unmasked = self._last_mask_saw_all = None
        if mask is None or mask.shape[1] < layout.columns:
            return
        bounds = torch.tensor([layout.starts, layout.coded])[..., None].to(mask.device, non_blocking=True)
        self._unmasked = bool(_sees_coded(layout, mask, *bounds))

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
            self._last_mask_saw_all = LateAnswer(_sees_coded(layout, mask, tables.starts, tables.coded))
        return bool(self._unmasked)

    @staticmethod
    def _tells_at_once(mask: Tensor) -> bool:
        """Tell whether the host can read a mask without waiting."""
        return mask.device.type == "cpu"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What kernels read, with what they keep beside it."""
        return *self._in_tables, *(() if self.kept_latents is None else self.kept_latents.tensors)

    @property
    def _in_tables(self) -> tuple[Tensor, ...]:
        parts = (*self._tables.values(), *self._outliers.values(), *self._places.values())
        return tuple(tensor for part in parts for tensor in part.tensors)

    def footprint(self) -> int:
        """Return the bytes of all tables, room for more included; not those of latents."""
        return storage_bytes(*self._in_tables, *(tables.block_rows for tables in self._tables.values()))


def _sees_coded(layout: TokenLayout, mask: Tensor, starts: Tensor, coded: Tensor) -> Tensor:
    """Return whether a mask lets all compressed tokens be seen, on its device.

    ``starts`` and ``coded`` are the layout's, ``[rows, 1]`` on that device.
    """
    column = torch.arange(layout.columns, device=mask.device)
    first = starts + layout.window.sink_tokens
    compressed = (column >= first) & (column < first + coded)
    return (mask[:, : layout.columns].ne(0) | ~compressed).all()
