"""A calibration's progress as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aquakv.calibration import CalibrationProgress
from aquakv.errors import OutputError


@contextmanager
def progress_log(path: Path | None) -> Iterator[Callable[[CalibrationProgress], None]]:
    """Yield the function to report to: it appends a line whenever a layer's phase is over.

    A line has ``time`` (seconds since 1970), ``layer`` and ``num_layers``, ``phase``, ``batches`` and
    ``tokens_per_second`` of that phase at that layer, ``done`` and ``total`` batches of all, ``seconds``
    since the beginning and ``seconds_left``.

    Raises
    ------
    OutputError
        The file cannot be opened.
    """
    if path is None:
        yield lambda state: None
        return
    try:
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise OutputError(f"cannot write log {path}: {error.strerror}; choose another place") from error
    states: list[CalibrationProgress] = []

    def close() -> None:
        if states:
            file.write(json.dumps(_line(states)) + "\n")
            states.clear()

    def report(state: CalibrationProgress) -> None:
        if states and (states[-1].layer, states[-1].phase) != (state.layer, state.phase):
            close()
        states.append(state)

    with file:
        yield report
        close()


def _line(states: list[CalibrationProgress]) -> dict[str, Any]:
    last = states[-1]
    inverse = [1 / state.tokens_per_second for state in states]
    return {
        "time": round(time.time(), 3),
        "layer": last.layer,
        "num_layers": last.num_layers,
        "phase": last.phase,
        "batches": len(states),
        "tokens_per_second": round(len(inverse) / sum(inverse), 1),
        "done": last.done,
        "total": last.total,
        "seconds": round(last.seconds, 3),
        "seconds_left": None if last.seconds_left is None else round(last.seconds_left, 1),
    }
