"""What a task is: settings, and a way to measure methods by it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aquakv.errors import ConfigError
from aquakv.evaluation.methods import Method
from aquakv.evaluation.quality import EvaluationProgress
from aquakv.models.adapter import adapt
from aquakv.models.loading import LoadedModel


@dataclass(frozen=True)
class Setting:
    """How tasks are run, whatever they measure.

    Attributes
    ----------
    data_dir
        Where named sets lie; None leaves it to the environment or the Hub.
    batch_size
        Sequences at once.
    progress
        Called as work gets done.
    """

    data_dir: Path | None = None
    batch_size: int = 1
    progress: Callable[[EvaluationProgress], None] | None = None


@dataclass(frozen=True)
class Task(ABC):
    """Something to measure methods by; a subclass's fields are its settings."""

    #: What configurations and results call it.
    name: ClassVar[str]

    @abstractmethod
    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods on a model, with the same inputs for all.

        Parameters
        ----------
        loaded
            The model and its tokenizer.
        methods
            By name; None is the exact cache.
        setting
            How it is run.

        Returns
        -------
        dict
            By the methods' names, the fields of a result: JSON values, ``bits_per_value`` measured.
        """


def require_numbers(
    task: Task, setting: str, *, least: float, most: float = math.inf, whole: bool = True
) -> None:
    """Raise `ConfigError` if a task's setting, or one of a list that it is, is no number in a range.

    None passes: it stands for a choice made later.
    """
    value = getattr(task, setting)
    if value is None:
        return
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    numbers: Sequence[Any] = value if listed else [value]
    kinds = (int,) if whole else (int, float)
    for number in numbers or [value]:
        if isinstance(number, bool) or not isinstance(number, kinds) or not least <= number <= most:
            what = "whole numbers" if whole else "numbers"
            upper = f" up to {most:g}" if most < math.inf else ""
            raise ConfigError(
                f"task {task.name}: {setting}: expected {what} from {least:g}{upper}, got {number!r}"
            )


def fitting_lengths(
    task: Task, lengths: Sequence[int] | None, default: Sequence[int], loaded: LoadedModel, new_tokens: int
) -> list[int]:
    """Return the lengths of prompts to measure, or if None the default ones that a model takes.

    Raises
    ------
    ConfigError
        A length, with so many new tokens behind it, is more than the model takes.
    """
    most = adapt(loaded.model).max_length
    room = math.inf if most is None else most - new_tokens
    found = [length for length in default if length <= room] if lengths is None else list(lengths)
    if not found or max(found) > room:
        raise ConfigError(
            f"task {task.name}: prompts of {max(found or default)} tokens, and up to {new_tokens} new ones, "
            f"are more than {loaded.name}'s maximum of {most}; give lengths of {room} or less"
        )
    return list(dict.fromkeys(found))
