"""Hooks that tell a cache what `Cache.update` is not told, and let it attend in its own way."""

from __future__ import annotations

import inspect
import weakref
from threading import get_ident
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from aquakv.models.adapter import ModelAdapter, adapt
from aquakv.models.attention import Watcher, accept_views, refuse_views, watch
from aquakv.models.uncompiled import uncompiled
from aquakv.models.versions import given_cache


@runtime_checkable
class ForwardObserver(Protocol):
    """A cache that wants to hear of the forward passes it is used in."""

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack whose passes concern it; it hears of no other model's."""
        ...

    @property
    def watcher(self) -> Watcher | None:
        """Who wants to see queries meet keys in these passes, where modules accept views."""
        ...

    def forward_begins(self, attention_mask: Any) -> None:
        """Receive the mask that the caller gave: a tensor ``[batch, tokens]`` tells padding."""
        ...

    def mask_for_model(self, attention_mask: Any, inputs: Tensor) -> Any:
        """Return the mask to use in its place; ``inputs`` are token ids or embeddings ``[batch, new, …]``."""
        ...

    def positions_known(self, position_ids: Tensor) -> None:
        """Receive the position ids ``[batch or 1, new_tokens]`` that the rotary embedding is made from."""
        ...

    def forward_ends(self) -> None:
        """Learn that the pass is over, successfully or not."""
        ...


class ModelHooks:
    """The hooks on one model, shared by all observers and removed with the last of them."""

    _by_model: ClassVar[weakref.WeakKeyDictionary[PreTrainedModel, ModelHooks]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._users = 0
        self._handles: list[Any] = []
        # By thread: models may run in several at once. Weak, as a pass that is interrupted leaves its entry.
        self._current: dict[int, weakref.ref[ForwardObserver]] = {}
        self._viewing: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @classmethod
    def acquire(cls, model: PreTrainedModel, user: object) -> ModelAdapter:
        """Install the hooks for ``user`` and return the model's adapter; they go when ``user`` does."""
        adapter = adapt(model)
        hooks = cls._by_model.get(model)
        if hooks is None:
            hooks = cls._by_model[model] = cls()
        if hooks._users == 0:
            hooks._install(adapter)
        hooks._users += 1
        weakref.finalize(user, cls._release, hooks).atexit = False
        return adapter

    @staticmethod
    def _release(hooks: ModelHooks) -> None:
        hooks._users -= 1
        if hooks._users == 0:
            for handle in hooks._handles:
                handle.remove()
            hooks._handles.clear()
            for attention in hooks._viewing:
                refuse_views(attention)
            hooks._viewing.clear()

    def _install(self, adapter: ModelAdapter) -> None:
        self._handles = [
            adapter.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            adapter.decoder.register_forward_hook(self._after_decoder, always_call=True),
            adapter.rotary.register_forward_pre_hook(self._before_rotary, with_kwargs=True),
        ]

    @classmethod
    def accept_views(cls, adapter: ModelAdapter) -> None:
        """Let the compressed layers attend to views, until the last observer of the model has gone."""
        hooks = cls._by_model[adapter.model]
        for index in adapter.compressed_layers:
            attention: Any = adapter.layers[index].self_attn
            accept_views(attention)
            hooks._viewing.add(attention)

    @uncompiled
    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = _by_name(module, args, kwargs)
        candidates = [given_cache(arguments), *args]
        observers = (c for c in candidates if isinstance(c, ForwardObserver))
        current = next((observer for observer in observers if observer.decoder is module), None)
        self._current.pop(get_ident(), None)
        watch(None)
        if current is None:
            return None
        self._current[get_ident()] = weakref.ref(current)
        mask = arguments.get("attention_mask")
        current.forward_begins(mask)
        watch(current.watcher)
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None  # the model will say what it misses
        own = current.mask_for_model(mask, inputs)
        if own is mask:
            return None
        names = list(inspect.signature(module.forward).parameters)[: len(args)]
        if "attention_mask" in names:
            place = names.index("attention_mask")
            return (*args[:place], own, *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": own}

    @uncompiled
    def _before_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held = self._current.get(get_ident())
        current = None if held is None else held()
        if current is not None:
            position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            current.positions_known(position_ids)

    @uncompiled
    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        held = self._current.pop(get_ident(), None)
        watch(None)
        current = None if held is None else held()
        if current is not None:
            current.forward_ends()


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a module's arguments by name, whether they were given so or not."""
    if not args:
        return kwargs
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return kwargs
    return {**bound, **kwargs}
