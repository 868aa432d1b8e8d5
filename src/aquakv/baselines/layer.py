"""One layer of a competitor's cache: exact tokens at both ends, codes between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from aquakv.baselines.encoded import Encoded, TensorCoder, join
from aquakv.cache.records import storage_bytes
from aquakv.config import WindowConfig
from aquakv.errors import CacheStateError


@dataclass(frozen=True)
class Seen:
    """Codes and what they were decoded to, so that every code is decoded once and not in every pass.

    Not part of what a method holds: it only spares an evaluation time.

    Attributes
    ----------
    encoded
        The codes; what was decoded is theirs only.
    states
        ``[rows, num_kv_heads, tokens, head_dim]`` in the model's dtype, as attention takes them.
    """

    encoded: Encoded
    states: Tensor


@dataclass
class Side:
    """Keys, or values, of one layer: ``sinks``, then what is compressed, then ``tail``.

    Attributes
    ----------
    window
        Which tokens stay exact.
    coded
        Compressed tokens.
    encoded
        Their codes, where this layer holds them itself.
    seen
        What `encoded` was decoded to, as attention takes it, and the codes that this was; see `Seen`.
    sinks, tail
        ``[rows, num_kv_heads, tokens, head_dim]`` in the model's dtype, as the model gave them.
    """

    window: WindowConfig
    coded: int = 0
    encoded: Encoded | None = None
    seen: Seen | None = None
    sinks: Tensor | None = None
    tail: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens held."""
        exact = sum(part.shape[2] for part in (self.sinks, self.tail) if part is not None)
        return exact + self.coded

    def append(self, states: Tensor) -> None:
        """Add tokens ``[rows, num_kv_heads, tokens, head_dim]`` behind the others."""
        if self.sinks is None or self.tail is None:
            empty = states[:, :, :0].clone()
            self.sinks, self.tail = empty, empty
        missing = self.window.sink_tokens - self.sinks.shape[2]
        if missing > 0:
            self.sinks = torch.cat([self.sinks, states[:, :, :missing]], 2)
            states = states[:, :, missing:]
        self.tail = torch.cat([self.tail, states], 2)

    def due(self) -> int:
        """Return how many tokens of the tail are to be compressed now."""
        return max(0, self.window.coded_tokens(self.tokens) - self.coded)  # more are coded after a crop

    def take(self, count: int) -> Tensor:
        """Remove the tail's oldest tokens; return ``[tokens, rows, num_kv_heads, head_dim]`` float32."""
        assert self.tail is not None  # tokens are due
        taken = self.tail[:, :, :count].permute(2, 0, 1, 3).float().contiguous()
        self.tail = self.tail[:, :, count:].clone()
        self.coded += count
        return taken

    def everything(self, decoded: Tensor | None) -> Tensor:
        """Return all tokens in order, those compressed as ``decoded`` has them in the model's dtype."""
        assert self.sinks is not None  # there are tokens
        assert self.tail is not None
        if decoded is None:
            return torch.cat([self.sinks, self.tail], 2)
        return torch.cat([self.sinks, decoded.to(self.tail.dtype), self.tail], 2)

    def crop(self, count: int) -> None:
        """Remove the newest tokens, all of them exact."""
        assert self.tail is not None
        assert self.sinks is not None
        from_tail = min(count, self.tail.shape[2])
        self.tail = self.tail[:, :, : self.tail.shape[2] - from_tail].clone()
        self.sinks = self.sinks[:, :, : self.sinks.shape[2] - (count - from_tail)].clone()

    def select(self, rows: Tensor) -> None:
        """Keep copies of the given rows."""
        if self.sinks is not None and self.tail is not None:
            self.sinks, self.tail = self.sinks[rows], self.tail[rows]
        if self.encoded is not None:
            self.encoded = self.encoded.select(rows)

    @property
    def sink_bytes(self) -> int:
        """Bytes held for sinks."""
        return storage_bytes(self.sinks)

    @property
    def tail_bytes(self) -> int:
        """Bytes held for the exact tail."""
        return storage_bytes(self.tail)


#: Rotates keys ``[tokens, rows, num_kv_heads, head_dim]`` whose first has the given column, or undoes it.
Turn = Callable[[Tensor, int], Tensor]


class BaselineLayer(CacheLayerMixin):
    """One layer of a `BaselineCache`.

    Parameters
    ----------
    windows
        Which tokens stay exact, of keys and of values.
    coders
        Of keys and of values; None if the cache encodes all layers together.
    at_once
        Whether new tokens are encoded before they are attended to, rather than after.
    unturn, turn
        Undo and redo the rotary embedding of keys around the coder.
    """

    is_sliding = False

    def __init__(
        self,
        windows: tuple[WindowConfig, WindowConfig],
        coders: tuple[TensorCoder, TensorCoder] | None,
        at_once: bool,
        unturn: Turn,
        turn: Turn,
    ) -> None:
        super().__init__()
        self.windows, self.coders, self.at_once = windows, coders, at_once
        self.unturn, self.turn = unturn, turn
        self.sides = tuple(Side(window) for window in windows)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens and return all, those compressed as the codes give them.

        Parameters
        ----------
        key_states, value_states
            ``[rows, num_kv_heads, new_tokens, head_dim]``, keys after rotary embedding.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            side.append(states)
        if self.at_once:
            self.compress()
        keys, values = (side.everything(self.decoded(i)) for i, side in enumerate(self.sides))
        if not self.at_once:
            self.compress()
        return keys, values

    def compress(self) -> None:
        """Encode the tokens that are due."""
        if self.coders is None:
            return
        for side, coder in zip(self.sides, self.coders, strict=True):
            count = side.due()
            if count:
                held = side.encoded
                run = coder.encode(self.taken(side, count))
                side.encoded = run if held is None else join([held, run])
                if side.seen is not None and side.seen.encoded is held:
                    new = self._as_seen(side, coder.decode(run))
                    side.seen = Seen(side.encoded, torch.cat([side.seen.states, new], 2))

    def taken(self, side: Side, count: int) -> Tensor:
        """Take tokens from a side's tail as its coder wants them: keys before rotary embedding."""
        first = side.window.sink_tokens + side.coded
        states = side.take(count)
        return self.unturn(states, first) if side is self.sides[0] else states

    def decoded(self, side: int) -> Tensor | None:
        """Return the compressed tokens, ``[rows, num_kv_heads, tokens, head_dim]``; None if none."""
        held = self.sides[side]
        if self.coders is None or held.encoded is None:
            return None
        if held.seen is None or held.seen.encoded is not held.encoded:
            held.seen = Seen(held.encoded, self._as_seen(held, self.coders[side].decode(held.encoded)))
        return held.seen.states

    def as_attended(self, side: Side, states: Tensor) -> Tensor:
        """Return the newest compressed tokens, ``[tokens, rows, num_kv_heads, head_dim]``, for attention."""
        if side is self.sides[0]:
            states = self.turn(states, side.window.sink_tokens + side.coded - len(states))
        return states.permute(1, 2, 0, 3)

    def _as_seen(self, side: Side, states: Tensor) -> Tensor:
        return self.as_attended(side, states).to(self.dtype)

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return self.sides[0].tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens after ``query_length`` more, and the first one's index."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Drop everything."""
        self.sides = tuple(Side(window) for window in self.windows)
        self.is_initialized = False

    def take_over(self, other: BaselineLayer, memo: dict[int, Any]) -> None:
        """Hold copies of the tokens of another layer of the same kind."""
        self.sides = copy.deepcopy(other.sides, memo)
        if other.is_initialized:
            self.dtype, self.device, self.is_initialized = other.dtype, other.device, True

    def require_exact(self, count: int) -> None:
        """Raise `CacheStateError` if any of the newest ``count`` tokens is compressed."""
        for side in self.sides:
            exact = side.tokens if not side.coded else side.tokens - side.coded - side.window.sink_tokens
            if count > exact:
                raise CacheStateError(
                    f"cannot remove {count} tokens: only {exact} are still exact in this competitor's cache"
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens, which `require_exact` has allowed."""
        if tokens_to_remove and self.is_initialized:
            for side in self.sides:
                side.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` a copy of the present row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep copies of the given rows."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=self.device)[indices.to(self.device)]
            for side in self.sides:
                side.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        sinks = self.sides[0].sinks
        return 0 if sinks is None else len(sinks)
