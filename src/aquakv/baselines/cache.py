"""The transformers cache that all competitors share."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from aquakv.baselines.layer import BaselineLayer
from aquakv.cache.footprint import Footprint
from aquakv.cache.records import storage_bytes
from aquakv.errors import CacheStateError
from aquakv.models.adapter import ModelAdapter
from aquakv.models.hooks import ModelHooks
from aquakv.models.rotary import RotaryTables, rotate, unrotate
from aquakv.models.uncompiled import uncompiled

if TYPE_CHECKING:
    from aquakv.baselines.base import Baseline


class ObservingCache(Cache):
    """What competitors' caches share of hearing of forward passes (`aquakv.models.hooks`)."""

    _adapter: ModelAdapter
    _in_forward: bool

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack whose forward passes concern this cache."""
        return self._adapter.decoder

    @property
    def watcher(self) -> None:
        """Nobody wants to see queries."""
        return None

    def _require_whole(self) -> None:
        """Raise `CacheStateError` if an earlier pass stopped halfway: layers hold different tokens then."""
        layers: list[Any] = self.layers
        if len({layer.get_seq_length() for layer in layers}) > 1:
            raise CacheStateError("an earlier forward pass stopped halfway; call reset() first")

    def _require_forward(self) -> None:
        """Raise `CacheStateError` outside a forward pass of the cache's model."""
        if not self._in_forward:
            raise CacheStateError(
                "the cache was updated outside a forward pass of the model that it was built for; expected a "
                f"{self._adapter.name} forward pass with past_key_values=cache"
            )


class BaselineCache(ObservingCache):
    """A competitor's cache for ``model(past_key_values=…)`` and ``model.generate``.

    What is compressed is held as packed codes, and what attention sees of it is decoded from them. It is kept
    beside them, so that nothing is decoded twice: meant to measure quality and size (of the codes), not speed
    or memory. Layers with sliding windows stay exact.

    Parameters
    ----------
    model
        The model that the cache is for.
    baseline
        The method, fitted to the model if it needs that.

    Raises
    ------
    UnsupportedModelError
        The model cannot be compressed correctly.
    """

    def __init__(self, model: PreTrainedModel, baseline: Baseline) -> None:
        self.baseline = baseline
        self._adapter = ModelHooks.acquire(model, self)
        self._frequencies = 0
        self._in_forward = False
        self._tables: dict[tuple[str, int, int, int], RotaryTables] = {}
        self.layers: list[Any] = self._adapter.exact_layers()
        for order, index in enumerate(self._adapter.compressed_layers):
            self.layers[index] = self._layer(order, index)
        super().__init__(layers=self.layers)

    def _layer(self, order: int, index: int) -> BaselineLayer:
        cache = weakref.proxy(self)  # no cycle: what is kept decoded goes with the cache

        def turned(states: Tensor, first: int, turn: Any) -> Tensor:
            if not cache.baseline.pre_rope:
                return states
            tables = cache._rotary(index, first, states)
            return turn(states.flatten(0, 1), tables).view(states.shape)

        return BaselineLayer(
            self.baseline.windows,
            self.baseline.coders(self._adapter, order),
            self.baseline.encodes_at_once,
            lambda states, first: turned(states, first, unrotate),
            lambda states, first: turned(states, first, rotate),
        )

    def _rotary(self, index: int, first: int, states: Tensor) -> RotaryTables:
        """Return the tables of ``states [tokens, rows, …]``, made once a pass for all layers alike."""
        tokens, rows = states.shape[:2]
        key = (self._adapter.rotary_kind(index), first, tokens, rows)
        if key not in self._tables:
            positions = torch.arange(first, first + tokens).repeat_interleave(rows)
            dtype = self._adapter.model.dtype
            self._tables[key] = self._adapter.rotary_tables(positions, index, dtype, states.device)
        return self._tables[key].to(states.device)

    @property
    def compressed(self) -> list[BaselineLayer]:
        """The compressed layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, BaselineLayer)]

    # --- what the hooks report -------------------------------------------------------------------------

    def forward_begins(self, attention_mask: Any) -> None:
        """Check the mask of a forward pass (called by the model's hooks).

        Raises
        ------
        CacheStateError
            There is padding, or a mask of another form; or an earlier pass stopped halfway.
        """
        self._require_whole()
        if isinstance(attention_mask, Tensor) and (
            attention_mask.ndim != 2 or not bool(attention_mask.ne(0).all())
        ):
            raise CacheStateError(
                "competitors' caches take sequences without padding; expected no attention mask or one of "
                "ones, got one that hides tokens; run rows of different lengths one by one"
            )
        self._tables.clear()
        self._in_forward = True

    def mask_for_model(self, attention_mask: Any, inputs: Tensor) -> Any:
        """Return the caller's mask: nothing is evicted."""
        return attention_mask

    def positions_known(self, position_ids: Tensor) -> None:
        """Check the position ids of a forward pass (called by the model's hooks)."""
        held = self.get_seq_length()
        expected = torch.arange(held, held + position_ids.shape[-1], device=position_ids.device)
        if not torch.equal(position_ids, expected.expand_as(position_ids)):
            raise CacheStateError(
                f"competitors' caches take tokens at successive positions; expected position ids from {held} "
                "on; leave position_ids to the model, or count them from each row's first token"
            )
        frequencies = self._adapter.frequencies(position_ids)
        if held and frequencies != self._frequencies:
            raise CacheStateError(
                f"in this pass the model's rotary embedding ({self._adapter.changing_rope_type}) changes its "
                "frequencies; end the sequence here, or feed all of it anew to a cache that was reset"
            )
        self._frequencies = frequencies

    def forward_ends(self) -> None:
        """Learn that a forward pass is over (called by the model's hooks)."""
        self._in_forward = False
        self._tables.clear()

    # --- the protocol ----------------------------------------------------------------------------------

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens at a layer and return all keys and values to attend to, decoded.

        Parameters
        ----------
        key_states, value_states
            ``[rows, num_kv_heads, new_tokens, head_dim]``, keys after rotary embedding.
        layer_idx
            The layer.

        Raises
        ------
        CacheStateError
            The call does not come from a forward pass of the cache's model.
        """
        self._require_forward()
        if key_states.requires_grad or value_states.requires_grad:
            raise CacheStateError("the cache is for inference; run the model under torch.no_grad()")
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: ``-n`` removes ``n``; a positive number is a length to keep.

        Raises
        ------
        CacheStateError
            Some of these tokens are compressed already. Nothing has changed then.
        """
        held, wanted = self.get_seq_length(), int(tokens_to_remove)
        removed = min(held, -wanted if wanted <= 0 else max(0, held - wanted))
        for layer in self.compressed:
            layer.require_exact(removed)
        for layer in self.layers:
            layer.crop(-removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` a copy of the present row ``beam_idx[i]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep copies of the given rows, in that order."""
        for layer in self.layers:
            layer.batch_select_indices(torch.as_tensor(indices))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the tokens; the model and the method are shared."""
        other = type(self)(self._adapter.model, self.baseline)
        other._frequencies = self._frequencies
        for index, layer in enumerate(self.layers):
            if isinstance(layer, BaselineLayer):
                other.layers[index].take_over(layer, memo)
            else:
                other.layers[index] = copy.deepcopy(layer, memo)
        return other

    def footprint(self) -> Footprint:
        """Return the bytes that the cache holds, by part, from its tensors' storages."""
        sides = [side for layer in self.compressed for side in layer.sides]
        held = [side.encoded for side in sides if side.encoded is not None]
        first = self.compressed[0]
        per_side = first.batch_size * self._adapter.features
        total = sum(side.tokens for side in sides) * per_side
        other = [layer for layer in self.layers if not isinstance(layer, BaselineLayer)]
        return Footprint(
            code_bytes=sum(encoded.code_bytes for encoded in held),
            scale_bytes=sum(encoded.scale_bytes for encoded in held),
            outlier_bytes=sum(encoded.outlier_bytes for encoded in held),
            position_bytes=0,
            spare_bytes=0,
            sink_bytes=sum(side.sink_bytes for side in sides),
            tail_bytes=sum(side.tail_bytes for side in sides),
            other_layer_bytes=sum(storage_bytes(layer.keys, layer.values) for layer in other),
            coded_values=sum(side.coded for side in sides) * per_side,
            total_values=total,
            original_values=total,
            exact_cache_bytes=total * (first.dtype.itemsize if first.is_initialized else 0),
        )
