"""See the queries of an attention module, whatever the model calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aquakv.errors import UnsupportedModelError
from aquakv.models.adapter import ModelAdapter

_NAME = "aquakv_observed"


def attention_function(attention: nn.Module, implementation: str) -> Any:
    """Return the function that an attention module calls under the name ``implementation``."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)


@contextmanager
def observed_queries(
    adapter: ModelAdapter, layer_idx: int, observer: Callable[[Tensor], None] | None
) -> Iterator[None]:
    """Hand the queries that a layer attends with to ``observer``, after rotary embedding.

    They come as ``[rows, num_attention_heads, tokens, head_dim]``. Attention itself is left as it is.
    With no observer this does nothing.

    Raises
    ------
    UnsupportedModelError
        The layer did not attend through transformers' attention functions.
    """
    if observer is None:
        yield
        return
    attention: Any = adapter.layers[layer_idx].self_attn
    config: Any = getattr(attention, "config", adapter.config)
    original = config._attn_implementation
    seen = False

    def observe(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen = True
        observer(query)
        return inner(module, query, *args, **kwargs)

    inner = attention_function(attention, original)
    AttentionInterface.register(_NAME, observe)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = original
        AttentionInterface._global_mapping.pop(_NAME, None)
    if not seen:
        raise UnsupportedModelError(
            f"model type {adapter.name!r}: layer {layer_idx} does not attend through transformers' attention "
            "functions, so its queries cannot be seen; use the preset paper"
        )
