"""Scalar quantisers whose levels are a cubic of the code: near Lloyd-Max, and no table to decode.

The levels of a Lloyd-Max quantiser for a Gaussian lie denser in the middle than further out. A cubic follows
that closely: at 4 bits its squared error is 2 % above Lloyd-Max, that of equally spaced levels 21 %.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from aquakv.errors import ConfigError
from aquakv.numerics.packing import MAX_WIDTH


class CubicLevels(NamedTuple):
    """Levels ``x * (linear + cubic * x**2)`` with ``x = code - (2**width - 1) / 2``.

    Attributes
    ----------
    linear, cubic
        Coefficients.
    mse
        Expected squared error on unit Gaussian input, each value going to its nearest level.
    """

    linear: float
    cubic: float
    mse: float


# The least squared error that levels of this form have, rounded; the tests integrate and vary them. Up to two
# bits the levels are equally spaced (at 2 bits a cubic would be 1.1 % better, and slower to decode).
_LEVELS = {
    1: CubicLevels(1.5957691, 0.0, 0.36338023),
    2: CubicLevels(0.99568669, 0.0, 0.11884605),
    3: CubicLevels(0.47145523, 1.1584844e-2, 0.034623027),
    4: CubicLevels(0.24050726, 2.0975305e-3, 0.0096877685),
    5: CubicLevels(0.12182722, 3.3676003e-4, 0.0026493873),
    6: CubicLevels(0.061705956, 5.0861067e-5, 0.00071610256),
    7: CubicLevels(0.031279290, 7.4065040e-6, 0.00019195797),
    8: CubicLevels(0.015859503, 1.0520800e-6, 5.1091109e-05),
}


def cubic_levels(width: int) -> CubicLevels:
    """Return the quantiser of a width, 1 to 8 bits; others raise `ConfigError`."""
    if width not in _LEVELS:
        raise ConfigError(f"width must be a whole number of bits from 1 to {MAX_WIDTH}, got {width!r}")
    return _LEVELS[width]


@lru_cache(maxsize=MAX_WIDTH)
def cubic_level_table(width: int) -> Tensor:
    """Return the levels, ``[2**width]`` float32 in rising order, rounded once from float64; on the CPU."""
    linear, cubic, _ = cubic_levels(width)
    x = torch.arange(1 << width, dtype=torch.float64, device="cpu") - ((1 << width) - 1) / 2
    return (x * (linear + cubic * x.square())).float()


def nearest_cubic_level(values: Tensor, width: int) -> Tensor:
    """Return the codes, uint8 shaped like ``values`` (float32, finite), of the nearest levels.

    Half-way between two it is one of both, and the positive one at 0. No more than comparisons, products and
    tables that were rounded on a CPU: the same on every device.
    """
    half, (linear, cubic, _) = 1 << (width - 1), cubic_levels(width)
    if cubic == 0.0:
        codes = (values * (1 / linear)).floor_().add_(half)
        return codes.clamp_(0, 2 * half - 1).to(torch.uint8)
    first, bounds = _search_tables(width, values.device)
    magnitudes = values.abs().flatten()
    cell = (magnitudes * _CELLS_PER_UNIT).clamp_(max=len(first) - 1).int()
    index = first.index_select(0, cell)
    index += magnitudes >= bounds.index_select(0, index)
    outward = index.to(torch.uint8).view(values.shape)
    return torch.where(values < 0, half - 1 - outward, half + outward)


#: Levels are looked for in cells narrower than the distance of any two bounds, up to the last of these.
_CELLS_PER_UNIT = 128


@lru_cache(maxsize=64)
def _search_tables(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many bounds of positive levels are below each cell, and the bounds with an infinite last.

    Computed on a CPU; kept on the device.
    """
    levels = cubic_level_table(width)[1 << (width - 1) :].double()
    bounds = ((levels[1:] + levels[:-1]) / 2).float()
    cells = torch.arange(int(_CELLS_PER_UNIT * float(levels[-1])) + 1, device="cpu") / _CELLS_PER_UNIT
    first = torch.searchsorted(bounds, cells, right=True).int()
    return first.to(device), torch.cat([bounds, bounds.new_full((1,), float("inf"))]).to(device)
