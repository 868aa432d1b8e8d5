"""A competitor's cache for rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from aquakv.baselines.cache import ObservingCache
from aquakv.cache.footprint import Footprint
from aquakv.errors import CacheStateError
from aquakv.models.hooks import ForwardObserver, ModelHooks
from aquakv.models.uncompiled import uncompiled

if TYPE_CHECKING:
    from aquakv.baselines.base import Baseline


class RowsCache(ObservingCache):
    """A cache for a batch that is padded on the left, in which every row has a competitor's cache of its own.

    Each holds its row's tokens and none of the padding before them, so that groups of tokens, windows and
    sizes are what they are for the row alone. What they return is padded with zeros, which the attention mask
    hides, to the columns that the model expects. Tokens that are fed behind a row's end are tokens to its
    cache, as to others. Rows are neither reordered nor shortened nor copied.

    Parameters
    ----------
    model
        The model that the cache is for.
    baseline
        The method, fitted to the model if it needs that.

    Raises
    ------
    ConfigError, UnsupportedModelError
        See `Baseline.cache`.
    """

    def __init__(self, model: PreTrainedModel, baseline: Baseline) -> None:
        self.baseline = baseline
        self._adapter = ModelHooks.acquire(model, self)
        self._spare: Cache | None = baseline.cache(model)  # raises now what it raises
        self._rows: list[Cache] = []
        self._starts: list[int] = []  # each row's padding so far
        self._starts_then: list[int] = []  # … with the present pass's
        self._before, self._new = 0, 0  # columns before the present pass, and its own
        self._pads: list[int] = []  # how many of its own are padding
        self._in_forward = False
        # They count columns: each holds one number of every token.
        super().__init__(layers=self._adapter.exact_layers())

    # --- what the hooks report -------------------------------------------------------------------------

    def forward_begins(self, attention_mask: Any) -> None:
        """Learn that a forward pass begins (called by the model's hooks)."""
        self._in_forward = False
        self._require_whole()

    def mask_for_model(self, attention_mask: Any, inputs: Tensor) -> Any:
        """Note how many of the new tokens are padding, row by row; return the caller's mask.

        Raises
        ------
        CacheStateError
            The mask is of another form, or hides tokens behind a row's first one; or there are other rows
            than before.
        """
        rows, new = inputs.shape[:2]
        columns = self.get_seq_length()
        if self._rows and rows != len(self._rows):
            raise CacheStateError(f"the cache holds {len(self._rows)} rows; expected as many, got {rows}")
        mask = torch.ones(rows, columns + new) if attention_mask is None else attention_mask
        if not isinstance(mask, Tensor) or mask.shape != (rows, columns + new):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise CacheStateError(
                f"expected an attention mask of shape {(rows, columns + new)} or none, got {got}"
            )
        seen = mask.ne(0).int().cpu()
        pads = columns + new - seen.sum(1)
        same = pads.clamp(max=columns).tolist() == (self._starts or [0] * rows)
        if bool(seen.diff(dim=1).lt(0).any()) or not same:
            raise CacheStateError(
                "competitors' caches take padding on the left only, and the same in every pass; got a mask "
                "that hides tokens behind a row's first one"
            )
        if not self._rows:
            self._rows = [self._fresh() for _ in range(rows)]
        self._starts_then, self._pads = pads.tolist(), (pads - columns).clamp(min=0).tolist()
        self._before, self._new = columns, new
        for cache in self._fed(ForwardObserver):
            cache.forward_begins(None)
        self._in_forward = True
        return attention_mask

    def positions_known(self, position_ids: Tensor) -> None:
        """Check the position ids of a forward pass (called by the model's hooks)."""
        each = position_ids.expand(len(self._rows), -1)
        for cache, pad, ids in zip(self._rows, self._pads, each, strict=True):
            if pad < self._new and isinstance(cache, ForwardObserver):
                cache.positions_known(ids[None, pad:])

    def forward_ends(self) -> None:
        """Learn that a forward pass is over (called by the model's hooks)."""
        if self._in_forward:
            for cache in self._fed(ForwardObserver):
                cache.forward_ends()
            if self.get_seq_length() > self._before:  # else the pass was refused, and nothing has changed
                self._starts = self._starts_then
        self._in_forward = False

    def _fresh(self) -> Cache:
        spare, self._spare = self._spare, None
        return self.baseline.cache(self._adapter.model) if spare is None else spare

    def _fed(self, kind: type[Any]) -> list[Any]:
        """Return the caches that get tokens in this pass, if they are of a kind."""
        pairs = zip(self._rows, self._pads, strict=True)
        return [cache for cache, pad in pairs if pad < self._new and isinstance(cache, kind)]

    # --- the protocol ----------------------------------------------------------------------------------

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens at a layer and return all keys and values to attend to, each row's by its own cache.

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
        column = key_states[:, :1, :, :1]
        counted, _ = super().update(column, column, layer_idx)
        shape = (*key_states.shape[:2], counted.shape[2], key_states.shape[3])
        keys, values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        for row, (cache, pad) in enumerate(zip(self._rows, self._pads, strict=True)):
            if pad == self._new:
                continue
            own = slice(row, row + 1)
            found = cache.update(
                key_states[own, :, pad:], value_states[own, :, pad:], layer_idx, *args, **kwargs
            )
            for padded, states in zip((keys, values), found, strict=True):
                padded[row, :, shape[2] - states.shape[2] :] = states[0]
        return keys, values

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self._rows, self._starts, self._in_forward = [], [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: rows are not shortened."""
        raise CacheStateError("a competitor's cache of padded rows is not shortened; run rows one by one")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: rows are not reordered."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Refuse: rows are not reordered."""
        raise CacheStateError("a competitor's cache of padded rows is not reordered; run rows one by one")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: rows are not repeated."""
        self.batch_select_indices([])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Refuse: rows are not copied."""
        raise CacheStateError("a competitor's cache of padded rows is not copied; run rows one by one")

    def footprint(self) -> Footprint:
        """Return the bytes that all rows' caches hold, by part."""
        held = [self.baseline.footprint(cache) for cache in self._rows]
        names = [part.name for part in fields(Footprint)]
        return Footprint(**{name: sum(getattr(one, name) for one in held) for name in names})
