"""Optimal scalar levels for one coordinate of a random unit vector."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: Cells of the density's table, and rounds: enough for levels that are right to 1e-5.
_CELLS = 1 << 16
_ROUNDS = 2000


@lru_cache(maxsize=64)
def sphere_levels(dim: int, width: int) -> Tensor:
    """Return the Lloyd–Max levels for a coordinate of a uniform random vector of length ``sqrt(dim)``.

    Its density is proportional to ``(1 - x²/dim)^((dim - 3) / 2)`` (arXiv:2504.19874, lemma 1), which tends
    to the unit Gaussian's.

    Parameters
    ----------
    dim
        Of the vector, at least 2.
    width
        Bits of a code.

    Returns
    -------
    Tensor
        ``[2**width]`` float32, rising, symmetric about zero. Shared: do not write to it.
    """
    bound = min(dim**0.5, 12.0)
    edges = torch.linspace(-bound, bound, _CELLS + 1, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    density = (1 - x.square() / dim).clamp(min=0).pow((dim - 3) / 2)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
    moment = torch.cat([torch.zeros(1, dtype=torch.float64), (density * x).cumsum(0)])
    # Quantiles to start from.
    shares = (torch.arange(1 << width, dtype=torch.float64) + 0.5) / (1 << width)
    levels = x[torch.searchsorted(mass[1:] / mass[-1], shares).clamp(max=_CELLS - 1)]
    for _ in range(_ROUNDS):
        middles = (levels[1:] + levels[:-1]) / 2
        # Position of each border among the cells, in between two of them too.
        place = ((middles + bound) / (2 * bound) * _CELLS).clamp(0, _CELLS)
        place = torch.cat([place.new_zeros(1), place, place.new_full((1,), _CELLS)])
        weights, sums = (_interpolate(table, place).diff() for table in (mass, moment))
        new = torch.where(weights > 0, sums / weights.clamp(min=1e-300), levels)
        new = (new - new.flip(0)) / 2
        if float((new - levels).abs().max()) < 1e-9:
            levels = new
            break
        levels = new
    return levels.float()


def _interpolate(table: Tensor, place: Tensor) -> Tensor:
    below = place.floor().long().clamp(max=len(table) - 2)
    return table[below] + (table[below + 1] - table[below]) * (place - below)
