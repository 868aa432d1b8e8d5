"""One layer of an `AquaCache`, as transformers asks after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from aquakv.cache.layout import TokenLayout
from aquakv.cache.storage import CodedPages, ExactTokens
from aquakv.errors import CacheStateError


class AquaLayer(CacheLayerMixin):
    """One compressed layer: what it holds, and where it is asked; the work is `CacheStep`'s."""

    is_sliding = False

    def __init__(self, layout: TokenLayout, pages: CodedPages) -> None:
        super().__init__()
        self.layout = layout
        self.pages = pages
        self.exact: ExactTokens | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether the newest token can always be taken back, whatever has just been compressed."""
        return self.layout.window.recent_window > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the exact store for keys and values ``[rows, num_kv_heads, tokens, head_dim]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        sinks = self.layout.window.sink_tokens
        self.exact = ExactTokens.empty(key_states.transpose(1, 2), value_states.transpose(1, 2), sinks)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuse: a compressed layer needs the layer before it, which only the whole cache knows."""
        raise CacheStateError("a compressed layer is updated through AquaCache.update, not by itself")

    def get_seq_length(self) -> int:
        """Return the columns that the model counts, padding and evicted tokens included."""
        return self.layout.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns after ``query_length`` more, and the first one's index."""
        return self.layout.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return self.layout.rows

    def reset(self) -> None:
        """Drop everything."""
        self.pages.clear()
        self.exact = None
        self.is_initialized = False
