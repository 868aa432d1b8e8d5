"""The part of `AquaCache` that repeats decode steps, as graphs do (`DecodeGraph`)."""

from __future__ import annotations

import torch
from torch import Tensor

from aquakv.cache.encoding import PageEncoder
from aquakv.cache.evicting_cache import EvictingCache
from aquakv.cache.fused import why_not_fused
from aquakv.cache.paged import PagedState, PagedStep, attends_with_kernels, why_not_paged
from aquakv.cache.step import CacheStep
from aquakv.kernels.backend import Backend
from aquakv.kernels.operands import HEAD_DIMS
from aquakv.models.attention import why_no_views


class Steady:
    """Stands for steps that differ in their tokens and in what tensors hold; compared by identity.

    Attributes
    ----------
    masked
        Whether they are given an attention mask.
    places
        Addresses and sizes of what they read and write.
    """

    def __init__(self, masked: bool, places: tuple[tuple[int, int], ...]) -> None:
        self.masked = masked
        self.places = places


class RepeatingCache(EvictingCache):
    """What `AquaCache` knows of steps like the one before; what it works on is the rest of that."""

    _state: PagedState
    _backend: Backend
    _fused: bool
    _broken: bool
    _custom_mask: bool
    _prepared: PagedStep | None
    _steady: Steady | None
    _last_steady: Steady | None

    @property
    def _implementation(self) -> str:
        """By what the model attends, as transformers names it."""
        return getattr(self._adapter.config, "_attn_implementation", "eager")

    def _why_not_fused(self) -> str | None:
        """Return why nothing attends to codes, whatever is asked for, or None."""
        reason, implementation = why_not_fused(self.codec), self._implementation
        if reason is None and implementation not in ("sdpa", "eager"):
            reason = f"the model attends by {implementation}, expected sdpa or eager"
        return why_no_views(self._adapter) if reason is None else reason

    def _why_not_paged(self) -> str | None:
        reason = why_not_paged(self.codec, self.window.block_tokens)
        if reason is None and not self._adapter.rotates_by_halves:
            reason = "kernels rotate every layer's keys, in pairs half a rotary dimension apart"
        return reason

    def why_no_kernels(self) -> str | None:
        """Return why kernels attend to codes in no step through this cache, or None if they do in some.

        Raises
        ------
        ConfigError
            A backend was asked for that cannot run where the first compressed layer is.
        """
        reason, dim = self._why_not_fused() or self._why_not_paged(), self._adapter.head_dim
        if reason is None and not self._fused:
            reason = "keys and values are reconstructed (attention general, keep_decoded, or not sdpa)"
        if reason is None and self._pruner is not None and self._pruner.wants(1):
            reason = "the policy of eviction looks at every step's queries and keys"
        device = self._adapter.layer_device(self._adapter.compressed_layers[0])
        if reason is None and not attends_with_kernels(self._backend, dim, torch.empty(0, device=device)):
            dims = ", ".join(map(str, HEAD_DIMS))
            reason = (
                f"they run on a GPU, with heads of {dims}; this model is on {device}, with heads of {dim}"
            )
        return reason

    def why_no_graphs(self) -> str | None:
        """Return why no step through this cache can be captured in a graph, or None if some can."""
        if not self._fused:
            return "the cache reconstructs keys and values in every step (attention general)"
        reason = self._why_not_paged()
        if reason is None and self._adapter.changing_rope_type is not None:
            reason = f"its rotary frequencies ({self._adapter.changing_rope_type}) change as a sequence grows"
        if reason is None and len(self._compressed) < len(self.layers):
            reason = "some layers attend through sliding windows, whose caches move"
        return reason

    def steady(self, masked: bool) -> Steady | None:
        """Return what the next step of one token a row has in common with the last, if it can repeat it.

        It can if kernels attended in the last one, with a mask or without as in the next; if the next one
        makes no room, and all sinks are there. As long as the same object is returned, all tensors that the
        cache holds stay where they are. Where blocks fall due in the next step, `compress_due` comes behind
        it; with a policy of eviction, which looks at passes, such a step has to be the model's own.
        """
        self._require_intact()
        if self._steady is None or self._steady.masked != masked:
            return None
        if self._pruner is not None and self.compresses_next:
            return None
        least = max(1, self.window.sink_tokens)
        if any(length < least for length in self.layout.lengths()) or not self._has_room():
            return None
        return self._steady

    @property
    def compresses_next(self) -> bool:
        """Whether blocks fall due in a step of one token a row."""
        return bool(self.layout.blocks_due(1))

    def lasts(self, steady: Steady, masked: bool) -> bool:
        """Tell whether steps captured under ``steady`` can be repeated now or after the next step.

        They can if the next one repeats them, or compresses blocks for which there is room.
        """
        return self._steady is steady and steady.masked == masked and self._has_room()

    def moves_within(self, steps: int) -> bool:
        """Tell whether so many steps of one token a row use up the room, so that all moves to more of it."""
        return not self._has_room(len(self.layout.blocks_due(steps)))

    def _has_room(self, blocks: int = 0) -> bool:
        """Tell whether there is room for these and for another block of every row at all layers."""
        records = (layer.pages.records for layer in self._compressed)
        return all(one is not None and one.room >= blocks + self.layout.rows for one in records)

    def prepare_step(self, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Add a column for a step that `steady` allows; the model's next pass computes only.

        So what is captured of that pass takes nothing from the host that the steps after it change.

        Parameters
        ----------
        position_ids
            ``[rows or 1, 1]``.
        attention_mask
            ``[rows, columns, the new one included]``, or None.
        """
        before, mask = self.layout.columns, self._in_slots(attention_mask, 1)
        self.layout.append(1, position_ids, None, self.layout.rows)
        first = self._compressed[0]
        assert first.exact is not None  # there was a step before
        step = self._paged_step(before, first.exact.tail_columns, mask)
        self._prepared = step
        assert first.pages.records is not None  # there was a step before
        step.places_on(first.device, self._adapter.compressed_layers[0], first.pages.records)

    def repeat_step(self, position_ids: Tensor) -> None:
        """Add a column for a step that a graph computes, once `steady` has allowed it; host's part only."""
        self.layout.append(1, position_ids, None, self.layout.rows)
        for layer in self._compressed:
            assert layer.exact is not None  # there was a step before
            layer.exact.tail_columns += 1
        self._state.count_columns(self._compressed[0].device, self.layout.columns)

    def compress_due(self, attention_mask: Tensor | None) -> None:
        """Compress the blocks that fell due in a repeated step, which attended to their exact tokens.

        Parameters
        ----------
        attention_mask
            ``[rows, columns]`` of that step, or None if it had none.
        """
        mask, exact = self._in_slots(attention_mask, 0), self._compressed[0].exact
        assert exact is not None  # there was a step before
        with self._changing():
            self._last_steady, self._steady = self._steady, None
            step = self._paged_step(self.layout.columns - 1, exact.tail_columns - 1, mask)
            step.encoder = self._encoder(exact.tail_keys)
            for order, layer in enumerate(self._compressed):
                assert layer.exact is not None  # as in the first
                step.compress_layer(
                    self._adapter.compressed_layers[order],
                    self.codec.layer_on(order, layer.device),
                    layer.pages,
                    layer.exact,
                )
            step.take_outliers()
            step.finish()
            self._state.look_at(self.layout, mask)
            self._settle(step)

    def _encoder(self, key_states: Tensor) -> PageEncoder | None:
        """Return what encodes blocks of a pass whose keys are like these, unless the codec does."""
        adapter = self._adapter
        return PageEncoder.of(
            self.codec,
            self.window.block_tokens,
            self._state.backend,
            key_states,
            lambda: [adapter.layer_device(index) for index in adapter.compressed_layers],
        )

    def give_up_step(self) -> None:
        """Note that a prepared step was not computed to its end: the cache has to be reset."""
        self._prepared, self._steady, self._broken = None, None, True

    def _paged_step(self, columns_before: int, tail_columns: int, mask: Tensor | None) -> PagedStep:
        """Return a step behind so many columns, of which so many are held exactly behind the codes."""
        return PagedStep(
            self._adapter,
            self.layout,
            self.codec.config.guard,
            columns_before,
            self.codec,
            tail_columns,
            mask,
            self._state,
        )

    def _settle(self, step: CacheStep) -> None:
        """Bring what kernels read up to date after a pass, and note whether it can be repeated."""
        held, self._last_steady = self._last_steady, None
        # Kernels may have attended for the last time: what was compressed may be hidden, or out of order.
        other_way = self._state.sees_some_only or not all(self.layout.successive)
        if other_way or not isinstance(step, PagedStep):
            kept = self._state.kept_latents
            if kept is not None and (other_way or self._custom_mask):
                kept.forget()
            elif kept is not None:
                kept.forget_stale(self.layout)
            return
        exact = self._compressed[0].exact
        assert exact is not None  # the step held tokens there
        step.settle(exact.tail_columns)
        places = self._places()
        if held is not None and held.masked == step.masked and held.places == places:
            self._steady = held
        elif not step.due:  # otherwise kernels have yet to run where everything is now
            self._steady = Steady(step.masked, places)

    def _places(self) -> tuple[tuple[int, int], ...]:
        """Return the addresses and sizes of all that kernels read and write of what the cache holds."""
        tensors = list(self._state.tensors)
        for layer in self._compressed:
            records, exact = layer.pages.records, layer.exact
            assert records is not None  # as in every such cache
            assert exact is not None
            tensors += [*records.tensors, *exact.tensors]
        return tuple((tensor.data_ptr(), tensor.numel()) for tensor in tensors)
