"""What an eviction policy is: which queries it watches, and what stays after a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.errors import ConfigError


@dataclass(frozen=True)
class PassScores:
    """What a policy knows once a forward pass is over.

    Attributes
    ----------
    scores
        ``[rows, columns]`` float32: attention that each column received from the queries that the policy
        watches, summed over these, over heads and over compressed layers.
    held
        ``[rows, columns]`` bool: whether there is a token that is still held.
    fed
        ``[rows]`` int64: all tokens that there were.
    new_columns
        Columns of this pass; they are the last.
    """

    scores: Tensor
    held: Tensor
    fed: Tensor
    new_columns: int


class EvictionPolicy(ABC):
    """Chooses the tokens that an `AquaCache` keeps; hand it over as ``AquaCache(…, eviction=policy)``.

    A policy holds settings only. What it has seen of a sequence is the cache's, and is chosen, repeated and
    cropped with it. Values of a layer are predicted from its keys, and keys from the layers before, so a
    token is evicted at all layers or at none: scores are summed over layers and heads, where published
    policies choose by head.
    """

    #: Whether scores add up from pass to pass; otherwise each pass has its own.
    accumulates: bool = False

    @abstractmethod
    def watched(self, new_columns: int) -> int:
        """Return of how many of a pass's newest queries the attention is wanted; 0 for none.

        A pass that is watched reconstructs its keys and values: the queries meet the keys as it attends to
        them.
        """

    @abstractmethod
    def choose(self, found: PassScores) -> Tensor | None:
        """Return what stays, ``[rows, columns]`` bool, or None if nothing is to be evicted now."""


def budget_of(keep: float | int, fed: int) -> int:
    """Return how many of a row's tokens may stay: a fraction of those fed, or as an int so many."""
    return keep if isinstance(keep, int) else max(1, round(keep * fed))


def require_keep(name: str, keep: float | int) -> None:
    """Raise `ConfigError` unless ``keep`` is a fraction or a number of tokens."""
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not number or (isinstance(keep, int) and keep < 1) or (isinstance(keep, float) and not 0 < keep <= 1):
        raise ConfigError(
            f"{name}: keep: expected a fraction of the tokens (0.0 to 1.0, above 0) or, as an int, a number "
            f"of tokens from 1 on, got {keep!r}"
        )


def require_count(name: str, what: str, value: int, least: int) -> None:
    """Raise `ConfigError` unless a setting is a whole number from ``least`` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: {what}: expected a whole number from {least} on, got {value!r}")


def newest_and_highest(scores: Tensor, held: Tensor, budget: int, recent: int) -> Tensor:
    """Return the newest ``recent`` of the tokens held, and of the others those with the highest scores.

    Takes and returns ``[columns]``; ``budget`` tokens in all, or ``recent`` if that is more.
    """
    latest = newest(held, recent)
    return latest | highest(scores, held & ~latest, budget - int(latest.sum()))


def newest(held: Tensor, count: int) -> Tensor:
    """Return which are the newest ``count`` of the tokens held, ``[columns]`` bool."""
    return held & (held.flip(0).cumsum(0).flip(0) <= count)


def highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Return which ``count`` of some columns have the highest scores, ``[columns]`` bool; older first."""
    chosen = torch.zeros_like(among)
    order = scores.masked_fill(~among, -torch.inf).argsort(descending=True, stable=True)
    chosen[order[: max(0, min(count, int(among.sum())))]] = True
    return chosen
