"""What a competitor is: its settings, what stays exact, and its coders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import Cache, PreTrainedModel

from aquakv.baselines.cache import BaselineCache
from aquakv.baselines.encoded import TensorCoder
from aquakv.cache.footprint import Footprint
from aquakv.config import WindowConfig
from aquakv.errors import ConfigError
from aquakv.models.adapter import ModelAdapter

#: What `Baseline.label` says of a window.
WINDOW_SUFFIX = "+window"

#: Compress every token as it comes.
NO_WINDOW = WindowConfig(sink_tokens=0, recent_window=0, block_tokens=1)


@dataclass(frozen=True)
class Baseline(ABC):
    """A method to compress KV caches, implemented from its paper.

    Attributes
    ----------
    bits
        Nominal bits per value, scales and the like not counted; what is held is measured.
    window
        Which tokens stay exact; what the paper says if None. With a window tokens are attended to exactly
        when they come, so that methods can be compared beside the same exact tokens.
    """

    bits: float
    window: WindowConfig | None = None

    #: How it is called.
    name: ClassVar[str]
    #: Where it is from.
    source: ClassVar[str]
    #: Its nominal bits.
    choices: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)
    #: Those taken if none are named.
    default_bits: ClassVar[float] = 2
    #: Whether its coders work on keys before rotary embedding.
    pre_rope: ClassVar[bool] = False
    #: Whether the paper's cache encodes tokens before, rather than after, they are first attended to.
    at_once: ClassVar[bool] = True
    #: Whether `fit` has to see text first.
    needs_fit: ClassVar[bool] = False
    #: Whether one forward pass over whole sequences can tell what streaming them gives.
    single_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in self.choices:
            choices = ", ".join(f"{choice:g}" for choice in self.choices)
            raise ConfigError(f"baseline {self.name}: expected bits of {choices}, got {self.bits:g}")

    @property
    def label(self) -> str:
        """Name and nominal bits, as ``--baseline`` takes them."""
        return f"{self.name}:{self.bits:g}{'' if self.window is None else WINDOW_SUFFIX}"

    @property
    def own_windows(self) -> tuple[WindowConfig, WindowConfig]:
        """Which tokens stay exact, of keys and of values, by the paper."""
        return NO_WINDOW, NO_WINDOW

    @property
    def windows(self) -> tuple[WindowConfig, WindowConfig]:
        """Which tokens stay exact, of keys and of values."""
        return self.own_windows if self.window is None else (self.window, self.window)

    @property
    def encodes_at_once(self) -> bool:
        """Whether tokens are encoded before, rather than after, they are first attended to."""
        return self.at_once and self.window is None

    @property
    def settings(self) -> dict[str, Any]:
        """What it is set to, for results: all that `label` does not say."""
        keys, values = self.windows
        return {
            "key_window": [keys.sink_tokens, keys.recent_window, keys.block_tokens],
            "value_window": [values.sink_tokens, values.recent_window, values.block_tokens],
            "keys": "before rotary embedding" if self.pre_rope else "after rotary embedding",
        }

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that are held once per model."""
        return 0

    def fit(self, model: PreTrainedModel, tokens: Tensor) -> Self:
        """Return the method fitted to a model.

        Parameters
        ----------
        model
            The model; its weights are left alone.
        tokens
            ``[sequences, seq_len]`` int64 token ids without padding.
        """
        return self

    def cache(self, model: PreTrainedModel) -> Cache:
        """Return an empty cache for a model.

        Raises
        ------
        ConfigError
            The method has to be fitted first, or does not take heads of the model's size.
        """
        return BaselineCache(model, self)

    def footprint(self, cache: Cache) -> Footprint:
        """Return what a cache of `cache` holds, by part."""
        assert isinstance(cache, BaselineCache)  # made by `cache`
        return cache.footprint()

    @abstractmethod
    def coders(self, adapter: ModelAdapter, order: int) -> tuple[TensorCoder, TensorCoder] | None:
        """Return the coders of keys and values at the ``order``-th compressed layer.

        None if the method does not encode layer by layer.
        """

    def require_single_pass(self) -> None:
        """Raise `ConfigError` if a single pass cannot tell what the method's cache gives."""
        if not self.single_pass:
            raise ConfigError(
                f"baseline {self.name}: a single pass over whole sequences cannot tell what its cache gives; "
                "use --protocol streaming"
            )

    def coded_tokens(self, length: int) -> tuple[int, int]:
        """Return how many tokens, of keys and of values, a cache of ``length`` tokens holds as codes."""
        keys, values = self.windows
        return keys.coded_tokens(length), values.coded_tokens(length)

    def pass_ends(self, seq_len: int) -> list[int]:
        """Return where forward passes have to end for every query to see what it sees token by token."""
        if self.encodes_at_once:
            return [seq_len]
        counts = [self.coded_tokens(length) for length in range(seq_len + 1)]
        return [*(end for end in range(1, seq_len) if counts[end] != counts[end - 1]), seq_len]


def largest_group(features: int, most: int) -> int:
    """Return the largest number up to ``most`` that divides ``features``."""
    return next(size for size in range(min(features, most), 0, -1) if features % size == 0)
