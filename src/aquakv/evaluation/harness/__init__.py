"""lm-eval's tasks with our caches plugged in; lm-eval itself (``aquakv[lm-eval]``) is imported when used."""

from aquakv.evaluation.harness.run import run_tasks
from aquakv.evaluation.harness.setting import HarnessSetting
from aquakv.evaluation.harness.sources import (
    GSM8K_VARIANTS,
    LONGBENCH_TASKS,
    NamedTasks,
    any_tasks,
    gsm8k_task,
    longbench_tasks,
)

__all__ = [
    "GSM8K_VARIANTS",
    "LONGBENCH_TASKS",
    "HarnessSetting",
    "NamedTasks",
    "any_tasks",
    "gsm8k_task",
    "longbench_tasks",
    "run_tasks",
]
