"""What a cache's file holds, put back where it was, if it is what a cache can hold (`docs/format.md`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aquakv.cache.aqua_layer import AquaLayer
from aquakv.cache.holes import Holes
from aquakv.cache.layout import TokenLayout
from aquakv.cache.records import Outliers
from aquakv.codec import (
    EncodedPages,
    EncodedStreams,
    EncodedTokens,
    EncodedVectors,
    EntropyQuantizer,
    ModelCodec,
    TensorCodec,
)
from aquakv.codec.encoded import Encoded
from aquakv.codec.entropy import LANE_TOKENS
from aquakv.codec.model import KINDS
from aquakv.errors import ConfigError
from aquakv.models.adapter import ModelAdapter
from aquakv.numerics.pages import PAGE_TOKENS
from aquakv.numerics.rans import LOWEST_STATE

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: More columns than tensors can have are refused before anything is computed with them.
_MOST_COLUMNS = 2**31 - 1


class Restoring:
    """Hands the tensors of a file out to an empty cache; every one has to be what the others imply.

    Parameters
    ----------
    codec
        The codec that the cache was saved with.
    header
        The file's.
    adapter
        The model.
    layout, layers
        The empty cache's.
    """

    def __init__(
        self,
        codec: ModelCodec,
        header: Mapping[str, Any],
        adapter: ModelAdapter,
        layout: TokenLayout,
        layers: list[Any],
    ) -> None:
        self._codec, self._header = codec, header
        self._adapter, self._layout, self._layers = adapter, layout, layers
        self._left: dict[str, Tensor] = {}

    def run(self, tensors: dict[str, Tensor]) -> None:
        """Restore layout and layers; ``tensors`` are all those of the file, and are taken out.

        Raises
        ------
        InputError
            The parts do not fit each other or the codec. The cache is of no use then.
        """
        self._left = tensors
        rows = self._restore_layout()
        tail = self._tail_columns() if rows else 0
        order = 0
        for index, layer in enumerate(self._layers):
            device = self._adapter.layer_device(index)
            if isinstance(layer, AquaLayer):
                if rows:
                    self._restore_layer(f"layers.{index}", order, layer, tail, device)
                order += 1
            elif rows:
                self._restore_window(f"layers.{index}", layer, index in self._header["recording"], device)
        if self._left:
            raise ConfigError(f"unexpected tensor {sorted(self._left)[0]!r}")

    def _take(self, name: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Return a tensor of the file; None in ``shape`` stands for any length."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise ConfigError(f"tensor {name} is missing")
        fits = len(shape) == tensor.ndim and all(
            want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype not in dtypes:
            wanted = ["any" if length is None else length for length in shape]
            names = " or ".join(str(dtype) for dtype in dtypes)
            raise ConfigError(
                f"tensor {name}: expected {names} {wanted}, got {tensor.dtype} {list(tensor.shape)}"
            )
        return tensor

    def _restore_layout(self) -> int:
        """Restore which token is where; return the number of rows."""
        layout, header = self._layout, self._header
        columns, starts, recording = header["columns"], header["starts"], header["recording"]
        for name in ("columns", "seen"):
            if not _is_count(header[name], _MOST_COLUMNS):
                raise ConfigError(
                    f"{name}: expected a whole number from 0 to {_MOST_COLUMNS}, got {header[name]!r}"
                )
        if not isinstance(starts, list) or not all(_is_count(start, columns) for start in starts):
            raise ConfigError(f"starts: expected a list of whole numbers from 0 to {columns}")
        sliding = [i for i, layer in enumerate(self._layers) if not isinstance(layer, AquaLayer)]
        if not isinstance(recording, list) or not all(
            _is_count(index, len(self._layers)) and index in sliding for index in recording
        ):
            raise ConfigError(f"recording: expected some of the layers with sliding windows, {sliding}")
        for index in recording:
            self._layers[index].activate_past_recording()
        if not starts:
            if columns or header["seen"]:
                most = max(columns, header["seen"])
                raise ConfigError(f"starts: expected at least one for {most} columns, got none")
            return 0
        rows = len(starts)
        positions = self._take("layout.positions", (rows, columns), (torch.int32,))
        numbers = self._take("layout.pages", (None, 2), (torch.int32,)).tolist()
        pages = [(row, column) for row, column in numbers]
        counts = [0] * rows
        step, sinks = layout.window.block_tokens, layout.window.sink_tokens
        for row, column in pages:
            if not 0 <= row < rows:
                raise ConfigError(f"tensor layout.pages: expected rows from 0 to {rows - 1}, got {row}")
            expected = starts[row] + sinks + counts[row] * step
            if column != expected or column + step > columns:
                raise ConfigError(
                    f"tensor layout.pages: expected row {row}'s next block at column {expected} of "
                    f"{columns}, got {column}"
                )
            counts[row] += 1
        device = self._adapter.layer_device(self._adapter.compressed_layers[0])
        holes = self._holes(rows, counts)
        layout.restore(columns, starts, positions.to(device), pages, holes)
        if layout.blocks_due():
            row, column = layout.blocks_due()[0]
            raise ConfigError(f"tensor layout.pages: expected row {row}'s block at column {column} too")
        return rows

    def _holes(self, rows: int, coded_blocks: list[int]) -> Holes | None:
        """Return where tokens come from, if some were evicted; of rows with so many compressed blocks."""
        header, window = self._header, self._layout.window
        columns, seen = header["columns"], header["seen"]
        if "layout.origins" not in self._left:
            if seen != columns:
                raise ConfigError(f"seen: expected {columns}, as nothing was evicted, got {seen}")
            return None
        origins = self._take("layout.origins", (rows, None), (torch.int32,))
        slots = origins.shape[1]
        # As many columns were seen when these slots were all.
        then = seen - columns + slots
        if slots > columns or then < 0:
            raise ConfigError(f"tensor layout.origins: expected at most {columns} columns, got {slots}")
        for row, (start, blocks) in enumerate(zip(header["starts"], coded_blocks, strict=True)):
            first = min(slots, start + window.sink_tokens)
            tail = min(slots, first + blocks * window.block_tokens)
            own = origins[row]
            held = own[own >= 0]
            if (
                bool((own < -1).any() or (own >= then).any() or (own[:start] >= 0).any())
                or len(held.unique()) < len(held)
                or bool((own[tail:] < 0).any() or (own[tail:].diff() <= 0).any())
                or (not blocks and bool((own[start:] < 0).any()))
            ):
                raise ConfigError(
                    f"tensor layout.origins: expected row {row}'s tokens at different columns below {then}, "
                    "rising behind the compressed ones, and -1 before the first"
                )
        return Holes(then, origins)

    def _tail_columns(self) -> int:
        """Return how many columns layers hold exactly, the same at all."""
        name = f"layers.{self._adapter.compressed_layers[0]}.tail.keys"
        tail = self._left.get(name)
        columns, least = self._layout.columns, self._layout.columns - min(self._layout.first_exact_columns())
        if tail is None or tail.ndim != 4 or not least <= tail.shape[1] <= columns:
            got = "none" if tail is None else str(list(tail.shape))
            raise ConfigError(f"tensor {name}: expected {least} to {columns} columns, got {got}")
        return tail.shape[1]

    def _restore_layer(
        self, name: str, order: int, layer: AquaLayer, tail_columns: int, device: torch.device
    ) -> None:
        """Restore a compressed layer."""
        layout, adapter = self._layout, self._adapter
        vector = (adapter.num_kv_heads, adapter.head_dim)
        sinks = (layout.rows, layout.window.sink_tokens, *vector)
        sink_keys = self._take(f"{name}.sinks.keys", sinks, _DTYPES)
        own = (sink_keys.dtype,)
        sink_values = self._take(f"{name}.sinks.values", sinks, own)
        tail = (layout.rows, tail_columns, *vector)
        tail_keys, tail_values = (self._take(f"{name}.tail.{kind}", tail, own) for kind in KINDS)
        layer.lazy_initialization(tail_keys[:, :0].transpose(1, 2), tail_values[:, :0].transpose(1, 2))
        exact = layer.exact
        assert exact is not None  # just made
        exact.sink_keys, exact.sink_values = sink_keys.to(device), sink_values.to(device)
        exact.replace_tail(tail_keys.to(device), tail_values.to(device))
        layer.device = device
        if not layout.pages:
            return
        blocks, codec = len(layout.pages), self._codec.layers[order]
        encoded = EncodedTokens(
            self._encoded(f"{name}.keys", codec.keys, blocks, device),
            self._encoded(f"{name}.values", codec.values, blocks, device),
        )
        outliers = None
        if codec.keys.guard is not None and f"{name}.outliers.index" in self._left:
            outliers = self._outliers(f"{name}.outliers", vector, own, device)
        layer.pages.append(encoded, blocks, outliers)

    def _encoded(self, name: str, codec: TensorCodec, blocks: int, device: torch.device) -> Encoded:
        """Return the codes of one layer's keys or values, in the form that the codec keeps them in."""
        step = self._layout.window.block_tokens
        if isinstance(codec.quantizer, EntropyQuantizer):
            words = self._take(f"{name}.words", (None,), (torch.int16,))
            lengths = self._take(f"{name}.lengths", (blocks,), (torch.int32,))
            lanes = -(-step // LANE_TOKENS)
            states = self._take(f"{name}.states", (blocks, lanes), (torch.int32,))
            total = int(lengths.sum(dtype=torch.int64))
            if bool((lengths < 0).any()) or total != len(words):
                raise ConfigError(f"tensor {name}.lengths: expected lengths whose sum is {len(words)}")
            if bool(((states.long() & 0xFFFFFFFF) < LOWEST_STATE).any()):
                raise ConfigError(f"tensor {name}.states: expected states of at least {LOWEST_STATE}")
            return EncodedStreams(words.to(device), lengths.to(device), states.to(device))
        if codec.pages is not None and step % PAGE_TOKENS == 0:
            shape = (blocks * step // PAGE_TOKENS, codec.pages.record_bytes)
            return EncodedPages(self._take(f"{name}.records", shape, (torch.uint8,)).to(device))
        one = codec.quantizer.quantize(codec.transform.forward(torch.zeros(1, len(codec.mean))))[0]
        found = [
            self._take(f"{name}.{part}", (blocks * step, *like.shape[1:]), (like.dtype,)).to(device)
            for part, like in zip(one._fields, one, strict=True)
        ]
        return EncodedVectors(*found)

    def _outliers(
        self, name: str, vector: tuple[int, int], dtypes: tuple[torch.dtype, ...], device: torch.device
    ) -> Outliers:
        """Return a layer's outliers."""
        step, blocks = self._layout.window.block_tokens, len(self._layout.pages)
        # Packed blocks have whatever outliers came together in them.
        most = self._codec.config.guard.most(step) if self._layout.holes is None else step
        index = self._take(f"{name}.index", (None,), (torch.int32,))
        wide = index.long()
        fits = len(index) > 0 and int(wide[0]) >= 0 and int(wide[-1]) < blocks * step
        if not fits or bool((wide.diff() <= 0).any()) or int((wide // step).bincount().max()) > most:
            raise ConfigError(
                f"tensor {name}.index: expected rising numbers from 0 to {blocks * step - 1}, at most {most} "
                f"of each {step}"
            )
        keys, values = (self._take(f"{name}.{kind}", (len(index), *vector), dtypes) for kind in KINDS)
        return Outliers(index.to(device), keys.to(device), values.to(device))

    def _restore_window(self, name: str, layer: Any, recording: bool, device: torch.device) -> None:
        """Restore a layer with a sliding window."""
        layout, adapter = self._layout, self._adapter
        keys = self._take(
            f"{name}.window.keys", (layout.rows, adapter.num_kv_heads, None, adapter.head_dim), _DTYPES
        )
        values = self._take(f"{name}.window.values", tuple(keys.shape), (keys.dtype,))
        held, kept = keys.shape[2], layer.sliding_window - 1
        # A window of a single token keeps all; so does one that records, until something is taken back.
        least, most = min(layout.seen, kept), layout.seen
        if not recording:
            most = least if kept else most
        if not (0 if recording else least) <= held <= most:
            raise ConfigError(f"tensor {name}.window.keys: expected {least} to {most} columns, got {held}")
        layer.lazy_initialization(keys[:, :, :0].to(device), values[:, :, :0].to(device))
        layer.keys, layer.values = keys.to(device), values.to(device)
        layer.cumulative_length = layout.seen


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
