"""`AquaCache`: a transformers cache that keeps all but a few tokens as codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from aquakv.cache.footprint import Footprint
from aquakv.cache.layout import TokenLayout
from aquakv.cache.storage import CodedPages, ExactTokens, storage_bytes
from aquakv.codec import LayerCodec, ModelCodec, Reconstruction
from aquakv.config import WindowConfig
from aquakv.errors import CacheStateError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.hooks import ModelHooks
from aquakv.models.rotary import RotaryTables, rotate, unrotate

_HALFWAY = "an earlier forward pass stopped halfway, so layers hold different tokens; call reset() first"


@dataclass
class _Step:
    """What lives during one forward pass only.

    ``coded`` are the pages held when the pass began, ``due`` those compressed in it. Their reconstructions at
    the layer before are all that goes from layer to layer.
    """

    coded: list[tuple[int, int]]
    due: list[tuple[int, int]]
    columns_before: int
    dtype: torch.dtype
    next_layer: int = 0
    coded_hat: Reconstruction | None = None
    due_hat: Reconstruction | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


class AquaLayer(CacheLayerMixin):
    """One compressed layer, as transformers asks after it; the data and the work are the cache's."""

    is_sliding = False
    is_croppable = False

    def __init__(self, layout: TokenLayout, pages: CodedPages) -> None:
        super().__init__()
        self.layout = layout
        self.pages = pages
        self.exact: ExactTokens | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the exact store for keys and values ``[rows, num_kv_heads, tokens, head_dim]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        sinks = self.layout.window.sink_tokens
        self.exact = ExactTokens.empty(key_states.transpose(1, 2), value_states.transpose(1, 2), sinks)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuse: a compressed layer needs the layer before it, which only the whole cache knows."""
        raise CacheStateError("a compressed layer is updated through AquaCache.update, not by itself")

    def get_seq_length(self) -> int:
        """Return the columns held, padding included."""
        return self.layout.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns after ``query_length`` more, and the first one's index."""
        return self.layout.columns + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.18

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return self.layout.rows

    def reset(self) -> None:
        """Drop everything."""
        self.pages.chunks.clear()
        self.exact = None
        self.is_initialized = False


class AquaCache(Cache):
    """A compressed KV cache for ``model.generate(past_key_values=…)``.

    The first tokens of every sequence and the newest ones stay in the model's dtype; the rest is held as
    packed codes. At each layer the codes are reconstructed, attended to and discarded. A token is encoded
    once; nothing is ever requantised.

    Parameters
    ----------
    model
        The model that the cache is for. Hooks that tell the cache positions and padding are installed on it,
        and removed with the last cache.
    codec
        The model's codec, or the path of its file.
    window
        Which tokens stay exact; the codec's own choice if None.

    Raises
    ------
    CodecMismatchError
        The codec belongs to another model.
    UnsupportedModelError
        The model cannot be compressed correctly.

    Examples
    --------
    >>> cache = AquaCache(model, "codec.safetensors")                     # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)                   # doctest: +SKIP
    >>> print(cache.footprint())                                          # doctest: +SKIP
    """

    def __init__(
        self, model: PreTrainedModel, codec: ModelCodec | str | Path, *, window: WindowConfig | None = None
    ) -> None:
        name = "codec" if isinstance(codec, ModelCodec) else str(codec)
        self.codec = codec if isinstance(codec, ModelCodec) else ModelCodec.load(codec)
        self._adapter: ModelAdapter = ModelHooks.acquire(model, self)
        self.codec.fingerprint.require_match(self._adapter.fingerprint(), name)
        self.window = window or self.codec.config.window
        self._order = {layer: index for index, layer in enumerate(self._adapter.compressed_layers)}
        self._step: _Step | None = None
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._in_forward = False
        self._build()
        super().__init__(layers=self.layers)

    def _build(self) -> None:
        self.layout = TokenLayout(self.window)
        self.layers: list[Any] = self._adapter.exact_layers()
        for index in self._adapter.compressed_layers:
            self.layers[index] = AquaLayer(self.layout, CodedPages(self.window.block_tokens))

    @property
    def _compressed(self) -> list[AquaLayer]:
        return [layer for layer in self.layers if isinstance(layer, AquaLayer)]

    # --- what the hooks report -------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack whose forward passes concern this cache."""
        return self._adapter.decoder

    def forward_begins(self, attention_mask: Tensor | None) -> None:
        """Receive the padding mask of a forward pass (called by the model's hooks)."""
        self._require_intact()
        self._in_forward, self._mask, self._positions = True, attention_mask, None

    def positions_known(self, position_ids: Tensor) -> None:
        """Receive the position ids of a forward pass (called by the model's hooks)."""
        self._positions = position_ids

    def forward_ends(self) -> None:
        """Learn that a forward pass is over (called by the model's hooks)."""
        self._in_forward, self._mask, self._positions = False, None, None

    def _require_intact(self) -> None:
        # Sliding layers before the first compressed one, or behind the last, are updated outside of any step.
        if self._step is not None or len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise CacheStateError(_HALFWAY)

    # --- the work ---------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens at a layer and return all keys and values to attend to.

        Parameters
        ----------
        key_states, value_states
            ``[rows, num_kv_heads, new_tokens, head_dim]``, keys after rotary embedding.
        layer_idx
            The layer. Within a forward pass the layers come in order.

        Returns
        -------
        keys, values
            ``[rows, num_kv_heads, columns, head_dim]`` in the same dtype: older tokens as the codes give
            them, sinks, recent tokens and all new tokens exactly. Discard them after the attention.

        Raises
        ------
        CacheStateError
            The call does not come from a forward pass of the cache's model, or not in order.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, AquaLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise CacheStateError("the cache is for inference; run the model under torch.no_grad()")
        order = self._order[layer_idx]
        if order == 0:
            self._begin_step(key_states)
        step = self._step
        if step is None or order != step.next_layer:
            turn = 0 if step is None else step.next_layer
            expected = self._adapter.compressed_layers[turn]
            raise CacheStateError(f"layer {layer_idx} was updated out of turn; layer {expected} comes next")
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if key_states.dtype != layer.dtype:
            raise CacheStateError(f"the cache holds {layer.dtype}, but got keys of {key_states.dtype}")
        codec = self.codec.layer_on(order, key_states.device)
        keys, values = self._update_layer(layer, layer_idx, codec, key_states, value_states, step)
        step.next_layer += 1
        if step.next_layer == len(self._order):
            self.layout.commit(step.due)
            self._step = None
        return keys, values

    def _begin_step(self, key_states: Tensor) -> None:
        if self._step is not None:
            raise CacheStateError(_HALFWAY)
        if not self._in_forward or self._positions is None:
            raise CacheStateError(
                "AquaCache.update was called outside a forward pass of the model that it was built for; "
                f"expected a {self._adapter.name} forward pass with past_key_values=cache"
            )
        rows, _, new_columns, _ = key_states.shape
        before = self.layout.columns
        coded = list(self.layout.pages)
        self.layout.append(new_columns, self._positions, self._mask, rows)
        self._step = _Step(coded, self.layout.blocks_due(), before, reconstruction_dtype(key_states))

    def _update_layer(
        self,
        layer: AquaLayer,
        layer_idx: int,
        codec: LayerCodec,
        key_states: Tensor,
        value_states: Tensor,
        step: _Step,
    ) -> tuple[Tensor, Tensor]:
        exact = layer.exact
        assert exact is not None  # lazy_initialization has run
        new_keys, new_values = key_states.transpose(1, 2), value_states.transpose(1, 2)
        keys = self._assemble(exact.sink_keys, exact.tail_keys, new_keys, step)
        values = self._assemble(exact.sink_values, exact.tail_values, new_values, step)
        if step.coded:
            previous = None if step.coded_hat is None else _to(step.coded_hat, keys.device)
            hat = codec.reconstruct(layer.pages.all(), previous, step.dtype)
            tables = self._tables(step, "coded", layer_idx, keys)
            key_hat = (hat.keys + codec.keys.mean).view(-1, *keys.shape[2:])
            self._place(keys, rotate(key_hat, tables), step, "coded")
            self._place(values, (hat.values + codec.values.mean).view(-1, *values.shape[2:]), step, "coded")
            step.coded_hat = hat
        if step.due:
            tables = self._tables(step, "due", layer_idx, keys)
            key_block = unrotate(self._gather(keys, step), tables).flatten(1)
            value_block = self._gather(values, step).flatten(1)
            previous = None if step.due_hat is None else _to(step.due_hat, keys.device)
            encoded, step.due_hat = codec.encode(key_block, value_block, previous)
            layer.pages.append(encoded)
        self._keep_exact(exact, keys, values, step)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _assemble(self, sinks: Tensor, tail: Tensor, new: Tensor, step: _Step) -> Tensor:
        """Lay out all columns ``[rows, columns, heads, head_dim]``; compressed ones are left for `_place`."""
        rows, _, heads, dim = new.shape
        before = step.columns_before
        out = new.new_empty(rows, self.layout.columns, heads, dim)
        tail_start = before - tail.shape[1]
        out[:, tail_start:before] = tail
        out[:, before:] = new
        if tail_start == 0:
            return out
        for row, start in enumerate(self.layout.starts):
            out[row, : min(start, tail_start)] = 0
            held = min(self.window.sink_tokens, before - start)
            if held > 0:
                out[row, start : start + held] = sinks[row, :held]
        return out

    def _keep_exact(self, exact: ExactTokens, keys: Tensor, values: Tensor, step: _Step) -> None:
        """Copy what stays exact out of the assembled columns, so that these can be freed."""
        columns = self.layout.columns
        for row, start in enumerate(self.layout.starts):
            first = max(start, step.columns_before)
            last = min(start + self.window.sink_tokens, columns)
            if first < last:
                exact.sink_keys[row, first - start : last - start] = keys[row, first:last]
                exact.sink_values[row, first - start : last - start] = values[row, first:last]
        due_rows = [row for row, _ in step.due]
        tail_start = min(
            first + due_rows.count(row) * self.window.block_tokens
            for row, first in enumerate(self.layout.first_exact_columns())
        )
        exact.tail_keys = keys[:, tail_start:].clone(memory_format=torch.contiguous_format)
        exact.tail_values = values[:, tail_start:].clone(memory_format=torch.contiguous_format)

    def _place(self, out: Tensor, vectors: Tensor, step: _Step, which: str) -> None:
        blocks = step.coded if which == "coded" else step.due
        if self._run(step, which):
            first = blocks[0][1]
            out[0, first : first + vectors.shape[0]] = vectors
        else:
            out.view(-1, *out.shape[2:]).index_copy_(
                0, self._index(step, which, out.device), vectors.to(out.dtype)
            )

    def _gather(self, columns: Tensor, step: _Step) -> Tensor:
        """Return the tokens of the blocks that are due, ``[tokens, heads, head_dim]``."""
        if self._run(step, "due"):
            first = step.due[0][1]
            return columns[0, first : first + len(step.due) * self.window.block_tokens]
        return columns.flatten(0, 1).index_select(0, self._index(step, "due", columns.device))

    def _run(self, step: _Step, which: str) -> bool:
        key = ("run", which)
        if key not in step.memo:
            step.memo[key] = self.layout.is_contiguous(step.coded if which == "coded" else step.due)
        return step.memo[key]

    def _index(self, step: _Step, which: str, device: torch.device) -> Tensor:
        key = ("index", which, device)
        if key not in step.memo:
            blocks = step.coded if which == "coded" else step.due
            step.memo[key] = self.layout.page_columns(blocks, device)
        return step.memo[key]

    def _tables(self, step: _Step, which: str, layer_idx: int, keys: Tensor) -> RotaryTables:
        key = ("tables", which, keys.device)  # all full-attention layers share one rotary embedding
        if key not in step.memo:
            positions = self.layout.positions
            assert positions is not None  # set by layout.append
            chosen = positions.flatten()[self._index(step, which, positions.device)]
            step.memo[key] = self._adapter.rotary_tables(chosen, layer_idx, keys.dtype, keys.device)
        return step.memo[key]

    # --- the rest of the protocol -------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop all tokens; the cache is as new."""
        self._step = None
        self._build()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: ``-n`` removes ``n``; a positive number is a length to keep.

        Raises
        ------
        CacheStateError
            Some of these tokens are compressed already. Nothing has changed then.
        """
        self._require_intact()
        columns = self.layout.columns
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, columns - tokens_to_remove)
        removed = min(removed, columns)
        if removed == 0:
            return
        for layer in self.layers:
            dropped = layer.is_sliding and columns >= layer.sliding_window
            if dropped and not getattr(layer, "record_past", False):
                raise CacheStateError(
                    f"cannot remove {removed} tokens: layers with a sliding window have dropped what was "
                    "before them; call activate_past_recording() before feeding tokens that may have to go"
                )
        self.layout.crop(removed)
        for layer in self.layers:
            if not isinstance(layer, AquaLayer):
                layer.crop(-removed)
            elif layer.exact is not None:
                kept = max(0, layer.exact.tail_keys.shape[1] - removed)
                layer.exact.tail_keys = layer.exact.tail_keys[:, :kept].clone()
                layer.exact.tail_values = layer.exact.tail_values[:, :kept].clone()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` a copy of the present row ``beam_idx[i]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep copies of the given rows, in that order."""
        self._require_intact()
        if not self.layout.rows:
            return
        everything = torch.arange(self.layout.rows)
        rows = everything[
            torch.as_tensor(indices).cpu()
        ].tolist()  # negative numbers and masks as for tensors
        if rows == everything.tolist():
            return
        pages = torch.tensor(self.layout.select(rows), dtype=torch.long)
        for layer in self.layers:
            if not isinstance(layer, AquaLayer):
                layer.batch_select_indices(torch.as_tensor(rows))
            elif layer.exact is not None:
                layer.pages.select(pages)
                layer.exact.select(torch.as_tensor(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.batch_select_indices([row for row in range(self.layout.rows) for _ in range(repeats)])

    def footprint(self) -> Footprint:
        """Return the bytes that the cache holds, by part, from its tensors' storages."""
        words = scales = sinks = tail = other = itemsize = 0
        for layer in self.layers:
            if not isinstance(layer, AquaLayer):
                other += storage_bytes(layer.keys, layer.values)
                continue
            layer_words, layer_scales = layer.pages.footprint()
            words, scales = words + layer_words, scales + layer_scales
            if layer.exact is not None:
                layer_sinks, layer_tail = layer.exact.footprint()
                sinks, tail = sinks + layer_sinks, tail + layer_tail
                itemsize = layer.dtype.itemsize
        per_token = 2 * self.codec.fingerprint.features * len(self._order)
        total_values = self.layout.rows * self.layout.columns * per_token
        return Footprint(
            code_bytes=words,
            scale_bytes=scales,
            position_bytes=storage_bytes(self.layout.positions),
            sink_bytes=sinks,
            tail_bytes=tail,
            other_layer_bytes=other,
            coded_values=sum(self.layout.coded) * per_token,
            total_values=total_values,
            exact_cache_bytes=total_values * itemsize,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AquaCache:
        """Copy the tokens; the model and the codec are shared."""
        self._require_intact()
        other = AquaCache(self._adapter.model, self.codec, window=self.window)
        other.layout = copy.deepcopy(self.layout, memo)
        other.layers = [copy.deepcopy(layer, memo) for layer in self.layers]
        for layer in other._compressed:
            layer.layout = other.layout
        return other


def reconstruction_dtype(key_states: Tensor) -> torch.dtype:
    """Return the dtype that codes are reconstructed in: the keys' own, but not float16 on a CPU."""
    on_cpu_half = key_states.device.type == "cpu" and key_states.dtype == torch.float16
    return torch.float32 if on_cpu_half else key_states.dtype


def _to(reconstruction: Reconstruction, device: torch.device) -> Reconstruction:
    return Reconstruction(*(tensor.to(device) for tensor in reconstruction))
