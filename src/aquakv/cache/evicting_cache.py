"""The part of `AquaCache` that evicts tokens, when it is told to or when its policy says so."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import Cache

from aquakv.cache.aqua_layer import AquaLayer
from aquakv.cache.evicting import Eviction, required_mask
from aquakv.cache.layout import TokenLayout
from aquakv.cache.pruning import Pruner
from aquakv.codec import ModelCodec
from aquakv.config import WindowConfig
from aquakv.errors import ConfigError
from aquakv.eviction import EvictionPolicy
from aquakv.models.adapter import ModelAdapter
from aquakv.models.attention import why_no_views
from aquakv.models.hooks import ModelHooks


class EvictingCache(Cache):
    """What `AquaCache` knows of eviction; what it works on is the rest of that."""

    codec: ModelCodec
    window: WindowConfig
    layout: TokenLayout
    _adapter: ModelAdapter
    _pruner: Pruner | None
    _prepared: Any
    _steady: Any

    @property
    def _compressed(self) -> list[AquaLayer]:
        raise NotImplementedError

    def _changing(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _require_intact(self) -> None:
        raise NotImplementedError

    def _forget_tables(self) -> None:
        raise NotImplementedError

    @property
    def eviction(self) -> EvictionPolicy | None:
        """What evicts tokens after forward passes. It may be changed, or set to None, between passes."""
        return None if self._pruner is None else self._pruner.policy

    @eviction.setter
    def eviction(self, policy: EvictionPolicy | None) -> None:
        if policy is not None:
            reason = why_no_views(self._adapter)
            if reason is not None:
                raise ConfigError(f"eviction: the policy cannot see this model's queries: {reason}")
            ModelHooks.accept_views(self._adapter)
        self._pruner = None if policy is None else Pruner(policy)

    @property
    def watcher(self) -> Pruner | None:
        """Who sees queries meet keys (asked by the model's hooks)."""
        return self._pruner

    def mask_for_model(self, attention_mask: Any, inputs: Tensor) -> Any:
        """Return the mask that the model's pass is to use in place of the caller's (called by the hooks).

        ``inputs`` are token ids ``[rows, new_tokens]`` or embeddings ``[rows, new_tokens, width]``. The mask
        is the caller's unless tokens were evicted, which it then hides.
        """
        layout, mask = self.layout, attention_mask
        # Of a step that is captured nobody looks at the mask, and looking at it takes a wait for the device.
        if layout.holes is not None and self._prepared is None:
            mask = layout.holes.in_columns(mask, inputs.shape[1], layout.seen, inputs.device)
        if self._pruner is not None:
            self._pruner.begins(layout.seen, inputs.shape[1], mask)
        return mask

    def _in_slots(self, mask: Tensor | None, new_columns: int) -> Tensor | None:
        """Return what a mask ``[rows, columns]`` says of what is held and of so many new columns."""
        layout = self.layout
        if layout.holes is None:
            return mask
        return layout.holes.in_slots(mask, layout.columns + new_columns, layout.starts)

    def _prune(self) -> None:
        """Evict what the policy does not keep, once a pass is over."""
        keep = None if self._pruner is None else self._pruner.ends(self.layout.held_columns())
        if keep is not None:
            self.evict(keep)

    def columns_until_due(self) -> int:
        """Return how many more columns it takes until some row has a block to compress."""
        window, layout = self.window, self.layout
        held = max(
            (length - coded for length, coded in zip(layout.lengths(), layout.coded, strict=True)), default=0
        )
        return max(1, window.sink_tokens + window.recent_window + window.block_tokens - held)

    def evict(self, keep: Tensor) -> None:
        """Remove tokens from all layers, whatever they are, and free what they took.

        Positions of the others stay as they are, and so does `get_seq_length`: the model counts on behind
        all that it was fed, and its attention passes over what is gone. Layers with sliding windows no longer
        attend to these tokens either; their bytes go when the window moves on.

        Exact tokens are freed one by one, down to those of the row that keeps most; sinks' places are not,
        but are filled anew once a row has no compressed tokens. What is left of blocks that are no longer
        whole is packed together, the codes as they are, so that at most ``block_tokens - 1`` places of a row
        are empty. Kernels attend where positions in blocks follow each other: once blocks were packed, plain
        torch attends to the codes.

        Parameters
        ----------
        keep
            ``[rows, columns]`` bool, or ``[columns]`` for all rows; True for what stays. Columns are those
            that the model counts (`get_seq_length`), padding and tokens evicted earlier included, of which it
            does not matter what is said.

        Raises
        ------
        ShapeError
            ``keep`` has another shape or dtype.
        CacheStateError
            A forward pass is under way, or an earlier one stopped halfway.

        Examples
        --------
        >>> keep = torch.ones(cache.get_seq_length(), dtype=torch.bool)       # doctest: +SKIP
        >>> keep[4:-1024] = False                                             # doctest: +SKIP
        >>> cache.evict(keep)                                                 # doctest: +SKIP
        """
        self._require_intact()
        layout = self.layout
        kept = required_mask(keep, layout.rows, layout.seen)
        if not layout.rows or bool(kept.all()):
            return
        self._steady = None
        with self._changing():
            self._keep(kept, layout.seen)

    def _keep(self, keep: Tensor, seen: int) -> None:
        """Hold only what is kept, ``[rows, columns]`` bool on the CPU, of columns that the model counts.

        Afterwards it counts ``seen`` of them.
        """
        exact = self._compressed[0].exact
        assert exact is not None  # there are rows
        self._forget_tables()  # before anything is copied
        plan = Eviction.plan(self.layout, keep, exact.tail_columns, seen)
        for order, layer in enumerate(self._compressed):
            assert layer.exact is not None
            plan.apply_to_exact(layer.exact)
            if self.layout.pages:
                plan.apply_to_codes(layer.pages, self.codec.layer_on(order, layer.device))
        columns = plan.positions.shape[1]
        self.layout.restore(columns, plan.starts, plan.positions, plan.pages, plan.holes)
