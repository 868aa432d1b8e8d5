"""One forward pass that gives what feeding a sequence token by token through the real cache gives.

When query ``t`` is computed token by token, the cache holds ``t`` tokens, of which
`WindowConfig.coded_tokens` are compressed. So attention in which every query sees one or the other of each
earlier token, its reconstruction or its exact value, is the same thing. Queries that see the same codes go
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from aquakv.cache.step import reconstruction_dtype
from aquakv.codec import History, ModelCodec
from aquakv.codec.guard import choose_outliers
from aquakv.config import WindowConfig
from aquakv.errors import UnsupportedModelError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.attention import attention_function
from aquakv.models.rotary import rotate, unrotate

_NAME = "aquakv_single_pass"


class _StatelessLayer(DynamicLayer):
    """A cache layer that keeps nothing and tells the mask that there is nothing but the queries' tokens."""

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class SinglePassCache(Cache):
    """Stands in for a cache during one forward pass over whole sequences without padding.

    Parameters
    ----------
    adapter
        The model.
    codec
        The model's codec.
    window
        Which tokens stay exact.
    """

    def __init__(self, adapter: ModelAdapter, codec: ModelCodec, window: WindowConfig) -> None:
        self.adapter, self.codec, self.window = adapter, codec, window
        self.layers = adapter.exact_layers()
        for index in adapter.compressed_layers:
            self.layers[index] = _StatelessLayer()
        self.coded_bytes = 0
        self.coded_values = 0
        self._exact_bytes = 0
        self._position_bytes = 0
        self.held_values = 0
        self._encoder: History = ()  # the layers before, as the encoder reconstructs them
        self._decoder: History = ()  # and as a cache of this dtype does
        super().__init__(layers=self.layers)

    @property
    def held_bytes(self) -> int:
        """Bytes that an `AquaCache` would hold of the same tokens at the compressed layers."""
        return self.coded_bytes + self._exact_bytes + self._position_bytes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return ``[reconstructions of all tokens that get compressed ; all tokens exactly]``."""
        if layer_idx not in self.adapter.compressed_layers:
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        rows, heads, tokens, _ = key_states.shape
        # No query sees the block that the last token completes, but a cache holds it.
        first, coded = self.window.sink_tokens, self.window.coded_tokens(tokens)
        per_token = (key_states.numel() + value_states.numel()) // tokens
        self.held_values += tokens * per_token
        self._exact_bytes += (tokens - coded) * per_token * key_states.element_size()
        self._position_bytes = rows * tokens * torch.int32.itemsize  # shared by the layers
        if coded == 0:
            return key_states, value_states
        positions = torch.arange(first, first + coded).repeat(rows)
        tables = self.adapter.rotary_tables(positions, layer_idx, key_states.dtype, key_states.device)
        keys, values = (
            states[:, :, first : first + coded].transpose(1, 2).flatten(0, 1)
            for states in (key_states, value_states)
        )
        index = self.adapter.compressed_layers.index(layer_idx)
        codec = self.codec.layer_on(index, key_states.device)
        key_block, value_block = unrotate(keys, tables).flatten(1), values.flatten(1)
        # The layers before may have been elsewhere.
        self._encoder, self._decoder = (
            tuple(hat.to(key_states.device) for hat in history) for history in (self._encoder, self._decoder)
        )
        codes, encoder_hat = codec.encode(key_block, value_block, self._encoder)
        hat = codec.reconstruct(codes, self._decoder, reconstruction_dtype(key_states))
        self._encoder = codec.extend(self._encoder, encoder_hat)
        self._decoder = codec.extend(self._decoder, hat)
        self.coded_bytes += codec.seal(codes, self.window.block_tokens).nbytes
        self.coded_values += 2 * hat.keys.numel()
        key_hat = rotate((hat.keys + codec.keys.mean).view(-1, *keys.shape[1:]), tables).to(keys.dtype)
        value_hat = (hat.values + codec.values.mean).view(-1, *values.shape[1:]).to(values.dtype)
        excess = codec.excess(key_block, value_block, encoder_hat)
        if excess is not None:
            block = self.window.block_tokens
            chosen = choose_outliers(excess, block, self.codec.config.guard.most(block))
            key_hat[chosen], value_hat[chosen] = keys[chosen], values[chosen]
            self.coded_bytes += len(chosen) * (4 + 2 * codec.features * keys.element_size())

        def columns(vectors: Tensor) -> Tensor:
            return vectors.view(rows, coded, heads, -1).transpose(1, 2)

        return (
            torch.cat([columns(key_hat), key_states], 2),
            torch.cat([columns(value_hat), value_states], 2),
        )


@contextmanager
def single_pass(adapter: ModelAdapter, codec: ModelCodec, window: WindowConfig) -> Iterator[SinglePassCache]:
    """Give a cache for one forward pass over whole sequences, with the attention that it needs."""
    implementation = required_implementation(adapter)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
        inner = attention_function(module, implementation)
        outputs = []
        for queries, keys in spans(window, query.shape[2], key.shape[2]):
            parts = [torch.cat([states[:, :, part] for part in keys], 2) for states in (key, value)]
            mask = _mask(queries, parts[0].shape[2], query, implementation)
            outputs.append(inner(module, query[:, :, queries], *parts, mask, **kwargs)[0])
        return torch.cat(outputs, 1), None

    with attending_by(adapter, attend):
        yield SinglePassCache(adapter, codec, window)


def required_implementation(adapter: ModelAdapter) -> str:
    """Return how a model attends, if single-pass evaluation can stand in for it."""
    implementation = getattr(adapter.config, "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"single-pass evaluation needs attn_implementation sdpa or eager, got {implementation!r}; "
            "load the model with one of these or use the streaming protocol"
        )
    return implementation


@contextmanager
def attending_by(adapter: ModelAdapter, attend: Callable[..., Any]) -> Iterator[None]:
    """Let the compressed layers attend by another function, which is called as transformers' are."""
    handles = []
    modules: list[Any] = [adapter.layers[index].self_attn for index in adapter.compressed_layers]
    found = {module: _config(adapter, module)._attn_implementation for module in modules}

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        _config(adapter, module)._attn_implementation = _NAME

    def end(module: Any, *_: Any) -> None:
        _config(adapter, module)._attn_implementation = found[module]

    AttentionInterface.register(_NAME, attend)
    try:
        # Only while these modules run: masks for other layers are made by the name of the implementation.
        for attention in modules:
            handles.append(attention.register_forward_pre_hook(begin))
            handles.append(attention.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in modules:  # an interrupt inside a module skips its hooks
            end(attention)
        AttentionInterface._global_mapping.pop(_NAME, None)


def _config(adapter: ModelAdapter, attention: nn.Module) -> Any:
    return getattr(attention, "config", adapter.config)


@lru_cache(maxsize=8)
def spans(window: WindowConfig, seq_len: int, columns: int) -> tuple[tuple[slice, list[slice]], ...]:
    """Return runs of queries that see the same codes, and which of ``[codes ; tokens]`` they see.

    The last of the columns that they see are the queries' own tokens. Alike at all layers, hence kept.
    """
    found = []
    first_token, sinks = columns - seq_len, window.sink_tokens
    for coded, run in groupby(range(seq_len), window.coded_tokens):
        queries = list(run)
        start, stop = queries[0], queries[-1] + 1
        seen = [slice(0, coded), slice(first_token, first_token + sinks)] if coded else []
        rest = sinks + coded if coded else 0
        found.append((slice(start, stop), [*seen, slice(first_token + rest, first_token + stop)]))
    return tuple(found)


def _mask(queries: slice, columns: int, like: Tensor, implementation: str) -> Tensor:
    """Return the causal mask ``[1, 1, queries, columns]``: the last columns are the queries' own tokens."""
    count = queries.stop - queries.start
    earlier = torch.arange(columns, device=like.device)[None] - (columns - count)
    mask = (earlier <= torch.arange(count, device=like.device)[:, None])[None, None]
    if implementation != "eager":
        return mask
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, lowest)
