"""KVTC's cache: a token's layers are encoded together, behind the last of them."""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aquakv.baselines.cache import BaselineCache
from aquakv.baselines.layer import BaselineLayer
from aquakv.cache.footprint import Footprint
from aquakv.cache.records import storage_bytes
from aquakv.errors import ConfigError

if TYPE_CHECKING:
    from aquakv.baselines.kvtc import CodedBlock, Kvtc


class KvtcLayer(BaselineLayer):
    """A layer whose compressed tokens the cache holds."""

    stored: Callable[[int], Tensor | None]

    def decoded(self, side: int) -> Tensor | None:
        """Return the compressed tokens, ``[rows, num_kv_heads, tokens, head_dim]`` float32; None if none."""
        states = self.stored(side)
        return None if states is None else self.as_attended(self.sides[side], states)


class KvtcCache(BaselineCache):
    """A `BaselineCache` whose codes are those of all layers.

    Parameters
    ----------
    model
        The model.
    method
        Fitted to it.

    Raises
    ------
    ConfigError
        The method was not fitted, or fitted to a model of another shape.
    """

    def __init__(self, model: PreTrainedModel, method: Kvtc) -> None:
        self._method = method
        self._blocks: tuple[list[list[CodedBlock]], list[list[CodedBlock]]] = ([], [])
        # What blocks were decoded to, with the blocks themselves, by side.
        self._decoded: dict[int, tuple[list[list[CodedBlock]], Tensor]] = {}
        super().__init__(model, method)
        self._features = self._adapter.features
        expected = self._features * len(self._adapter.compressed_layers)
        fitted = len(method.transforms[0].mean)
        if fitted != expected:
            raise ConfigError(
                f"baseline kvtc: fitted for {fitted} features, but the model has {expected}; fit it anew"
            )

    def _layer(self, order: int, index: int) -> BaselineLayer:
        plain = super()._layer(order, index)
        layer = KvtcLayer(plain.windows, None, plain.at_once, plain.unturn, plain.turn)
        cache = weakref.proxy(self)  # no cycle: what is kept decoded goes with the cache
        layer.stored = lambda side: cache._stored(side, order)
        return layer

    def _stored(self, side: int, order: int) -> Tensor | None:
        """Return a layer's compressed tokens, ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        if not self._blocks[side]:
            return None
        part = self._all_layers(side)[..., order * self._features : (order + 1) * self._features]
        return part.unflatten(-1, (self._adapter.num_kv_heads, self._adapter.head_dim))

    def _all_layers(self, side: int) -> Tensor:
        """Return all compressed tokens, ``[tokens, rows, features]``; blocks are decoded once."""
        blocks = self._blocks[side]
        known, states = self._decoded.get(side, ([], None))
        if not all(map(operator.is_, itertools.chain(*known), itertools.chain(*blocks))):
            known, states = [], None
        transform = self._method.transforms_on(blocks[0][0].scales.device)[side]
        new = [torch.stack([transform.decode(one) for one in rows], 1) for rows in blocks[len(known) :]]
        if new:
            states = torch.cat(new if states is None else [states, *new])
            self._decoded[side] = list(blocks), states
        assert states is not None  # there are blocks
        return states

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens at a layer and return all; behind the last layer, compress those that are due."""
        everything = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._adapter.compressed_layers[-1]:
            self._compress()
        return everything

    def _compress(self) -> None:
        block = self.baseline.windows[0].block_tokens
        while self.compressed[0].sides[0].due():
            for side in (0, 1):
                transform = self._method.transforms_on(self.compressed[-1].device)[side]
                taken = [layer.taken(layer.sides[side], block).flatten(2) for layer in self.compressed]
                taken = [states.to(self.compressed[-1].device) for states in taken]
                vectors = torch.cat(taken, 2)  # [tokens, rows, features of all layers]
                self._blocks[side].append([transform.encode(row) for row in vectors.unbind(1)])

    def reset(self) -> None:
        """Drop everything."""
        self._blocks = ([], [])
        self._decoded.clear()
        super().reset()

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep copies of the given rows, in that order."""
        if self.compressed[0].is_initialized:
            rows = torch.arange(self.compressed[0].batch_size)[torch.as_tensor(indices).cpu()].tolist()
            for blocks in self._blocks:
                blocks[:] = [[block[row] for row in rows] for block in blocks]
            self._decoded.clear()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.batch_select_indices(torch.arange(self.compressed[0].batch_size).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the tokens; the model and the method are shared."""
        other = super().__deepcopy__(memo)
        other._blocks = copy.deepcopy(self._blocks, memo)
        return other

    def footprint(self) -> Footprint:
        """Return the bytes that the cache holds, by part."""
        blocks = [one for side in self._blocks for rows in side for one in rows]
        return replace(
            super().footprint(),
            code_bytes=sum(storage_bytes(one.payload) for one in blocks),
            scale_bytes=sum(storage_bytes(one.scales) for one in blocks),
        )
