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
    """Yield the function to report to: it appends a line for every layer and phase, once that is surely over.

    A line has ``time`` (of its last batch, seconds since 1970), ``layer`` and ``num_layers``, ``phase``,
    ``batches`` and ``tokens_per_second`` of that phase at that layer, ``done`` and ``total`` batches of all,
    ``seconds`` since the beginning and ``seconds_left``.

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
    under_way: dict[tuple[int, str], list[CalibrationProgress]] = {}
    last: dict[tuple[int, str], float] = {}

    def close(key: tuple[int, str]) -> None:
        file.write(json.dumps(_line(under_way.pop(key), last.pop(key))) + "\n")

    def report(state: CalibrationProgress) -> None:
        key = (state.layer, state.phase)
        for other in list(under_way):
            if _is_over(other, key):
                close(other)
        under_way.setdefault(key, []).append(state)
        last[key] = time.time()

    with file:
        yield report
        for key in list(under_way):
            close(key)


def _is_over(old: tuple[int, str], new: tuple[int, str]) -> bool:
    """Tell whether a layer's phase has come to its end, given what goes on now.

    Another phase of a neighbouring layer may go on beside it.
    """
    if old == new:
        return False
    return old[0] == new[0] or old[1] == new[1] or abs(old[0] - new[0]) > 1


def _line(states: list[CalibrationProgress], finished: float) -> dict[str, Any]:
    last = states[-1]
    inverse = [1 / state.tokens_per_second for state in states]
    return {
        "time": round(finished, 3),
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
