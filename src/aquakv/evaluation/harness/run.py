"""Running lm-eval's tasks by several methods, and the fields of results."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from aquakv.baselines import Baseline
from aquakv.errors import ConfigError, InputError
from aquakv.evaluation.harness.installed import lm_eval_module, lm_eval_version, quiet_harness
from aquakv.evaluation.harness.setting import HarnessSetting, Progress, Usage
from aquakv.evaluation.harness.sources import NamedTasks
from aquakv.evaluation.methods import Method
from aquakv.evaluation.quality import EvaluationProgress
from aquakv.models.adapter import adapt
from aquakv.models.loading import LoadedModel

if TYPE_CHECKING:
    from aquakv.evaluation.harness.model import CachedLM

#: A metric of the harness that repeats another one.
_ALIAS = "score"


@dataclass(frozen=True)
class TaskScore:
    """What a method reached at one task.

    Attributes
    ----------
    metric
        The task's first metric, with its filter behind a comma where there is one, as lm-eval names them.
    score
        Its value, on lm-eval's scale.
    values
        By document, where the score is their mean; else nothing.
    answers
        What was generated, by document; nothing where likelihoods were asked for.
    metrics
        All of the task's.
    samples
        Documents.
    """

    metric: str
    score: float
    values: tuple[float, ...]
    answers: tuple[str, ...]
    metrics: dict[str, float]
    samples: int


@dataclass(frozen=True)
class Outcome:
    """What a method reached, and what its caches held."""

    scores: dict[str, TaskScore]
    groups: dict[str, dict[str, float]]
    usage: Usage


def run_tasks(
    loaded: LoadedModel,
    methods: Mapping[str, Method],
    tasks: NamedTasks,
    setting: HarnessSetting,
    progress: Callable[[EvaluationProgress], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure methods by tasks, with the same prompts in the same batches, and the exact cache once.

    Parameters
    ----------
    loaded
        The model and its tokenizer.
    methods
        By name; None is the exact cache.
    tasks
        See `longbench_tasks` and its like.
    setting
        How they are run.
    progress
        Called as requests get done.

    Returns
    -------
    dict
        The fields of a result, by the methods' names.

    Raises
    ------
    ConfigError
        The setting is impossible for the model or the methods.
    CodecMismatchError
        A codec belongs to another model.
    """
    require_possible(loaded, methods, setting)
    # The harness gives a tokenizer without a padding token one.
    tokenizer = copy.deepcopy(loaded.tokenizer)
    build = lm_eval_module("aquakv.evaluation.harness.model").CachedLM
    told = Progress(progress)
    with quiet_harness():
        models: dict[str, CachedLM] = {
            name: build(loaded.model, tokenizer, method, setting, told)
            for name, method in methods.items()
            if method is not None
        }
        exact = _evaluate(build(loaded.model, tokenizer, None, setting, told), tasks, setting)
        outcomes = {name: _evaluate(model, tasks, setting) for name, model in models.items()}
    return {name: _fields(outcomes.get(name, exact), exact, setting) for name in methods}


def require_possible(loaded: LoadedModel, methods: Mapping[str, Method], setting: HarnessSetting) -> None:
    """Raise `ConfigError` for a setting that cannot be."""
    for name in ("limit", "max_length", "prefill_chunk", "batch_size"):
        value = getattr(setting, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}: expected a whole number from 1, got {value!r}")
    most = adapt(loaded.model).max_length
    if most is not None and setting.max_length is not None and setting.max_length > most:
        raise ConfigError(
            f"{setting.max_length} tokens are more than {loaded.name}'s maximum of {most}; give {most} or "
            "less"
        )
    if setting.chat and getattr(loaded.tokenizer, "chat_template", None) is None:
        raise ConfigError(f"{loaded.name} has no chat template; leave out --chat")
    for method in methods.values():
        if setting.protocol == "single-pass" and isinstance(method, Baseline):
            method.require_single_pass()


def _evaluate(model: CachedLM, tasks: NamedTasks, setting: HarnessSetting) -> Outcome:
    """Run all tasks by one method."""
    for task in tasks.tasks.values():
        task.set_fewshot_seed(setting.seed)
    torch.manual_seed(setting.seed)
    try:
        found = lm_eval_module("lm_eval.evaluator").evaluate(
            lm=model,
            task_dict={"tasks": tasks.tasks, "groups": {}, "group_map": {}, **tasks.groups},
            limit=setting.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=setting.chat,
            fewshot_as_multiturn=setting.chat,
        )
    except InputError:
        raise
    except ValueError as error:
        if not str(error).startswith("Attempted to run task"):
            raise
        raise ConfigError(f"the harness refuses: {' '.join(str(error).split())}") from error
    scores = {
        name: _task_score(found["results"][name], found["samples"][name], task)
        for name, task in tasks.tasks.items()
    }
    groups = {name: _numbers(metrics) for name, metrics in found.get("groups", {}).items()}
    return Outcome(scores, groups, model.usage)


def _task_score(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], task: Any) -> TaskScore:
    metrics = _numbers(results)
    key = next((key for key in metrics if key.partition(",")[0] != _ALIAS), next(iter(metrics)))
    metric, _, filtered = key.partition(",")
    rows = [sample for sample in samples if sample["filter"] == (filtered or "none")]
    values = [row.get(metric) for row in rows]
    means = all(isinstance(value, (int, float)) for value in values) and rows
    means = means and math.isclose(fmean(map(float, values)), metrics[key], abs_tol=1e-9)  # type: ignore[arg-type]
    generated = task.OUTPUT_TYPE == "generate_until"
    return TaskScore(
        metric=key.removesuffix(",none"),
        score=metrics[key],
        values=tuple(map(float, values)) if means else (),  # type: ignore[arg-type]
        answers=tuple(str(row["resps"]) for row in rows) if generated else (),
        metrics={name.removesuffix(",none"): value for name, value in metrics.items()},
        samples=len(rows),
    )


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among what lm-eval reports, by ``metric,filter``."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _fields(outcome: Outcome, exact: Outcome, setting: HarnessSetting) -> dict[str, Any]:
    tasks = {name: _task_fields(score, exact.scores[name]) for name, score in outcome.scores.items()}
    usage = outcome.usage
    metrics = list(dict.fromkeys(score.metric for score in outcome.scores.values()))
    found = {
        "score": fmean(task["score"] for task in tasks.values()),
        "baseline_score": fmean(task["baseline_score"] for task in tasks.values()),
        "metric": ", ".join(metrics),
        "samples": sum(task["samples"] for task in tasks.values()),
        "tokens": usage.prompt_tokens,
        "seq_len": setting.max_length,
        "truncated_prompts": usage.truncated_prompts,
        "truncation": setting.truncation,
        "protocol": setting.protocol,
        "prefill_chunk": setting.prefill_chunk,
        "chat": setting.chat,
        "batch_size": setting.batch_size,
        "bits_per_value": usage.bits_per_value,
        "bits_per_value_total": usage.bits_per_value_total,
        "coded_fraction": usage.coded_fraction,
        "harness": f"lm-eval {lm_eval_version()}",
        "tasks": tasks,
    }
    if outcome.groups:
        found["groups"] = {
            name: {"metrics": metrics, "baseline_metrics": exact.groups[name]}
            for name, metrics in outcome.groups.items()
        }
    return found


def _task_fields(score: TaskScore, exact: TaskScore) -> dict[str, Any]:
    differences = [a - b for a, b in zip(score.values, exact.values, strict=False)]
    same = [a == b for a, b in zip(score.answers, exact.answers, strict=False)]
    return {
        "metric": score.metric,
        "score": score.score,
        "baseline_score": exact.score,
        "score_stderr": _stderr(score.values),
        "score_difference": score.score - exact.score,
        "score_difference_stderr": _stderr(differences),
        "same_answers": fmean(same) if same else None,
        "samples": score.samples,
        "metrics": score.metrics,
        "baseline_metrics": exact.metrics,
    }


def _stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None of fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
