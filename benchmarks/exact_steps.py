"""Decode steps through exact caches: one that overwrites its newest token, and a `StaticCache`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import CacheLayerMixin

from aquakv.cache.graph import CudaCapture

#: A decode step, which returns the logits.
Step = Callable[[], Tensor]

#: Columns of a `StaticCache` for the steps that are measured.
STATIC_ROOM = 256

#: The attention of "exact, in place".
UNMASKED = "unmasked_gqa"


def _attend_unmasked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(query, key, value, scale=kwargs.get("scaling"), enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(UNMASKED, _attend_unmasked)
AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)


class InPlaceLayer(CacheLayerMixin):
    """A layer of an exact cache that puts every new token in the place of the newest."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the newest token; return all."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens before the newest."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return all columns."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length


def random_keys(model: LlamaForCausalLM, rows: int, columns: int) -> Tensor:
    config = model.config
    shape = rows, config.num_key_value_heads, columns, config.head_dim
    return torch.randn(*shape, device=model.device, dtype=model.dtype)


def in_place_cache(model: LlamaForCausalLM, rows: int, context: int) -> Cache:
    """Return an exact cache of ``context`` random tokens and room for one more."""
    layers = range(model.config.num_hidden_layers)
    return Cache(
        layers=[
            InPlaceLayer(random_keys(model, rows, context + 1), random_keys(model, rows, context + 1))
            for _ in layers
        ]
    )


def static_cache(model: LlamaForCausalLM, rows: int, context: int) -> Cache:
    """Return transformers' cache of ``context`` random tokens and room for some more."""
    columns = context + STATIC_ROOM
    cache = StaticCache(config=model.config, max_cache_len=columns)
    one = random_keys(model, rows, 1)
    for index, layer in enumerate(cache.layers):
        cache.update(one, one, index)
        layer.keys.copy_(random_keys(model, rows, columns))
        layer.values.copy_(random_keys(model, rows, columns))
        counted = getattr(layer, "cumulative_length", None)
        if isinstance(counted, Tensor):
            counted.fill_(context)
        else:
            layer.cumulative_length = context
    return cache


def exact_step(model: LlamaForCausalLM, cache: Cache, rows: int, context: int, graph: bool) -> Step:
    """Return a step behind ``context`` tokens, as a CUDA graph if so wished."""
    tokens = torch.ones(rows, 1, dtype=torch.long, device=model.device)
    positions = torch.full((rows, 1), context, device=model.device)

    def step() -> Tensor:
        return model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits

    if not graph:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return CudaCapture(model.device)(step)
