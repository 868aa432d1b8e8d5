"""Tasks that methods are measured by, under one face for commands and grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from aquakv.errors import ConfigError
from aquakv.evaluation.tasks.drift import LongDrift
from aquakv.evaluation.tasks.harness import GSM8K, LmEval, LongBench
from aquakv.evaluation.tasks.needle import Needle
from aquakv.evaluation.tasks.perplexity import Perplexity
from aquakv.evaluation.tasks.ruler import Ruler
from aquakv.evaluation.tasks.task import Setting, Task

__all__ = [
    "GSM8K",
    "TASKS",
    "LmEval",
    "LongBench",
    "LongDrift",
    "Needle",
    "Perplexity",
    "Ruler",
    "Setting",
    "Task",
    "task_of",
]

_KINDS: tuple[type[Task], ...] = (Perplexity, Needle, Ruler, LongDrift, LongBench, GSM8K, LmEval)

#: All tasks, by the name that configurations give.
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in _KINDS}


def task_of(config: Mapping[str, Any]) -> Task:
    """Return the task that a configuration describes: its name under ``task``, settings beside it.

    Raises
    ------
    ConfigError
        There is no such task, or no such setting, or a setting's value is refused.
    """
    settings = dict(config)
    name = settings.pop("task", None)
    kind = TASKS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"expected a task of {', '.join(TASKS)}, got {name!r}")
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in settings if key not in known]:
        raise ConfigError(f"task {name}: unknown setting {unknown[0]!r}; expected some of {', '.join(known)}")
    return kind(**settings)
