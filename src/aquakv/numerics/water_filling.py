"""Reverse water-filling over whole bits: a width for every coefficient under a budget.

Each width b has a unit-variance distortion D(b), so a coefficient of variance v contributes v * D(b) and
costs b bits. For a price theta per bit the best width of each coefficient is independent of all others; the
price that meets the budget gives an optimal allocation (Cover and Thomas, Elements of Information Theory,
§10.3.3, here with the quantisers' true distortions in place of 4^-b).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aquakv.errors import ConfigError, InputError, ShapeError
from aquakv.numerics.cubic_levels import cubic_levels
from aquakv.numerics.grids import load_grid
from aquakv.numerics.packing import MAX_WIDTH

# Halvings of the price's logarithm: down to float64's resolution from any start.
_BISECTIONS = 100

# Prices below this part of the highest that matters buy every bit that is worth anything.
_CHEAPEST = 1e-40


def unit_distortions(widths: Sequence[int], arithmetic: bool = False) -> dict[int, float]:
    """Return the expected squared error on a unit Gaussian for each width, 1 for width 0.

    Parameters
    ----------
    widths : sequence of int
        In 0..8.
    arithmetic : bool
        Levels of `cubic_levels` instead of Lloyd-Max tables.

    Raises
    ------
    ConfigError
        If a width is not in 0..8.
    """
    for width in widths:
        _check_width(width)

    def distortion(width: int) -> float:
        if width == 0:
            return 1.0
        return cubic_levels(width).mse if arithmetic else load_grid(1, 1 << width).mse

    return {width: distortion(width) for width in widths}


def widths_at(
    variances: Tensor, widths: Sequence[int], distortions: Mapping[int, float], theta: float
) -> Tensor:
    """Choose each coefficient's best width for a price per bit: the minimiser of ``v * D(b) + theta * b``.

    Parameters
    ----------
    variances : Tensor
        ``[n]`` float64, finite, not negative, already multiplied by the coefficients' importance.
    widths : sequence of int
        The allowed widths, ascending, the first of them 0.
    distortions : mapping of int to float
        Unit-variance squared error of each width, 1 at width 0 and falling. Need not be convex.
    theta : float
        Price, not negative.

    Returns
    -------
    Tensor
        ``[n]`` uint8; the smaller width where two cost the same.

    Raises
    ------
    ConfigError
        If widths, distortions or price are not as above.
    ShapeError
        If ``variances`` is not ``[n]`` float64.
    InputError
        If a variance is negative or not finite.
    """
    options, errors = check_options(widths, distortions)
    check_variances(variances)
    if not theta >= 0:
        raise ConfigError(f"water-filling: expected a price >= 0, got {theta}")
    return _widths_at(variances, options, errors, theta)


def theta_for(
    variances: Sequence[Tensor], widths: Sequence[int], distortions: Mapping[int, float], mean_bits: float
) -> float:
    """Find the lowest price at which `widths_at` keeps many tensors together within a budget.

    Parameters
    ----------
    variances : sequence of Tensor
        Each ``[n_i]`` float64, finite, not negative; the n_i may differ.
    widths, distortions
        As for `widths_at`.
    mean_bits : float
        Budget per coefficient over all tensors, not negative.

    Returns
    -------
    float
        The price; 0 if the budget buys everything.

    Raises
    ------
    ConfigError, ShapeError, InputError
        As `widths_at`; ConfigError also if ``mean_bits`` is negative or not a number.
    """
    options, errors = check_options(widths, distortions)
    for part in variances:
        check_variances(part)
    pooled = torch.cat([part.cpu() for part in variances]) if len(variances) else torch.empty(0).double()
    return _theta_for(pooled, options, errors, _budget(mean_bits, len(pooled)))


def allocate_widths(
    variances: Tensor, widths: Sequence[int], distortions: Mapping[int, float], mean_bits: float
) -> Tensor:
    """Give each coefficient a width so that the summed distortion is least within a budget.

    The price that `theta_for` finds leaves some bits over where the next step would cost more than is left,
    or where many coefficients are alike. They go to the promotions that gain most per bit until none fits.
    With a convex distortion for every width 0..b the result is optimal.

    Parameters
    ----------
    variances : Tensor
        ``[n]`` float64, finite, not negative, already multiplied by the coefficients' importance.
    widths, distortions
        As for `widths_at`.
    mean_bits : float
        Budget per coefficient, not negative.

    Returns
    -------
    Tensor
        ``[n]`` uint8, on the device of ``variances``, summing to at most ``mean_bits * n``. Coefficients
        without variance get no bits, even if some are left over.

    Raises
    ------
    ConfigError, ShapeError, InputError
        As `theta_for`.
    """
    options, errors = check_options(widths, distortions)
    check_variances(variances)
    values = variances.cpu()
    budget = _budget(mean_bits, len(values))
    theta = _theta_for(values, options, errors, budget)
    chosen = _widths_at(values, options, errors, theta)
    spent = _spend(values.tolist(), chosen.tolist(), dict(zip(options, errors, strict=True)), budget)
    return torch.tensor(spent, dtype=torch.uint8, device=variances.device)


def fill_bytes(
    allocation: Tensor, variances: Tensor, widths: Sequence[int], distortions: Mapping[int, float]
) -> Tensor:
    """Change an allocation as little as possible so that the codes of every width fill whole bytes.

    The number of coefficients of each width w becomes a multiple of ``8 / gcd(8, w)``. Of all allocations
    that satisfy this, those whose total is nearest to the given one are considered (the lower total if two
    are equally near), and of these the one with the least distortion is returned: it is found exactly, by
    dynamic programming over the coefficients in order of variance, in time and memory proportional to the
    product of coefficients, bytes and widths. If width 1, 2, 4 or 8 is among ``widths``, the total changes by
    at most 4 bits wherever enough coefficients are left to give bits to.

    Parameters
    ----------
    allocation : Tensor
        ``[n]`` uint8 widths; only their sum matters.
    variances : Tensor
        ``[n]`` float64, as for `widths_at`.
    widths, distortions
        As for `widths_at`.

    Returns
    -------
    Tensor
        ``[n]`` uint8, on the device of ``variances``. Larger variances get no fewer bits.

    Raises
    ------
    ConfigError, ShapeError, InputError
        As `widths_at`; ShapeError also if the lengths differ.
    """
    options, errors = check_options(widths, distortions)
    check_variances(variances)
    if allocation.shape != variances.shape or allocation.dtype != torch.uint8:
        raise ShapeError(
            f"water-filling: expected uint8 widths {list(variances.shape)} like the variances, got "
            f"{allocation.dtype} {list(allocation.shape)}"
        )
    ordered, order = variances.cpu().sort(descending=True, stable=True)
    counts = _byte_counts(ordered, options[1:], errors[1:], int(allocation.sum(dtype=torch.int64)))
    filled = torch.zeros(len(ordered), dtype=torch.uint8)
    start = 0
    for width, count in counts:
        filled[order[start : start + count]] = width
        start += count
    return filled.to(variances.device)


def _byte_counts(
    ordered: Tensor, options: Sequence[int], errors: Sequence[float], total_bits: int
) -> list[tuple[int, int]]:
    """Return how many of the variances, in falling order, get each width, the widest first.

    ``best[p, t]`` is the least change of distortion if the first p coefficients take t bytes.
    """
    size = len(ordered)
    target = max(0, -(-(total_bits - 4) // 8))
    # A smallest unit has at most 7 bytes, so totals further above than this are never the nearest ones.
    limit = target + MAX_WIDTH
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    best = torch.full((size + 1, limit + 1), math.inf, dtype=torch.float64)
    best[0, 0] = 0.0
    choices: list[tuple[int, int, int, Tensor]] = []
    for width, error in sorted(zip(options, errors, strict=True), reverse=True):
        unit = 8 // math.gcd(8, width)
        unit_bytes = unit * width // 8
        taken = torch.zeros((size + 1, limit + 1), dtype=torch.bool)
        # A chain of units of this width: rows [p, p + unit) are final before those a unit on need them.
        for first in range(unit, size + 1, unit):
            stop = min(first + unit, size + 1)
            rows, before = slice(first, stop), slice(first - unit, stop - unit)
            gain = (1 - error) * (sums[rows] - sums[before])
            with_unit = best[before, : limit + 1 - unit_bytes] - gain[:, None]
            place = best[rows, unit_bytes:]
            torch.lt(with_unit, place, out=taken[rows, unit_bytes:])
            torch.minimum(with_unit, place, out=place)
        choices.append((width, unit, unit_bytes, taken))
    least, used = best.min(0)
    reachable = least.isfinite().nonzero().flatten().tolist()
    num_bytes = min(reachable, key=lambda t: (abs(8 * t - total_bits), t))
    position = int(used[num_bytes])
    counts = []
    for width, unit, unit_bytes, taken in reversed(choices):
        count = 0
        while bool(taken[position, num_bytes]):
            position, num_bytes, count = position - unit, num_bytes - unit_bytes, count + unit
        counts.append((width, count))
    return counts[::-1]


def _theta_for(values: Tensor, options: Sequence[int], errors: Sequence[float], budget: int) -> float:
    def within_budget(theta: float) -> bool:
        return int(_widths_at(values, options, errors, theta).sum(dtype=torch.int64)) <= budget

    if within_budget(0.0):
        return 0.0
    # At this price even one bit that removed all of the largest variance would cost more than it gains.
    high = 2 * float(values.max())
    low = _CHEAPEST * high
    if within_budget(low):
        return low
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:
            break
        low, high = (low, middle) if within_budget(middle) else (middle, high)
    return high


def _widths_at(values: Tensor, options: Sequence[int], errors: Sequence[float], theta: float) -> Tensor:
    cost = values[:, None] * torch.tensor(errors, dtype=torch.float64, device=values.device)
    cost += theta * torch.tensor(options, dtype=torch.float64, device=values.device)
    return torch.tensor(options, dtype=torch.uint8, device=values.device)[cost.argmin(1)]


def _spend(variances: list[float], chosen: list[int], errors: Mapping[int, float], budget: int) -> list[int]:
    """Spend what is left of the budget on the promotions that gain most per bit."""
    left = budget - sum(chosen)

    def best_move(j: int) -> tuple[float, int, int] | None:
        now = chosen[j]
        moves = [
            (-variances[j] * (errors[now] - errors[width]) / (width - now), j, width)
            for width in errors
            if now < width <= now + left
        ]
        move = min(moves, default=None)
        return move if move is not None and move[0] < 0 else None

    heap = [move for j in range(len(chosen)) if (move := best_move(j)) is not None]
    heapq.heapify(heap)
    while heap and left > 0:
        _, j, width = heapq.heappop(heap)
        if width - chosen[j] <= left:
            left -= width - chosen[j]
            chosen[j] = width
        if (move := best_move(j)) is not None:
            heapq.heappush(heap, move)
    return chosen


def _budget(mean_bits: float, size: int) -> int:
    if not (math.isfinite(mean_bits) and mean_bits >= 0):
        raise ConfigError(f"water-filling: expected mean bits >= 0, got {mean_bits}")
    # A mean such as 2.2 is no exact number: 2.2 * 15 must still buy 33 bits.
    return math.floor(mean_bits * size * (1 + 1e-12))


def _check_width(width: int) -> None:
    if width not in range(MAX_WIDTH + 1):
        raise ConfigError(f"water-filling: expected widths from 0 to {MAX_WIDTH}, got {width!r}")


def check_options(
    widths: Sequence[int], distortions: Mapping[int, float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the widths and their distortions."""
    options = tuple(widths)
    for width in options:
        _check_width(width)
    if not options or options[0] != 0 or list(options) != sorted(set(options)):
        raise ConfigError(f"water-filling: expected ascending widths that start with 0, got {list(options)}")
    missing = [width for width in options if width not in distortions]
    if missing:
        raise ConfigError(f"water-filling: expected a distortion for every width, got none for {missing}")
    errors = tuple(float(distortions[width]) for width in options)
    falling = all(above > below >= 0 for above, below in itertools.pairwise(errors))
    if errors[0] != 1 or not falling:
        raise ConfigError(
            f"water-filling: expected distortions that fall from 1 at width 0, got {list(errors)} for "
            f"widths {list(options)}"
        )
    return options, errors


def check_variances(variances: Tensor) -> None:
    """Raise unless variances are float64 ``[n]``, finite and not negative."""
    if variances.dim() != 1 or variances.dtype != torch.float64:
        raise ShapeError(
            f"water-filling: expected variances float64 [n], got {variances.dtype} {list(variances.shape)}"
        )
    if not bool((variances.isfinite() & (variances >= 0)).all()):
        raise InputError("water-filling: expected finite variances >= 0, got negative ones, NaN or infinity")
