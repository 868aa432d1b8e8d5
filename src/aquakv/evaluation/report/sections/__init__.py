"""The sections of a report, in the order of the page."""

from __future__ import annotations

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
    taken: dict[object, list[Record]] = {taker: [] for taker in _TAKERS}
    failed, left = [], []
    for record in inputs.records:
        taker = next((taker for taker in _TAKERS if taker.takes(record)), None)
        if others.failed(record):
            failed.append(record)
        elif taker is None:
            left.append(record)
        else:
            taken[taker].append(record)
    found = [module.section(taken[module]) for module in _ORDER]
    found += [codecs.section(inputs.codecs), others.failures(failed), others.remaining(left)]
    shown = [section for section in found if section is not None]
    if not shown:
        raise DataError("expected results with rows, got none; name results of aquakv eval or bench")
    return shown
