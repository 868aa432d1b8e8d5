"""What commands that measure a method by a task have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquakv.cli import measured, options
from aquakv.evaluation.methods import Method
from aquakv.evaluation.results import SCHEMA_VERSION, environment, write_json
from aquakv.evaluation.tasks import Setting, Task
from aquakv.files import require_writable
from aquakv.models.loading import LoadedModel

#: What `Task.evaluate` is.
Evaluate = Callable[[LoadedModel, Mapping[str, Method], Setting], dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """A method to measure on a model, and where the result goes.

    Attributes
    ----------
    model, dtype, device
        What to load.
    codec, baseline, text
        What `measured.Subject.of` takes.
    data_dir, batch_size
        See `Setting`.
    json_out
        File of the result, if one is wanted.
    """

    model: str
    codec: Path | None
    baseline: str | None
    text: measured.CalibrationText
    data_dir: Path | None
    batch_size: int
    dtype: options.Dtype
    device: str
    json_out: Path | None

    def measure(self, task: Task, unit: str, evaluate: Evaluate | None = None, **more: Any) -> dict[str, Any]:
        """Measure by a task; return the result, which is written too.

        ``evaluate`` stands for the task's own; ``more`` is said in the result too.
        """
        subject = self.subject()
        loaded = self.load()
        subject = subject.fitted(loaded)

        def fields(setting: Setting) -> dict[str, Any]:
            found = (evaluate or task.evaluate)(loaded, {subject.name: subject.method}, setting)
            return found[subject.name]

        return self.result(task.name, {**dataclasses.asdict(task), **more}, loaded, subject, unit, fields)

    def subject(self) -> measured.Subject:
        """Read what is to be measured, after a look at whether a result can be written."""
        if self.json_out is not None:
            require_writable(self.json_out, "result")
        return measured.Subject.of(self.codec, self.baseline, self.text)

    def load(self) -> LoadedModel:
        """Load the model."""
        return options.load(self.model, self.dtype, self.device)

    def result(
        self,
        name: str,
        settings: Mapping[str, Any],
        loaded: LoadedModel,
        subject: measured.Subject,
        unit: str,
        evaluate: Callable[[Setting], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Evaluate; return the result, which is written too.

        Parameters
        ----------
        name
            Of the task.
        settings
            What the result says of how the task was set.
        loaded, subject
            What is measured on which model.
        unit
            What is counted as work gets done.
        evaluate
            Returns the figures.
        """
        started = time.perf_counter()
        with options.progress_bar("Evaluating", unit) as report:
            fields = evaluate(Setting(self.data_dir, self.batch_size, report))
        elapsed = time.perf_counter() - started
        result = {
            "schema_version": SCHEMA_VERSION,
            "command": f"eval {name}",
            "model": loaded.name,
            **subject.fields(),
            **settings,
            "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
            **fields,
            "elapsed_s": round(elapsed, 3),
            **environment(),
        }
        if self.json_out is not None:
            write_json(self.json_out, result)
        return result


def size(result: Mapping[str, Any]) -> str:
    """Say how large the cache was."""
    bits = result["bits_per_value"]
    return "exact cache" if bits is None else f"{bits:.3f} bits per value"
