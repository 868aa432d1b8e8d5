"""Which bits principal components get: dynamic programming over groups (arXiv:2511.01815 §3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aquakv.baselines.uniform import dequantize, quantize

#: Widths of codes; at 0 nothing is stored.
WIDTHS = (0, 1, 2, 4, 8)

#: Components of a unit; a group is 1, 4 or 16 units.
UNIT = 16
UNITS = (1, 4, 16)

#: Bits of a step and a zero point, which every token has for every group that is stored.
SCALE_BITS = 32

#: Budgets are counted in so many bits.
GRAIN = 16


@dataclass(frozen=True)
class Group:
    """Components ``start`` to ``stop`` of all that are coded, with ``width`` bits each."""

    start: int
    stop: int
    width: int


def group_errors(sample: Tensor, start: int, stop: int, widths: Sequence[int] = WIDTHS) -> list[float]:
    """Measure the squared error per token of components stored as one group, for each of ``widths``.

    Parameters
    ----------
    sample
        ``[tokens, components]`` float32 of calibration text.
    """
    part = sample[:, start:stop]
    errors = []
    for width in widths:
        left = part - dequantize(*quantize(part, width)) if width else part
        errors.append(float(left.square().sum(1).mean()))
    return errors


def plan_groups(
    units: int,
    sizes: Sequence[int],
    errors: Callable[[int, int], Sequence[float]],
    costs: Callable[[int, int], Sequence[int]],
    budget: int,
) -> list[tuple[int, int, int]]:
    """Divide units into groups and give each group one of several choices, at the least error.

    Parameters
    ----------
    units
        How many there are to cover.
    sizes
        Lengths that a group may have; 1 must be among them.
    errors, costs
        By first unit and length: the error and the whole-number cost of every choice. One choice of every
        group must cost nothing.
    budget
        What all groups may cost together.

    Returns
    -------
    list of (first, length, choice)
        In order.
    """
    best = torch.full((units + 1, budget + 1), torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = torch.zeros(units + 1, budget + 1, dtype=torch.int64)
    choices = len(costs(0, 1))
    for end in range(1, units + 1):
        for size in sizes:
            first = end - size
            if first < 0:
                continue
            for choice, (error, cost) in enumerate(zip(errors(first, size), costs(first, size), strict=True)):
                if cost > budget:
                    continue
                candidate = best[first, : budget + 1 - cost] + error
                row = best[end, cost:]
                better = candidate < row
                row[better] = candidate[better]
                taken[end, cost:][better] = size * choices + choice
    found, end, left = [], units, budget
    while end:
        size, choice = divmod(int(taken[end, left]), choices)
        first = end - size
        found.append((first, size, choice))
        left -= costs(first, size)[choice]
        end = first
    return found[::-1]


def plan(sample: Tensor, bits: float, features: int) -> tuple[Group, ...]:
    """Return the groups of components that are stored, at a mean of ``bits`` per feature before DEFLATE.

    Parameters
    ----------
    sample
        ``[tokens, components]`` float32 of calibration text, components by falling variance.
    bits
        Mean per feature, steps and zero points included.
    features
        How many there are.
    """
    components = sample.shape[1]
    units = -(-components // UNIT)
    measured: dict[tuple[int, int], list[float]] = {}

    def stop(first: int, size: int) -> int:
        return min((first + size) * UNIT, components)

    def errors(first: int, size: int) -> list[float]:
        if (first, size) not in measured:
            measured[first, size] = group_errors(sample, first * UNIT, stop(first, size))
        return measured[first, size]

    def costs(first: int, size: int) -> list[int]:
        count = stop(first, size) - first * UNIT
        return [-(-(width * count + SCALE_BITS) // GRAIN) if width else 0 for width in WIDTHS]

    groups = plan_groups(units, UNITS, errors, costs, int(bits * features) // GRAIN)
    return tuple(
        Group(first * UNIT, stop(first, size), WIDTHS[choice])
        for first, size, choice in groups
        if WIDTHS[choice]
    )
