"""Numbers as people read them."""

from __future__ import annotations

import math

NONE = "–"
MINUS = "\u2212"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, thousands separated."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return _signed(f"{value:,.0f}")
    size = math.floor(math.log10(abs(value)))
    if size >= digits:
        return _signed(f"{value:,.0f}")
    if size < -4:
        return _signed(f"{value:.{digits - 1}e}")
    return _signed(f"{value:,.{max(0, digits - 1 - size)}f}")


def fixed(value: float | None, places: int) -> str:
    """Return a number with so many places."""
    return NONE if value is None else _signed(f"{value:,.{places}f}")


def percent(part: float | None, places: int = 1) -> str:
    """Return a part of one as percents."""
    return NONE if part is None else f"{fixed(100 * part, places)} %"


def increase(part: float | None, error: float | None = None) -> str:
    """Return a relative increase in percent, with its standard error where there is one."""
    if part is None:
        return NONE
    places = 2 if abs(part) < 1 else 0
    text = _signed(f"{100 * part:+,.{places}f}")
    return f"{text} %" if error is None else f"{text} ± {100 * error:,.{places}f} %"


def size(count: float | None) -> str:
    """Return bytes in a unit that suits them."""
    if count is None:
        return NONE
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count) >= 1 << power:
            return f"{number(count / (1 << power))} {unit}"
    return f"{number(count)} B"


def tokens(count: float) -> str:
    """Return a number of tokens, in thousands of 1024 where it is a multiple."""
    if count >= 1024 and count % 1024 == 0:
        return f"{count / 1024:.0f}k"
    return number(count, 4)


def tick(value: float) -> str:
    """Return a number as an axis has it."""
    text = f"{value:,.10f}".rstrip("0").rstrip(".")
    return _signed(text)


def percent_tick(part: float) -> str:
    """Return a part of one as an axis in percent has it."""
    return f"{tick(round(100 * part, 10))} %"


def seconds(value: float | None) -> str:
    """Return a duration."""
    if value is None:
        return NONE
    if value >= 600:
        return f"{number(value / 60)} min"
    return f"{number(value)} s"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)
