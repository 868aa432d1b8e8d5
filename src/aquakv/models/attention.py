"""See the queries of an attention module, and attend in another way, whatever the model calls things."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aquakv.errors import CacheStateError, UnsupportedModelError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.uncompiled import uncompiled
from aquakv.models.versions import cache_argument, sdpa_ignores_softcap

_NAME = "aquakv_observed"

#: Name under which transformers finds `_attend_to_view`.
VIEW_ATTENTION = "aquakv_view"

#: Where a replaced configuration keeps the one it stands for.
_OWN = "_aquakv_own"

#: Arguments of attention functions that change what is attended to, in ways that no view knows.
_UNKNOWN_TO_VIEWS = ("position_bias", "block_indices", "indices", "sinks", "sliding_window", "head_mask")


@runtime_checkable
class View(Protocol):
    """Stands in for keys and values, and is attended to in its own way."""

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        """Return ``[rows, queries, num_attention_heads, head_dim]`` for a query of the usual shape."""
        ...


@runtime_checkable
class Watcher(Protocol):
    """Watches queries meet keys in modules that accept views."""

    def attended(
        self,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> None:
        """Receive ``[rows, heads, new_tokens, head_dim]`` and ``[rows, num_kv_heads, columns, head_dim]``."""
        ...


#: Who watches a thread's forward pass. Weak, as a pass that is interrupted leaves its entry.
_watching: dict[int, weakref.ref[Watcher]] = {}


def watch(watcher: Watcher | None) -> None:
    """Let this thread's attention to tensors be watched where views are accepted; by nobody if None."""
    if watcher is None:
        _watching.pop(get_ident(), None)
    else:
        _watching[get_ident()] = weakref.ref(watcher)


def accept_views(attention: nn.Module) -> None:
    """Let a module attend to a `View` that its cache returns; with tensors it does as before.

    The module gets a configuration of its own, in which another attention function is named. Masks are made
    by the model's configuration, which stays as it is.
    """
    config: Any = attention.config
    if _OWN in config.__dict__:
        return
    own = copy.copy(config)
    own._attn_implementation = VIEW_ATTENTION
    own.__dict__[_OWN] = config
    attention.config = own


def refuse_views(attention: nn.Module) -> None:
    """Undo `accept_views`."""
    config: Any = getattr(attention, "config", None)
    if config is not None and _OWN in config.__dict__:
        attention.config = config.__dict__[_OWN]


def _attend_to_view(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(key, View):
        if _watching:
            _tell(module, query, key, scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
        config: Any = module.config
        inner = attention_function(module, config.__dict__[_OWN]._attn_implementation)
        return inner(module, query, key, value, attention_mask, **kwargs)
    for name in _UNKNOWN_TO_VIEWS:
        if kwargs.get(name) is not None:
            raise CacheStateError(
                f"{type(module).__name__} attends with {name}, which attention to codes does not know; build "
                'the cache with attention="general"'
            )
    # The mask is not looked at: the view knows what may be seen.
    return _attend(key, query, scaling, kwargs.get("softcap"), kwargs.get("s_aux")), None


@uncompiled
def _attend(
    view: View, query: Tensor, scaling: float, softcap: float | None, sink_logits: Tensor | None
) -> Tensor:
    return view.attend(query, scaling, softcap, sink_logits)


@uncompiled
def _tell(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> None:
    held = _watching.get(get_ident())
    watcher = None if held is None else held()
    if watcher is not None:
        watcher.attended(module, query, keys, scaling, softcap, sink_logits)


AttentionInterface.register(VIEW_ATTENTION, _attend_to_view)


class _Probe:
    """A cache that returns itself as a view, and notes whether it was attended to."""

    def __init__(self) -> None:
        self.attended = False
        self.softcap: float | None = None

    def update(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self, self

    def attend(
        self, query: Tensor, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None
    ) -> Tensor:
        self.attended, self.softcap = True, softcap
        return query.transpose(1, 2)


def why_no_views(adapter: ModelAdapter) -> str | None:
    """Return why a model's attention cannot attend to a `View`, or None if it can.

    It can if it hands on what its cache returns.

    Calls the first compressed layer's attention with one token, in a configuration of its own.
    """
    tensors = f"the attention of {adapter.name} needs keys and values as tensors"
    layer = adapter.compressed_layers[0]
    with adapter.attention(layer) as attention:
        if not hasattr(attention, "config"):
            return tensors
        weight = next(attention.parameters(), None)
        if weight is None or not weight.is_floating_point():
            return tensors
        probe, accepted = _Probe(), _OWN in attention.config.__dict__
        device = adapter.layer_device(layer)
        hidden = torch.zeros(1, 1, adapter.config.hidden_size, dtype=weight.dtype, device=device)
        position = torch.zeros(1, 1, dtype=torch.long, device=device)
        accept_views(attention)
        try:
            with torch.no_grad():
                attention(
                    hidden_states=hidden,
                    position_embeddings=adapter.rotary_embeddings(hidden, position, layer),
                    attention_mask=None,
                    position_ids=position,
                    **{cache_argument(attention): probe},
                )
        except Exception:  # whatever it trips over, it cannot take a view
            return tensors
        finally:
            if not accepted:
                refuse_views(attention)
    if not probe.attended:
        return tensors
    implementation = getattr(adapter.config, "_attn_implementation", "eager")
    if probe.softcap is not None and implementation == "sdpa" and sdpa_ignores_softcap():
        return (
            f"{adapter.name} caps its scores, which this version of transformers leaves out in sdpa; load "
            'the model with attn_implementation="eager"'
        )
    return None


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
