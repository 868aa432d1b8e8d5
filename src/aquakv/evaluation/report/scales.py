"""Where numbers lie on a figure's axes, and which of them are written there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Bits that are written on an axis, as far as they are within it.
BIT_TICKS = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Scale:
    """A map from numbers to a figure's coordinates.

    Attributes
    ----------
    low, high
        The ends of the axis; ``low < high``, and ``low > 0`` where it is logarithmic.
    start, end
        Their coordinates.
    log
        Whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"expected finite ends low < high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected a positive lower end of a logarithmic axis, got {self.low}")

    def __call__(self, value: float) -> float:
        """Return a number's coordinate; numbers beyond the ends lie at the ends.

        Raises
        ------
        ValueError
            The number is not one.
        """
        if math.isnan(value):
            raise ValueError("expected a number to draw, got NaN")
        value = min(max(value, self.low), self.high)
        if self.log:
            start = math.log(self.low)  # logarithms first: the quotient of the ends may be beyond all numbers
            part = (math.log(value) - start) / (math.log(self.high) - start)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def log_ends(values: Iterable[float], margin: float = 1.15) -> tuple[float, float]:
    """Return ends of a logarithmic axis that has room around all positive values; 1 and 10 without any."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return 1.0, 10.0
    low, high = min(positive), max(positive)
    if high / low < 2:  # one point, or nearly
        low, high = low / 1.5, high * 1.5
    return low / margin, high * margin


def linear_ends(values: Iterable[float], *, floor: float | None = None) -> tuple[float, float]:
    """Return ends of a linear axis that has room around all values; 0 and 1 without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.5
    low, high = low - room, high + room
    if floor is not None:
        low = min(floor, low) if min(finite) < floor else floor
    return (low, high) if high > low else (low, low + 1)


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers between two positive ones: 1, 2 and 5 of every decade, or decades, or some."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps, stride in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 5)):
        found = [
            step * 10.0**power
            for power in range(first, last + 1)
            for step in steps
            if power % stride == 0 and low <= step * 10.0**power <= high
        ]
        if len(found) <= most:
            return found or [low]
    return found[:: -(-len(found) // most)]


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two numbers."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * power for step in (1, 2, 5, 10, 20) if span / (step * power) <= most)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def power_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return powers of two between two positive numbers."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return [2.0**power for power in powers[:: max(1, -(-len(powers) // most))]] or [low]


def bit_ticks(low: float, high: float, ticks: Sequence[float] = BIT_TICKS) -> list[float]:
    """Return the bits that are written between two rates."""
    return [tick for tick in ticks if low <= tick <= high]
