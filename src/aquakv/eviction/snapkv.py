"""SnapKV: what the end of a prompt attends to (arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
class SnapKV(EvictionPolicy):
    """Keeps what the last queries of a prompt attend to, with its surroundings (arXiv:2404.14469 §4).

    After a pass of more new tokens than `window` (a prompt, or a chunk of one) the attention of its last
    `window` queries is summed over these and averaged over `pool` neighbouring columns; the columns with the
    highest figures stay, and the window. Shorter passes, so all decoding, are left alone and cost nothing.
    The published method chooses by head; here scores are summed over heads and layers.

    Attributes
    ----------
    keep
        What stays of each row: a fraction (float) of all tokens fed, or a number (int) of tokens, the window
        included.
    window
        Queries that are watched; their tokens always stay.
    pool
        Columns that are averaged over, an odd number.

    Raises
    ------
    ConfigError
        A setting is impossible.

    Examples
    --------
    >>> cache = AquaCache(model, codec, eviction=SnapKV(keep=0.3))        # doctest: +SKIP
    """

    keep: float | int = 0.5
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        require_keep("SnapKV", self.keep)
        require_count("SnapKV", "window", self.window, 1)
        require_count("SnapKV", "pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ConfigError(f"SnapKV: pool: expected an odd number, got {self.pool}")

    def watched(self, new_columns: int) -> int:
        """Return that the last queries of a prompt are."""
        return self.window if new_columns > self.window else 0

    def choose(self, found: PassScores) -> Tensor | None:
        """Return what stays after a prompt."""
        if not self.watched(found.new_columns):
            return None
        scores = torch.nn.functional.avg_pool1d(
            found.scores[:, None], self.pool, stride=1, padding=self.pool // 2, count_include_pad=False
        )[:, 0]
        stays = found.held.clone()
        for row, held in enumerate(found.held):
            budget = budget_of(self.keep, int(found.fed[row]))
            stays[row] = newest_and_highest(scores[row], held, budget, self.window)
        return stays
