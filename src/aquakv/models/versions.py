"""How versions of transformers differ, from 5.17 on; nothing else in the package asks which one is there.

Differences are found by looking, not by version numbers: models that come with their own code keep to the old
ways longer than transformers does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: What modules call the cache that they are given; the first from 5.24 on, the second before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(module: nn.Module) -> str:
    """Return what a module's ``forward`` calls its cache."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a forward pass's arguments by name, or None."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def fresh_layers(config: PreTrainedConfig) -> list[Any]:
    """Return transformers' own cache layers for a model, one for every decoder layer."""
    layers = list(DynamicCache(config=config).layers)
    if _returns_all_it_recorded():
        for index, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                layers[index] = _TrimmedSlidingWindowLayer(layer.sliding_window)
    return layers


@functools.cache
def sdpa_ignores_softcap() -> bool:
    """Tell whether attention by ``sdpa`` leaves scores uncapped where it is told to cap them (5.17 does)."""
    module, one = nn.Module(), torch.ones(1, 1, 1, 2)
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, one, one, one, None, scaling=1.0, is_causal=False, softcap=1.0
        )
    except ValueError:
        return False
    return True


@functools.cache
def _returns_all_it_recorded() -> bool:
    """Tell whether sliding layers that record the past return more than masks are made for (5.17)."""
    layer, one = DynamicSlidingWindowLayer(2), torch.ones(1, 1, 1, 2)
    layer.activate_past_recording()
    layer.update(one, one)
    layer.update(one, one)
    keys, _ = layer.update(one, one)
    return keys.shape[2] > 2


class _TrimmedSlidingWindowLayer(DynamicSlidingWindowLayer):
    """A sliding layer that returns what masks are made for, however much of the past it records."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; return those that the new ones may see, ``[rows, heads, tokens, head_dim]``."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]
