"""One forward pass that gives what feeding a sequence token by token through the real cache gives.

When query ``t`` is computed token by token, the cache holds ``t`` tokens, of which
`WindowConfig.coded_tokens` are compressed. So attention over the concatenation of all reconstructions and all
exact tokens, masked so that every query sees one or the other of each earlier token, is the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from aquakv.cache.step import reconstruction_dtype
from aquakv.codec import History, ModelCodec
from aquakv.codec.guard import choose_outliers
from aquakv.config import WindowConfig
from aquakv.errors import UnsupportedModelError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.rotary import rotate, unrotate


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
        self._encoder: History = ()  # the layers before, as the encoder reconstructs them
        self._decoder: History = ()  # and as a cache of this dtype does
        super().__init__(layers=self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return ``[reconstructions of all tokens that get compressed ; all tokens exactly]``."""
        if layer_idx not in self.adapter.compressed_layers:
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        rows, heads, tokens, _ = key_states.shape
        first, coded = self.window.sink_tokens, self.window.coded_tokens(tokens - 1)
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
def single_pass(
    adapter: ModelAdapter, codec: ModelCodec, window: WindowConfig, seq_len: int
) -> Iterator[SinglePassCache]:
    """Give a cache for one forward pass over sequences of ``seq_len`` tokens, with the mask that it needs."""
    implementation = getattr(adapter.config, "_attn_implementation", "eager")
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"single-pass evaluation needs attn_implementation sdpa or eager, got {implementation!r}; "
            "load the model with one of these or use the streaming protocol"
        )
    cache = SinglePassCache(adapter, codec, window)
    mask = attention_mask(window, seq_len, adapter.model.device)
    if implementation == "eager":
        dtype = adapter.model.dtype
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)

    def swap_mask(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    attentions: list[Any] = [adapter.layers[i].self_attn for i in adapter.compressed_layers]
    handles = [module.register_forward_pre_hook(swap_mask, with_kwargs=True) for module in attentions]
    try:
        yield cache
    finally:
        for handle in handles:
            handle.remove()


def attention_mask(window: WindowConfig, seq_len: int, device: torch.device) -> Tensor:
    """Return what each query may see, ``[1, 1, seq_len, coded + seq_len]`` bool: codes, then tokens."""
    query = torch.arange(seq_len, device=device)[:, None]
    coded = torch.tensor([window.coded_tokens(t) for t in range(seq_len)], device=device)[:, None]
    page = torch.arange(window.coded_tokens(seq_len - 1), device=device)[None]
    token = torch.arange(seq_len, device=device)[None]
    is_coded = (token >= window.sink_tokens) & (token < window.sink_tokens + coded)
    return torch.cat([page < coded, (token <= query) & ~is_coded], 1)[None, None]
