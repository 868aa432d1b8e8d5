"""A grid's cells, and the keys by which their rows are found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from aquakv.errors import ConfigError
from aquakv.evaluation.grid.config import GridCalibration, GridConfig, GridModel, GridTask
from aquakv.evaluation.methods import is_codec_file, needs_text
from aquakv.evaluation.results import file_sha256


@dataclass(frozen=True)
class Cell:
    """One model, one method, one task.

    Attributes
    ----------
    model, method, task
        Which.
    calibration
        What the method is fitted to; None for methods that are not.
    file_sha256
        Of the method's codec file, if it has one and that is there.
    """

    model: GridModel
    method: str
    task: GridTask
    calibration: GridCalibration | None
    file_sha256: str | None

    @cached_property
    def key(self) -> str:
        """A hash of all that decides what is measured, versions and the machine left out.

        Batch sizes are left out too: they change rounding only.
        """
        text = json.dumps(self.identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def identity(self) -> dict[str, Any]:
        """What `key` is the hash of."""
        return {
            "model": self.model.name,
            "dtype": self.model.dtype,
            "method": self.method,
            "file_sha256": self.file_sha256,
            "task": self.task.task.name,
            "settings": self.task.settings,
            "calibration": self.calibration_fields,
        }

    @property
    def calibration_fields(self) -> dict[str, Any] | None:
        """The calibration text's settings as JSON values; None if the method needs none."""
        if self.calibration is None:
            return None
        return dataclasses.asdict(self.calibration) | {"data": list(self.calibration.data)}

    @property
    def label(self) -> str:
        """What people and ``--only`` call it."""
        return f"{self.model.name} / {self.method} / {self.task.label}"


def cells_of(config: GridConfig, only: str | None = None, dtype: str | None = None) -> list[Cell]:
    """Return a grid's cells in the order of its file: by model, then task, then method.

    Parameters
    ----------
    config
        The grid.
    only
        Those alone whose label has this in it, with ``*``, ``?`` and ``[…]`` as in file names.
    dtype
        To load all models in; what the grid says if None.

    Raises
    ------
    ConfigError
        No cell has that label.
    """
    models = [replace(model, dtype=dtype or model.dtype) for model in config.models]
    hashes = {method: _sha256(method) for method in config.methods}
    cells = [
        Cell(model, method, task, config.calibration if needs_text([method]) else None, hashes[method])
        for model in models
        for task in config.tasks
        for method in config.methods
    ]
    chosen = cells if only is None else [cell for cell in cells if fnmatchcase(cell.label, f"*{only}*")]
    if not chosen:
        raise ConfigError(f"no cell is called {only!r}; the first of {len(cells)} is {cells[0].label!r}")
    return chosen


def _sha256(method: str) -> str | None:
    return file_sha256(Path(method)) if is_codec_file(method) and Path(method).is_file() else None
