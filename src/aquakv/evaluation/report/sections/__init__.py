"""The sections of a report, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from aquakv.errors import DataError
from aquakv.evaluation.report.load import Inputs, Record
from aquakv.evaluation.report.section import Section
from aquakv.evaluation.report.sections import (
    calibration,
    codecs,
    drift,
    memory,
    needle,
    others,
    quality,
    scores,
    speed,
)

__all__ = ["sections"]

Item = TypeVar("Item", bound=Any)
Made = TypeVar("Made")

#: Who takes a row: the first one that wants it.
_TAKERS = (needle, drift, quality, scores, memory, calibration, speed)

#: The order on the page.
_ORDER = (quality, needle, scores, drift, memory, speed, calibration)


def sections(inputs: Inputs) -> list[Section]:
    """Sort everything that was read into sections; no row is left out.

    Raises
    ------
    DataError
        There is nothing to show.
    """
    taken: dict[object, list[Record]] = {}
    for record in inputs.records:
        taken.setdefault(_taker(record), []).append(record)
    makers = [(module.section, taken.get(module, [])) for module in _ORDER]
    makers += [(others.failures, taken.get(others.failures, [])), (others.remaining, taken.get(None, []))]
    found = [_made(make, rows) for make, rows in makers]
    found.insert(len(_ORDER), _made(codecs.section, inputs.codecs))
    shown = [section for section in found if section is not None]
    if not shown:
        raise DataError("expected results with rows, got none; name results of aquakv eval or bench")
    return shown


def _taker(record: Record) -> object:
    """Return which section takes a row; None if none wants it."""
    if others.failed(record):
        return others.failures
    return next((taker for taker in _TAKERS if _made(taker.takes, record)), None)


def _made(make: Callable[[Item], Made], content: Item) -> Made:
    """Call what reads fields of files, which may hold anything.

    Raises
    ------
    DataError
        A field is not what results have there.
    """
    try:
        return make(content)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        items = content if isinstance(content, Sequence) else [content]
        names = dict.fromkeys(one.source.name if isinstance(one, Record) else one.name for one in items)
        raise DataError(
            f"{', '.join(names)}: a field is missing or not what results of aquakv have there "
            f"({type(error).__name__}: {error}); measure again, or leave the file out"
        ) from error
