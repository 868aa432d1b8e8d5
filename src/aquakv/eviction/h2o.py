"""H2O: heavy hitters of accumulated attention, and the newest tokens (arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.eviction.policy import (
    EvictionPolicy,
    PassScores,
    budget_of,
    newest_and_highest,
    require_count,
    require_keep,
)


@dataclass(frozen=True)
class H2O(EvictionPolicy):
    """Keeps the tokens that received most attention so far, and the newest ones (arXiv:2306.14048 §4).

    The attention of all queries is watched, in prefill and decoding, so every pass reconstructs keys and
    values and computes attention weights beside the model's own attention. The published method evicts a
    token a step, by head; here tokens go by `every` at a time, as evicting moves codes together, and at all
    heads and layers.

    Attributes
    ----------
    keep
        What stays of each row: a fraction (float) of all tokens fed, or a number (int) of tokens.
    recent
        The part of it that are the newest tokens.
    every
        How many tokens too many a row may hold before some are evicted.

    Raises
    ------
    ConfigError
        A setting is impossible.

    Examples
    --------
    >>> cache = AquaCache(model, codec, eviction=H2O(keep=0.5))           # doctest: +SKIP
    """

    keep: float | int = 0.5
    recent: float = 0.5
    every: int = 64
    accumulates = True

    def __post_init__(self) -> None:
        require_keep("H2O", self.keep)
        require_count("H2O", "every", self.every, 1)
        if not 0 <= self.recent <= 1:
            raise ConfigError(f"H2O: recent: expected a fraction from 0 to 1, got {self.recent!r}")

    def watched(self, new_columns: int) -> int:
        """Return that all queries are."""
        return new_columns

    def choose(self, found: PassScores) -> Tensor | None:
        """Return what stays, once some row holds `every` tokens too many."""
        stays = found.held.clone()
        due = False
        for row, held in enumerate(found.held):
            budget = budget_of(self.keep, int(found.fed[row]))
            excess = int(held.sum()) - budget
            if excess <= 0:
                continue
            due |= excess >= self.every
            stays[row] = newest_and_highest(found.scores[row], held, budget, round(self.recent * budget))
        return stays if due else None
