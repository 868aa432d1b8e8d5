"""Walk a model layer by layer, so that no more than one layer's keys and values are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from aquakv.errors import UnsupportedModelError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.attention import observed_queries
from aquakv.models.rotary import unrotate
from aquakv.models.versions import CACHE_ARGUMENTS, cache_argument

Batches = list[Tensor]
QueryObserver = Callable[[Tensor], None]


def lay(tensor: Tensor, device: torch.device, place: Tensor | None = None) -> Tensor:
    """Return a tensor as it waits on a device; from a GPU to the CPU in pinned memory, without waiting.

    Only work on the GPU's current stream may read what was copied so, until that has been synchronised.
    ``place`` is memory for it, if there is some.
    """
    if tensor.device.type != "cuda" or device.type != "cpu":
        return tensor.to(device)
    if place is None or not place.is_pinned() or place.shape != tensor.shape:
        place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return place.copy_(tensor, non_blocking=True)


class _Capture:
    """Stands in for a cache and keeps the keys and values that one layer hands to it.

    With ``stop`` the layer ends there: nobody wants the rest of the last one.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        if self.stop:
            raise _StopForwardError
        return key_states, value_states


class _StopForwardError(Exception):
    """Ends a forward pass once what is wanted of it is known."""


class LayerWalk:
    """Hidden states of a set of sequences, advanced one decoder layer at a time.

    Parameters
    ----------
    adapter
        The model.
    tokens
        ``[sequences, seq_len]`` int64.
    batch_size
        Sequences run at once.
    device
        Where the hidden states of all sequences wait between layers.
    """

    def __init__(self, adapter: ModelAdapter, tokens: Tensor, batch_size: int, device: torch.device) -> None:
        self.adapter = adapter
        self.batch_size = batch_size
        self.device = device
        self.dtype: torch.dtype = adapter.model.dtype
        self.sequences, self.seq_len = tokens.shape
        with adapter.weights.holding("input", then=0):
            self.arguments = self._layer_arguments(tokens[:1])
            self.hidden = [lay(self._embed(batch), device) for batch in tokens.split(batch_size)]

    def _layer_arguments(self, tokens: Tensor) -> list[dict[str, Any]]:
        """Return the keyword arguments that every layer gets; they hold for any batch of such sequences."""
        arguments: list[dict[str, Any]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) > 1:
                raise UnsupportedModelError(
                    f"model type {self.adapter.name!r} passes its layers positional arguments; "
                    "expected keyword arguments beside the hidden states"
                )
            dropped = ("hidden_states", "use_cache", *CACHE_ARGUMENTS)
            arguments.append({k: v for k, v in kwargs.items() if k not in dropped})

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _StopForwardError  # what comes after the layers may have no weights yet

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.adapter.layers]
        handles.append(self.adapter.layers[-1].register_forward_pre_hook(stop, with_kwargs=True))
        try:
            with (
                self.adapter.part(self.adapter.decoder),
                _skipped(self.adapter.layers),
                suppress(_StopForwardError),
            ):
                self.adapter.decoder(input_ids=tokens.to(self.adapter.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return arguments

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return the hidden states that enter the first layer."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _StopForwardError

        handle = self.adapter.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self.adapter.part(self.adapter.decoder):
                self.adapter.decoder(input_ids=tokens.to(self.adapter.device), use_cache=False)
        except _StopForwardError:
            pass
        finally:
            handle.remove()
        return found[0]

    def advance(
        self, layer_idx: int, on_batch: Callable[[], None], on_queries: QueryObserver | None = None
    ) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Run one layer, whose weights are at hand, over all sequences.

        ``on_queries`` receives every batch's queries after rotary embedding, ``[sequences,
        num_attention_heads, seq_len, head_dim]``.

        Yields, for every batch of a layer that is compressed, keys before rotary embedding and values, each
        ``[sequences, seq_len, num_kv_heads * head_dim]`` in the model's dtype; None for each of others.
        """
        layer = self.adapter.layers[layer_idx]
        compressed = layer_idx in self.adapter.compressed_layers
        is_last = layer_idx == self.adapter.compressed_layers[-1]
        tables = None
        for index, hidden in enumerate(self.hidden):
            capture = _Capture(stop=is_last and on_queries is None)
            cache = {cache_argument(layer): capture}
            hidden = hidden.to(self.adapter.layer_device(layer_idx), non_blocking=True)
            try:
                with (
                    self.adapter.layer(layer_idx),
                    observed_queries(self.adapter, layer_idx, on_queries),
                ):
                    output = layer(hidden, **self.arguments[layer_idx], **cache, use_cache=True)
                output = output[0] if isinstance(output, tuple) else output
                self.hidden[index] = lay(output, self.device, self.hidden[index])
                del output
            except _StopForwardError:
                pass
            on_batch()
            if not compressed:
                yield None
                continue
            if capture.keys is None or capture.values is None:
                raise UnsupportedModelError(
                    f"model type {self.adapter.name!r}: layer {layer_idx} did not hand keys to its cache"
                )
            keys = capture.keys.transpose(1, 2)  # [sequences, seq_len, heads, head_dim]
            if tables is None:
                positions = torch.arange(self.seq_len)
                tables = self.adapter.rotary_tables(positions, layer_idx, self.dtype, keys.device)
            rows = keys.shape[0]
            per_row = torch.stack([unrotate(row, tables) for row in keys]).to(self.dtype)
            yield (
                per_row.reshape(rows, self.seq_len, -1),
                capture.values.transpose(1, 2).reshape(rows, self.seq_len, -1),
            )


@contextmanager
def _skipped(layers: nn.ModuleList) -> Iterator[None]:
    """Let layers hand on what they get: who only wants their arguments need not wait for their work."""

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    own = [layer.__dict__.get("forward") for layer in layers]  # wrapped, by accelerate for one
    try:
        for layer in layers:
            layer.forward = hand_on
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
