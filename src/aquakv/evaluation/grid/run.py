"""Measure what a grid's file of rows lacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aquakv.data import token_sequences
from aquakv.evaluation.grid.cells import Cell
from aquakv.evaluation.grid.config import GridConfig, GridModel, GridTask
from aquakv.evaluation.grid.isolate import Failure, release, together
from aquakv.evaluation.grid.ledger import Ledger, Row
from aquakv.evaluation.grid.rows import failed_row, measured_row
from aquakv.evaluation.methods import Method, allows_single_pass, fresh_cache, needs_text, prepare
from aquakv.evaluation.quality import EvaluationProgress
from aquakv.evaluation.results import environment
from aquakv.evaluation.tasks import Setting
from aquakv.models.loading import LoadedModel

#: Loads a grid's model.
Load = Callable[[GridModel], LoadedModel]


@dataclass
class GridProgress:
    """Cells done, with parts of those in work, and all that are to be done.

    Attributes
    ----------
    done, total
        Cells.
    doing
        What is being done.
    row, cell
        A row that was just written, and its cell.
    """

    done: float
    total: int
    doing: str
    row: Row | None = None
    cell: Cell | None = None


def pending(cells: Sequence[Cell], rows: dict[str, Row], retry_failed: bool = False) -> list[Cell]:
    """Return the cells that are to be measured: those without a row, and those that failed if asked for."""
    return [
        cell
        for cell in cells
        if cell.key not in rows or (retry_failed and rows[cell.key]["status"] == "failed")
    ]


def run_grid(
    config: GridConfig,
    cells: Sequence[Cell],
    ledger: Ledger,
    load: Load,
    *,
    data_dir: Path | None = None,
    progress: Callable[[GridProgress], None] | None = None,
) -> None:
    """Measure cells and append their rows.

    A model is loaded once, and its methods are prepared side by side: presets in one pass over the model, a
    competitor's rates by one fit. Whatever raises an exception becomes a row that says so; what was done
    together is then tried method by method.

    Parameters
    ----------
    config
        The grid.
    cells
        Which of its cells, see `pending`.
    ledger
        Where rows go.
    load
        Loads a model.
    data_dir
        Where named sets lie.
    progress
        Called as work gets done, and with every row.
    """
    run = _Run(config, ledger, load, data_dir, progress or (lambda _state: None), len(cells))
    for model, some in itertools.groupby(cells, lambda cell: cell.model):
        run.measure_model(model, list(some))
        release()


@dataclass
class _Run:
    config: GridConfig
    ledger: Ledger
    load: Load
    data_dir: Path | None
    progress: Callable[[GridProgress], None]
    total: int
    done: int = 0
    environment: dict[str, Any] = field(default_factory=environment)

    def measure_model(self, model: GridModel, cells: list[Cell]) -> None:
        self._say(f"loading {model.name}")
        loaded = next(together([model.name], lambda _: {model.name: self.load(model)}))
        if loaded.failure is not None:
            self._fail(cells, loaded.failure, 0.0)
            return
        methods = self._prepared(loaded.results[model.name], cells)
        for task, some in itertools.groupby(
            (cell for cell in cells if cell.method in methods), lambda cell: cell.task
        ):
            self._measure_task(loaded.results[model.name], task, list(some), methods)

    def _prepared(self, loaded: LoadedModel, cells: list[Cell]) -> dict[str, Method]:
        """Return the methods that could be prepared; the cells of the others get their rows."""
        found: dict[str, Method] = {}
        for family in families(dict.fromkeys(cell.method for cell in cells)):
            self._say(f"preparing {', '.join(family)} for {loaded.name}")
            started = time.perf_counter()
            for attempt in together(family, lambda names: self._prepare(loaded, names)):
                found |= attempt.results
                if attempt.failure is not None:
                    failed = [cell for cell in cells if cell.method in attempt.names]
                    self._fail(failed, attempt.failure, time.perf_counter() - started)
        return found

    def _prepare(self, loaded: LoadedModel, names: list[str]) -> dict[str, Method]:
        tokens = None
        if needs_text(names):
            text = self.config.calibration
            sizes = (text.samples, text.seq_len, self.data_dir)
            tokens = token_sequences(text.data, loaded.tokenizer, *sizes)
        found = prepare(names, loaded.model, tokens)
        for method in found.values():
            fresh_cache(loaded.model, method)  # what cannot be used raises before anything is evaluated
        return found

    def _measure_task(
        self, loaded: LoadedModel, task: GridTask, cells: list[Cell], methods: dict[str, Method]
    ) -> None:
        # Those that are evaluated by one protocol are next to each other, and share groups.
        cells.sort(key=lambda cell: not allows_single_pass(methods[cell.method]))
        for start in range(0, len(cells), self.config.group):
            group = {cell.method: cell for cell in cells[start : start + self.config.group]}
            started, before = time.perf_counter(), self.done
            for attempt in together(
                list(group),
                lambda names: self._evaluate(loaded, task, {name: methods[name] for name in names}),
            ):
                elapsed = (time.perf_counter() - started) / len(attempt.names)
                started = time.perf_counter()
                if attempt.failure is not None:
                    self._fail([group[name] for name in attempt.names], attempt.failure, elapsed)
                for name, fields in attempt.results.items():
                    self._write(
                        group[name], measured_row(group[name], loaded, methods[name], fields, elapsed)
                    )
            assert self.done == before + len(group)  # a row for each

    def _evaluate(
        self, loaded: LoadedModel, task: GridTask, methods: dict[str, Method]
    ) -> dict[str, dict[str, Any]]:
        doing = f"{task.label} of {', '.join(methods)} on {loaded.name}"
        self._say(doing)

        def report(state: EvaluationProgress) -> None:
            share = len(methods) * state.done / state.total if state.total else 0
            self.progress(GridProgress(self.done + share, self.total, doing))

        found = task.task.evaluate(loaded, methods, Setting(self.data_dir, task.batch_size, report))
        return {name: found[name] for name in methods}

    def _say(self, doing: str) -> None:
        self.progress(GridProgress(self.done, self.total, doing))

    def _fail(self, cells: list[Cell], failure: Failure, elapsed: float) -> None:
        for cell in cells:
            self._write(cell, failed_row(cell, failure, elapsed / len(cells)))

    def _write(self, cell: Cell, row: Row) -> None:
        self.ledger.append(row | self.environment)
        self.done += 1
        self.progress(GridProgress(self.done, self.total, cell.label, self.ledger.rows[-1], cell))


def families(specs: dict[str, None]) -> Iterator[list[str]]:
    """Yield methods that share a preparation: presets a calibration pass, rates of a competitor its fit."""

    def family(spec: str) -> str:
        return spec if not needs_text([spec]) else "presets" if " " in spec else spec.partition(":")[0]

    found: dict[str, list[str]] = {}
    for spec in specs:
        found.setdefault(family(spec), []).append(spec)
    yield from found.values()
