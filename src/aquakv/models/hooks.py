"""Hooks that tell a cache what `Cache.update` is not told, and let it attend in its own way."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from aquakv.models.adapter import ModelAdapter, adapt


@runtime_checkable
class ForwardObserver(Protocol):
    """A cache that wants to hear of the forward passes it is used in."""

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack whose passes concern it; it hears of no other model's."""
        ...

    def forward_begins(self, attention_mask: Tensor | None) -> None:
        """Receive the mask that the caller gave: of padding if it is 2-D, ``[batch, tokens]``."""
        ...

    def positions_known(self, position_ids: Tensor) -> None:
        """Receive the position ids ``[batch or 1, new_tokens]`` that the rotary embedding is made from."""
        ...

    def forward_ends(self) -> None:
        """Learn that the pass is over, successfully or not."""
        ...

    @property
    def attention(self) -> str | None:
        """Name of the attention function that compressed layers use in this pass; None for the model's."""
        ...


class ModelHooks:
    """The hooks on one model, shared by all observers and removed with the last of them."""

    _by_model: ClassVar[weakref.WeakKeyDictionary[PreTrainedModel, ModelHooks]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._users = 0
        self._handles: list[Any] = []
        self._current: ForwardObserver | None = None
        self._swapped: tuple[Any, str] | None = None

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
            hooks._restore()
            for handle in hooks._handles:
                handle.remove()
            hooks._handles.clear()

    def _install(self, adapter: ModelAdapter) -> None:
        self._handles = [
            adapter.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            adapter.decoder.register_forward_hook(self._after_decoder, always_call=True),
            adapter.rotary.register_forward_pre_hook(self._before_rotary, with_kwargs=True),
        ]
        for index in adapter.compressed_layers:
            attention: Any = adapter.layers[index].self_attn
            config = getattr(attention, "config", adapter.config)
            self._handles += [
                attention.register_forward_pre_hook(partial(self._before_attention, config)),
                attention.register_forward_hook(self._restore, always_call=True),
            ]

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()  # an interrupt inside an attention module skips its hooks
        candidates = [kwargs.get("past_key_values"), *args]
        observers = (c for c in candidates if isinstance(c, ForwardObserver))
        self._current = next((observer for observer in observers if observer.decoder is module), None)
        if self._current is not None:
            mask = kwargs.get("attention_mask")
            self._current.forward_begins(mask if isinstance(mask, Tensor) else None)

    def _before_attention(self, config: Any, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Only while this module runs: masks, and other layers, go by the name of the model's own.
        name = None if self._current is None else self._current.attention
        if name is not None:
            self._swapped = config, config._attn_implementation
            config._attn_implementation = name

    def _restore(self, *_: Any) -> None:
        if self._swapped is not None:
            config, original = self._swapped
            config._attn_implementation = original
            self._swapped = None

    def _before_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._current is not None:
            position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            self._current.positions_known(position_ids)

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.forward_ends()
