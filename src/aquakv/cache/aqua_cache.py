"""`AquaCache`: a transformers cache that keeps all but a few tokens as codes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aquakv.cache.aqua_layer import AquaLayer
from aquakv.cache.footprint import Footprint, measure
from aquakv.cache.fused import MOST_QUERIES, FusedStep
from aquakv.cache.kept_latents import KeptLatents
from aquakv.cache.layout import TokenLayout
from aquakv.cache.paged import PagedState, PagedStep, attends_with_kernels
from aquakv.cache.pruning import Pruner
from aquakv.cache.reconstruct import Reconstructor
from aquakv.cache.repeating_cache import RepeatingCache, Steady
from aquakv.cache.saving import SavedCache, write_cache
from aquakv.cache.step import CacheStep
from aquakv.cache.storage import CodedPages
from aquakv.codec import ModelCodec
from aquakv.config import WindowConfig
from aquakv.errors import CacheStateError, ConfigError
from aquakv.eviction import EvictionPolicy
from aquakv.kernels.backend import Backend
from aquakv.models.adapter import ModelAdapter
from aquakv.models.hooks import ModelHooks
from aquakv.models.uncompiled import uncompiled

#: How a cache is attended to.
AttentionChoice = Literal["auto", "fused", "general"]


_HALFWAY = (
    "an earlier forward pass (or crop, or choice of rows) stopped halfway, so layers hold different tokens; "
    "call reset() first"
)


class AquaCache(RepeatingCache):
    """A compressed KV cache for ``model.generate(past_key_values=…)``.

    The first tokens of every sequence and the newest ones stay in the model's dtype; the rest is held as
    packed codes. At each layer the codes are reconstructed, attended to and discarded. A token is encoded
    once; nothing is ever requantised.

    Parameters
    ----------
    model
        The model that the cache is for. Hooks that tell the cache positions and padding are installed on it,
        and removed with the last cache.
    codec
        The model's codec, or the path of its file.
    window
        Which tokens stay exact; the codec's own choice if None.
    attention
        ``general`` reconstructs all keys and values of a layer and leaves attention to the model. ``fused``
        attends to the codes in passes of up to `MOST_QUERIES` new tokens (decoding), where that is less work.
        ``auto`` is ``fused`` where the codec allows it and the model attends by ``sdpa`` (those who chose
        ``eager`` may want its attention weights, which ``fused`` has not).
    backend
        What encodes where codes are kept in pages, and what attends to them with one new token a row:
        ``auto`` leaves both to kernels on a GPU (attention only where all positions follow each other and no
        mask hides compressed tokens); ``torch`` computes the kernels' definitions instead, anywhere;
        ``triton`` and ``hopper`` insist on kernels. Heads of other sizes than 64, 128 and 256 are encoded by
        the codec itself. In passes that reconstruct, what does so: see `Reconstructor`.
        With kernels on a GPU a step of one token takes it that the attention mask says of compressed tokens
        what the mask before said: one that comes to hide some is noticed at the next step (at the second if
        the step before compressed some), with a warning. Steps that a graph repeats do not look at it.
    eviction
        What evicts tokens after forward passes, see `aquakv.eviction`; None evicts nothing by itself.
    keep_decoded
        Keep what codes were reconstructed to beside them, instead of reconstructing it in every pass: memory
        of an exact cache more, and steps nearly as fast as with one. For codes that cannot be attended to
        (``storage``) while a cache that was put aside is in use. `forget_decoded` frees that memory.
    keep_latents
        Keep every layer's latents beside the codes instead of making them anew in every step in which kernels
        attend: rank × 16 bits a token and layer more (0.5 bits per value with rank 64 and 2 × 1024 values a
        token), and less work in each step. Other passes do not use them.

    Raises
    ------
    CodecMismatchError
        The codec belongs to another model.
    ConfigError
        ``fused`` was asked for but cannot be had, or a policy cannot see queries, with the reason.
    UnsupportedModelError
        The model cannot be compressed correctly.

    Examples
    --------
    >>> cache = AquaCache(model, "codec.safetensors")                     # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)                   # doctest: +SKIP
    >>> print(cache.footprint())                                          # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codec: ModelCodec | str | Path,
        *,
        window: WindowConfig | None = None,
        attention: AttentionChoice = "auto",
        backend: Backend = "auto",
        eviction: EvictionPolicy | None = None,
        keep_decoded: bool = False,
        keep_latents: bool = False,
    ) -> None:
        name = "codec" if isinstance(codec, ModelCodec) else str(codec)
        self.codec = codec if isinstance(codec, ModelCodec) else ModelCodec.load(codec)
        self._adapter: ModelAdapter = ModelHooks.acquire(model, self)
        self.codec.fingerprint.require_match(self._adapter.fingerprint(), name)
        self.window = window or self.codec.config.window
        self._choice: AttentionChoice = attention
        if backend not in get_args(Backend):
            raise ConfigError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
        self._backend: Backend = backend
        self._keep_latents = keep_latents
        if keep_decoded and attention == "fused":
            raise ConfigError("keep_decoded: fused attention decodes nothing; use attention general or auto")
        self._keep_decoded = keep_decoded
        self._fused = not keep_decoded and self._may_fuse(attention)
        if self._fused:
            ModelHooks.accept_views(self._adapter)
        self._order = {layer: index for index, layer in enumerate(self._adapter.compressed_layers)}
        self._step: CacheStep | None = None
        self._done: CacheStep | None = None
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._custom_mask = False
        self._in_forward = False
        self._prepared: PagedStep | None = None
        self._broken = False
        self.eviction = eviction
        self._paged = self._fused and self._why_not_paged() is None
        if keep_latents and not self._paged:
            raise ConfigError(
                f"keep_latents: kernels cannot attend to this cache's codes: {self.why_no_kernels()}"
            )
        self._build()
        super().__init__(layers=self.layers)

    def _build(self) -> None:
        self.layout = TokenLayout(self.window)
        self._frequencies = 0
        self._last_steady: Steady | None = None
        self._forget_tables()
        self.layers: list[Any] = self._adapter.exact_layers()
        for index in self._adapter.compressed_layers:
            self.layers[index] = AquaLayer(self.layout, CodedPages(self.window.block_tokens))

    @property
    def _compressed(self) -> list[AquaLayer]:
        return [layer for layer in self.layers if isinstance(layer, AquaLayer)]

    # --- what the hooks report -------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The decoder stack whose forward passes concern this cache."""
        return self._adapter.decoder

    def forward_begins(self, attention_mask: Any) -> None:
        """Receive the mask of a forward pass (called by the model's hooks)."""
        self._require_intact()
        if self._in_forward:
            # The last pass was interrupted, behind its last layer: what it left may be stale.
            self._done = None
            self._forget_tables()
        padding = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2)
        self._in_forward, self._custom_mask, self._positions = True, not padding, None
        self._mask = attention_mask if padding else None

    def positions_known(self, position_ids: Tensor) -> None:
        """Receive the position ids of a forward pass (called by the model's hooks).

        Raises
        ------
        CacheStateError
            The pass rotates by other frequencies than those by which the tokens held were rotated. Nothing
            has changed then.
        """
        frequencies = self._adapter.frequencies(position_ids)
        if self.layout.seen and frequencies != self._frequencies:
            raise CacheStateError(
                f"in this pass the model's rotary embedding ({self._adapter.changing_rope_type}) changes its "
                f"frequencies, but the cache holds {self.layout.columns} tokens rotated by those before; "
                "end the sequence here, or feed all of it anew to a cache that was reset"
            )
        self._frequencies, self._positions = frequencies, position_ids

    def _attends_to_codes(self, new_columns: int) -> bool:
        """Tell whether the pass that begins attends to codes."""
        if not self._fused or self._custom_mask or new_columns > MOST_QUERIES or not self.layout.pages:
            return False
        if self._pruner is not None and self._pruner.wants(new_columns):
            return False
        return self._mask is None or self._mask.shape[1] >= self.layout.columns + new_columns

    def _attends_with_kernels(self, key_states: Tensor) -> bool:
        """Tell whether, in a pass that attends to codes, kernels do so if no mask hides any."""
        return (
            self._paged
            and key_states.shape[2] == 1
            and attends_with_kernels(self._backend, self._adapter.head_dim, key_states)
            and all(self.layout.successive)
        )

    def _may_fuse(self, attention: AttentionChoice) -> bool:
        if attention not in get_args(AttentionChoice):
            raise ConfigError(f"attention: expected auto, fused or general, got {attention!r}")
        if attention == "general":
            return False
        reason = self._why_not_fused()
        if reason is not None and attention == "fused":
            raise ConfigError(f"attention: this codec cannot be attended to directly: {reason}; use general")
        return reason is None and (attention == "fused" or self._implementation == "sdpa")

    def forward_ends(self) -> None:
        """Learn that a forward pass is over (called by the model's hooks)."""
        step, self._done = self._done, None
        try:
            if step is not None:
                self._settle(step)
                self._prune()
        except BaseException:
            self._forget_tables()
            raise
        finally:
            self._in_forward, self._mask, self._positions = False, None, None
            self._custom_mask = False

    def _forget_tables(self) -> None:
        """Drop what is kept for kernels, which is made anew from the layers and the layout."""
        self._state = PagedState(self._backend, KeptLatents() if self._keep_latents else None)
        self._steady: Steady | None = None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Refuse further use, until a reset, if what is done inside does not come to its end.

        Only of `CacheStateError` it is taken that it is raised before anything has changed.
        """
        before, self._broken = self._broken, True
        try:
            yield
        except CacheStateError:
            self._broken = before
            raise
        self._broken = before

    def _require_intact(self) -> None:
        # Sliding layers before the first compressed one, or behind the last, are updated outside of any step.
        if (
            self._step is not None
            or self._broken
            or len({layer.get_seq_length() for layer in self.layers}) > 1
        ):
            raise CacheStateError(_HALFWAY)

    # --- the work ---------------------------------------------------------------------------------------

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens at a layer and return all keys and values to attend to.

        Parameters
        ----------
        key_states, value_states
            ``[rows, num_kv_heads, new_tokens, head_dim]``, keys after rotary embedding.
        layer_idx
            The layer. Within a forward pass the layers come in order.

        Returns
        -------
        keys, values
            ``[rows, num_kv_heads, columns, head_dim]`` in the same dtype: older tokens as the codes give
            them, sinks, recent tokens and all new tokens exactly. Discard them after the attention. In a pass
            that attends to codes, a `CodedView` in place of each.

        Raises
        ------
        CacheStateError
            The call does not come from a forward pass of the cache's model, or not in order.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, AquaLayer):
            with self._changing():
                return layer.update(key_states, value_states, *args, **kwargs)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise CacheStateError("the cache is for inference; run the model under torch.no_grad()")
        if layer.is_initialized and key_states.dtype != layer.dtype:
            raise CacheStateError(f"the cache holds {layer.dtype}, but got keys of {key_states.dtype}")
        order = self._order[layer_idx]
        if order == 0:
            self._begin_step(key_states)
        step = self._step
        if step is None or order != step.next_layer:
            turn = 0 if step is None else step.next_layer
            expected = self._adapter.compressed_layers[turn]
            raise CacheStateError(f"layer {layer_idx} was updated out of turn; layer {expected} comes next")
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        exact = layer.exact
        assert exact is not None  # lazy_initialization has run
        codec = self.codec.layer_on(order, key_states.device)
        everything = step.run_layer(layer_idx, codec, layer.pages, exact, key_states, value_states)
        if step.next_layer == len(self._order):
            step.finish()
            self._step, self._done = None, step
            if self._paged and (step.due or key_states.shape[2] > 1):
                self._state.look_at(self.layout, self._mask)
        holes, (keys, values) = self.layout.holes, everything
        if holes is None or not isinstance(keys, Tensor):
            return keys, values
        return holes.spread(keys, self.layout.seen), holes.spread(values, self.layout.seen)

    def _begin_step(self, key_states: Tensor) -> None:
        if self._step is not None or self._broken:
            raise CacheStateError(_HALFWAY)
        if not self._in_forward or self._positions is None:
            raise CacheStateError(
                "AquaCache.update was called outside a forward pass of the model that it was built for; "
                f"expected a {self._adapter.name} forward pass with past_key_values=cache"
            )
        self._last_steady, self._steady = self._steady, None
        if self._prepared is not None:
            self._step, self._prepared = self._prepared, None
            return
        with self._changing():
            self._step = self._new_step(key_states, self._positions)

    def _new_step(self, key_states: Tensor, positions: Tensor) -> CacheStep:
        """Add a pass's columns to the layout, and return the step that adds them to the layers."""
        rows, _, new_columns, _ = key_states.shape
        self._mask = self._in_slots(self._mask, new_columns)
        before, fused = self.layout.columns, self._attends_to_codes(new_columns)
        kernels = fused and self._attends_with_kernels(key_states)
        self.layout.append(new_columns, positions, self._mask, rows)
        shared = (self._adapter, self.layout, self.codec.config.guard, before)
        exact = self._compressed[0].exact
        if not fused or exact is None:
            step = CacheStep(*shared, Reconstructor(self.codec, self._backend), self._keep_decoded)
        elif kernels and self._state.sees_all(self.layout, self._mask):
            step = self._paged_step(before, exact.tail_columns, self._mask)
        else:
            step = FusedStep(*shared, self.codec, exact.tail_columns, self._mask)
        if step.due:
            step.encoder = self._encoder(key_states)
        return step

    # --- the rest of the protocol -------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop all tokens; the cache is as new."""
        self._broken = True  # until all is new
        self._step = self._done = self._prepared = None
        self._in_forward = False
        self._pruner = None if self._pruner is None else Pruner(self._pruner.policy)
        self._build()
        self._broken = False

    def forget_decoded(self) -> None:
        """Free what was kept decoded; the next pass decodes all codes anew."""
        self._require_intact()
        for layer in self._compressed:
            layer.pages.decoded = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: ``-n`` removes ``n``; a positive number is a length to keep.

        Raises
        ------
        CacheStateError
            Some of these tokens are compressed already. Nothing has changed then.
        """
        self._require_intact()
        tokens_to_remove = int(tokens_to_remove)  # transformers may hand over a tensor
        columns = self.layout.seen
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, columns - tokens_to_remove)
        removed = min(removed, columns)
        if removed == 0:
            for layer in self.layers:  # those that recorded what has left their windows may now forget it
                if layer.is_initialized and getattr(layer, "record_past", False):
                    layer.crop(0)
            return
        for layer in self.layers:
            dropped = layer.is_sliding and columns >= layer.sliding_window
            if dropped and not getattr(layer, "record_past", False):
                raise CacheStateError(
                    f"cannot remove {removed} tokens: layers with a sliding window have dropped what was "
                    "before them; call activate_past_recording() before feeding tokens that may have to go"
                )
        self._steady = None
        with self._changing():
            whole = self.layout.crop(removed)
            if not whole:
                stays = torch.arange(columns) < columns - removed
                self._keep(stays.expand(self.layout.rows, -1), columns - removed)
            for layer in self.layers:
                if not isinstance(layer, AquaLayer):
                    layer.crop(-removed)
                elif layer.exact is not None and whole:
                    layer.exact.crop(removed)
            if self._pruner is not None:
                self._pruner.crop(columns - removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` a copy of the present row ``beam_idx[i]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep copies of the given rows, in that order."""
        self._require_intact()
        if not self.layout.rows:
            return
        everything = torch.arange(self.layout.rows)
        rows = everything[torch.as_tensor(indices).cpu()].tolist()  # negative numbers, masks: as for tensors
        if rows == everything.tolist():
            return
        self._steady = None
        with self._changing():
            if self._state.kept_latents is not None:
                self._state.kept_latents.forget()  # before anything is copied
            pages = torch.tensor(self.layout.select(rows), dtype=torch.long)
            if self._pruner is not None:
                self._pruner.select(rows)
            for layer in self.layers:
                if not isinstance(layer, AquaLayer):
                    _select_rows(layer, rows)
                elif layer.exact is not None:
                    layer.pages.select(pages)
                    layer.exact.select(torch.as_tensor(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.batch_select_indices([row for row in range(self.layout.rows) for _ in range(repeats)])

    def save(self, path: str | Path, *, include_codec: bool = False) -> None:
        """Write all that the cache holds to one ``.safetensors`` file, all or nothing, as it is held.

        Parameters
        ----------
        path
            The file.
        include_codec
            Whether to write the codec too. Otherwise the file has only its checksum, and `load` wants it.

        Raises
        ------
        CacheStateError
            A forward pass is under way, or an earlier one stopped halfway.
        OutputError
            The file cannot be written; nothing is left behind, an older file stays as it was.
        """
        self._require_intact()
        write_cache(Path(path), self.codec, self.layout, self.layers, include_codec)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        codec: ModelCodec | str | Path | None = None,
        *,
        attention: AttentionChoice = "auto",
        backend: Backend = "auto",
        eviction: EvictionPolicy | None = None,
        keep_decoded: bool = False,
        keep_latents: bool = False,
    ) -> AquaCache:
        """Return a cache that goes on where a saved one was, on the devices of the model's layers.

        Parameters
        ----------
        path
            The file that `save` wrote.
        model
            The model that the cache is for, in the dtype that it had.
        codec
            The codec that the cache was saved with, or the path of its file; None takes it from the cache
            file, if that has it.
        attention, backend, eviction, keep_decoded, keep_latents
            As for a new cache. What a policy had seen is not in the file.

        Raises
        ------
        CacheFileError
            The file is missing, truncated, altered or no cache; or the codec is another than it was saved
            with, or is missing. No file content is ever executed.
        CodecMismatchError
            The codec belongs to another model.
        """
        saved = SavedCache.read(Path(path), codec)
        cache = cls(
            model,
            saved.codec,
            window=saved.window,
            attention=attention,
            backend=backend,
            eviction=eviction,
            keep_decoded=keep_decoded,
            keep_latents=keep_latents,
        )
        saved.restore(cache._adapter, cache.layout, cache.layers)
        if cache.layout.positions is not None and cache.layout.columns:
            cache._frequencies = cache._adapter.frequencies(cache.layout.positions)
        return cache

    def footprint(self) -> Footprint:
        """Return the bytes that the cache holds, by part, from its tensors' storages."""
        layout, latents = self.layout, self._state.kept_latents
        tables = 0 if layout.holes is None else layout.holes.footprint()
        tables += 0 if self._pruner is None else self._pruner.footprint()
        return measure(
            self.layers,
            layout,
            self.codec.fingerprint.features,
            table_bytes=tables + self._state.footprint(),
            latent_bytes=0 if latents is None else latents.footprint(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> AquaCache:
        """Copy the tokens; the model and the codec are shared."""
        self._require_intact()
        other = AquaCache(
            self._adapter.model,
            self.codec,
            window=self.window,
            attention=self._choice,
            backend=self._backend,
            keep_decoded=self._keep_decoded,
            keep_latents=self._keep_latents,
        )
        other._pruner = copy.deepcopy(self._pruner, memo)
        other._frequencies = self._frequencies
        other.layout = copy.deepcopy(self.layout, memo)
        other.layers = [copy.deepcopy(layer, memo) for layer in self.layers]
        for layer in other._compressed:
            layer.layout = other.layout
        return other


def _select_rows(layer: Any, rows: list[int]) -> None:
    """Keep copies of rows of one of transformers' layers, which leave the batch as it was when emptied."""
    if layer.is_initialized and layer.get_seq_length() == 0:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    else:
        layer.batch_select_indices(torch.as_tensor(rows))
