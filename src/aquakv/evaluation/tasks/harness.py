"""LongBench, GSM8K, and whatever else lm-eval has, as tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from aquakv.errors import ConfigError
from aquakv.evaluation.harness import (
    GSM8K_VARIANTS,
    LONGBENCH_TASKS,
    HarnessSetting,
    NamedTasks,
    any_tasks,
    gsm8k_task,
    longbench_tasks,
    run_tasks,
)
from aquakv.evaluation.harness.installed import quiet_harness
from aquakv.evaluation.harness.setting import Truncation
from aquakv.evaluation.harness.sources import require_names
from aquakv.evaluation.methods import Method
from aquakv.evaluation.quality import PROTOCOLS, Protocol
from aquakv.evaluation.tasks.task import Setting, Task
from aquakv.models.loading import LoadedModel

#: Stands for all of LongBench's tasks.
ALL = "all"


@dataclass(frozen=True)
class HarnessTask(Task):
    """Tasks of lm-eval, with the settings that they share.

    Attributes
    ----------
    limit
        Documents of each task; all if None.
    max_length
        Tokens of a prompt and its answer at most; as many as the model takes if None.
    max_new_tokens
        Tokens of an answer; as many as the task says if None.
    prefill_chunk
        Tokens of a prompt that are fed at once; all of them if None, see `HarnessSetting`.
    protocol
        How likelihoods are computed, where a task asks for them.
    chat
        Wrap prompts in the tokenizer's chat template.
    """

    #: Which part of a prompt that is too long goes.
    truncation: ClassVar[Truncation] = "left"

    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    prefill_chunk: int | None = None
    protocol: Protocol = "streaming"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"task {self.name}: expected a protocol of {', '.join(PROTOCOLS)}, got {self.protocol!r}"
            )
        for setting in ("limit", "max_length", "max_new_tokens", "prefill_chunk"):
            value = getattr(self, setting)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"task {self.name}: {setting}: expected a whole number from 1, got {value!r}"
                )

    @abstractmethod
    def load(self, setting: Setting) -> NamedTasks:
        """Return lm-eval's tasks.

        Raises
        ------
        ConfigError
            lm-eval is not installed, or does not have them.
        DataError
            Their documents cannot be had.
        """

    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods; see `Task.evaluate`."""
        with quiet_harness():
            tasks = self.load(setting)
        return self.run(tasks, loaded, methods, setting)

    def run(
        self, tasks: NamedTasks, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods by what `load` gave; see `Task.evaluate`."""
        how = HarnessSetting(
            limit=self.limit,
            max_length=self.max_length,
            truncation=self.truncation,
            prefill_chunk=self.prefill_chunk,
            protocol=self.protocol,
            chat=self.chat,
            batch_size=setting.batch_size,
        )
        tasks = tasks.with_answers_of(self.max_new_tokens)
        return run_tasks(loaded, methods, tasks, how, setting.progress)


@dataclass(frozen=True)
class LongBench(HarnessTask):
    """LongBench (arXiv:2308.14508) in English: prompts and metrics as lm-eval has them.

    Attributes
    ----------
    tasks
        Their names, or ``all``.
    file
        The documents of the only task; else they are in the data directory or come from the Hub.
    """

    name = "longbench"
    truncation = "middle"

    tasks: Sequence[str] = ("multi_news",)
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_names("LongBench task", self.names, LONGBENCH_TASKS)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks by name."""
        named = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        return LONGBENCH_TASKS if named == (ALL,) else named

    def load(self, setting: Setting) -> NamedTasks:
        """Return lm-eval's tasks; see `HarnessTask.load`."""
        file = None if self.file is None else Path(self.file)
        return longbench_tasks(self.names, setting.data_dir, file)


@dataclass(frozen=True)
class GSM8K(HarnessTask):
    """School mathematics (arXiv:2110.14168): prompts and metrics as lm-eval has them.

    Attributes
    ----------
    variant
        How questions are asked: ``gsm8k_cot`` with eight fixed worked examples, ``gsm8k_cot_llama`` the same
        in other words, ``gsm8k_cot_zeroshot`` without examples, ``gsm8k`` with five of the training set.
    """

    name = "gsm8k"

    variant: str = "gsm8k_cot"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_names("variant of GSM8K", [self.variant], GSM8K_VARIANTS)

    def load(self, setting: Setting) -> NamedTasks:
        """Return lm-eval's task; see `HarnessTask.load`."""
        return gsm8k_task(self.variant, setting.data_dir)


@dataclass(frozen=True)
class LmEval(HarnessTask):
    """Any tasks of lm-eval.

    Attributes
    ----------
    tasks
        Their names, or those of groups, as lm-eval has them.
    num_fewshot
        Examples in each prompt; the task's own number if None.
    include_path
        A directory with more tasks in lm-eval's format.
    """

    name = "lm-eval"

    tasks: Sequence[str] = ()
    num_fewshot: int | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ConfigError("expected the name of at least one task of lm-eval, got none")

    def load(self, setting: Setting) -> NamedTasks:
        """Return lm-eval's tasks; see `HarnessTask.load`."""
        names = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        return any_tasks(
            names, self.num_fewshot, None if self.include_path is None else Path(self.include_path)
        )
