"""What a task is: settings, and a way to measure methods by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aquakv.evaluation.methods import Method
from aquakv.evaluation.quality import EvaluationProgress
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
