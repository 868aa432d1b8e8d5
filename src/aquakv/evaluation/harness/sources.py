"""Tasks of lm-eval: its prompts, metrics and few-shot examples, on documents from local files or the Hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aquakv.data import named_file, read_records
from aquakv.errors import ConfigError, DataError
from aquakv.evaluation.harness.installed import lm_eval_module

#: LongBench's tasks in English (arXiv:2308.14508), without those on code.
LONGBENCH_TASKS = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
)

#: Ways to ask GSM8K's questions, as lm-eval names them, and the files that describe them. All but the last
#: have fixed examples, or none; it takes its five from the training set.
GSM8K_VARIANTS = {
    "gsm8k_cot": "gsm8k-cot.yaml",
    "gsm8k_cot_llama": "gsm8k-cot-llama.yaml",
    "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml",
    "gsm8k": "gsm8k.yaml",
}

_HUB_INSTEAD = "give --data-dir (or AQUAKV_DATA_DIR) with a copy"


@dataclass(frozen=True)
class NamedTasks:
    """Tasks of lm-eval by the names that results give them, and groups of them."""

    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)

    def with_answers_of(self, max_new_tokens: int | None) -> NamedTasks:
        """Have tasks that generate do so up to so many tokens; None leaves it to them."""
        for task in self.tasks.values():
            if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        return self


class Documents(list[dict[str, Any]]):
    """Documents of a split, with what lm-eval asks of a data set."""

    @property
    def features(self) -> dict[str, None]:
        """Names of fields, as keys."""
        return dict.fromkeys(self[0]) if self else {}


def longbench_tasks(
    names: Sequence[str], data_dir: str | Path | None = None, file: Path | None = None
) -> NamedTasks:
    """Return tasks of LongBench, on ``longbench/TASK.jsonl`` below the data directory.

    Parameters
    ----------
    names
        Some of `LONGBENCH_TASKS`.
    data_dir
        As for `load_texts`.
    file
        The documents of the only task, in place of those of the data directory.

    Raises
    ------
    ConfigError
        There is no such task, or lm-eval is not installed.
    DataError
        Documents cannot be had, or are not what LongBench's are.
    """
    require_names("LongBench task", names, LONGBENCH_TASKS)
    if file is not None and len(names) != 1:
        raise ConfigError(f"one file goes with one task, got {len(names)} tasks; give --data-dir for several")
    found = {}
    for name in names:
        config = _config("longbench", f"{name}.yaml")
        path = file or named_file(f"longbench/{name}", f"longbench/{name}.jsonl", data_dir)
        needs_question = "{{question}}" in config["doc_to_text"]
        splits = {} if path is None else {"test": _longbench_documents(path, name, needs_question)}
        found[name] = _task(f"longbench/{name}", config, splits)
    return NamedTasks(found)


def gsm8k_task(variant: str = "gsm8k_cot", data_dir: str | Path | None = None) -> NamedTasks:
    """Return GSM8K (arXiv:2110.14168), on ``gsm8k/test.jsonl`` below the data directory.

    Parameters
    ----------
    variant
        One of `GSM8K_VARIANTS`; ``gsm8k`` also needs ``gsm8k/train.jsonl``.
    data_dir
        As for `load_texts`.

    Raises
    ------
    ConfigError, DataError
        As for `longbench_tasks`.
    """
    require_names("variant of GSM8K", [variant], GSM8K_VARIANTS)
    config = _config("gsm8k", GSM8K_VARIANTS[variant])
    names = ["test"]
    if variant == "gsm8k":
        names.append("train")
    else:
        # Nothing is taken from it, yet lm-eval would look for it.
        config.update(training_split=None, fewshot_split=None)
    paths = {name: named_file(f"gsm8k:{name}", f"gsm8k/{name}.jsonl", data_dir) for name in names}
    splits = {name: _gsm8k_documents(path) for name, path in paths.items() if path is not None}
    return NamedTasks({variant: _task("gsm8k:test", config, splits)})


def any_tasks(
    names: Sequence[str], num_fewshot: int | None = None, include_path: Path | None = None
) -> NamedTasks:
    """Return any of lm-eval's tasks and groups, which lm-eval gets from the Hub.

    Parameters
    ----------
    names
        As lm-eval has them.
    num_fewshot
        Examples in each prompt; the task's own number if None.
    include_path
        A directory with more tasks in lm-eval's format.

    Raises
    ------
    ConfigError
        There is no such task, or lm-eval is not installed.
    DataError
        A task's documents cannot be had.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"expected a directory of tasks, found none: {include_path}")
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise ConfigError(f"lm-eval has no task {name!r}; {hint}")
    try:
        loaded = manager.load(list(names))
    except Exception as error:
        raise _unavailable(", ".join(names), error, "check the connection") from error
    for task in loaded["tasks"].values():
        if num_fewshot is not None:
            task.set_config("num_fewshot", num_fewshot)
    return NamedTasks(loaded["tasks"], {key: loaded.get(key, {}) for key in ("groups", "group_map")})


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Return lm-eval's index of tasks: of its own ones too, which takes seconds, where they are needed."""
    build = lm_eval_module("lm_eval.tasks").TaskManager
    if include_path is not None:
        own = build(include_path=str(include_path), include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    return build(include_path=None if include_path is None else str(include_path))


def require_names(what: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    """Raise `ConfigError` for names that are not known, or none at all, or one twice."""
    for name in names:
        if name not in known:
            raise ConfigError(f"expected a {what} of {', '.join(known)}, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"expected every {what} once, got {', '.join(names) or 'none'}")


def _config(folder: str, file: str) -> dict[str, Any]:
    """Return one of lm-eval's own task descriptions, without looking through all ten thousand of them."""
    path = Path(lm_eval_module("lm_eval.tasks").__file__).parent / folder / file
    load = lm_eval_module("lm_eval.tasks._yaml_loader").load_yaml
    try:
        return dict(load(path))
    except ImportError as error:
        raise ConfigError(
            f"lm-eval's {folder} needs packages that are not installed ({error}); "
            "run: pip install 'aquakv[lm-eval]'"
        ) from error


def _task(spec: str, config: dict[str, Any], splits: Mapping[str, Documents]) -> Any:
    """Return a task on documents by split, or without any on what lm-eval gets from the Hub."""
    config = {key: value for key, value in config.items() if key != "tag"}
    if splits:
        config.update(custom_dataset=lambda **_: dict(splits), dataset_path=None, dataset_name=None)
    kind = lm_eval_module("lm_eval.api.task").ConfigurableTask
    if splits:
        return kind(config=config)
    try:
        return kind(config=config)
    # Connections, proxies, parsers and the Hub itself fail with exceptions that share no base class.
    except Exception as error:
        raise _unavailable(spec, error, _HUB_INSTEAD) from error


def _unavailable(spec: str, error: Exception, instead: str) -> DataError:
    first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
    return DataError(f"{spec} could not be fetched from the Hub ({first_line}); {instead}")


def _longbench_documents(path: Path, task: str, needs_question: bool) -> Documents:
    documents = Documents()
    for where, record in _records(path):
        # LongBench's own files call it input; lm-eval's prompts, and its copy on the Hub, question.
        question = record.get("question", record.get("input", None if needs_question else ""))
        fields = {"context": record.get("context"), "input": question}
        for name, value in fields.items():
            if not isinstance(value, str):
                raise DataError(f'expected text in field "{name}" of {where}, found {_kind(value)}')
        lists = {"answers": record.get("answers")}
        if task == "trec":
            lists["all_classes"] = record.get("all_classes")
        for name, values in lists.items():
            if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
                raise DataError(
                    f'expected a list of texts in field "{name}" of {where}, found {_kind(values)}'
                )
        if task == "passage_retrieval_en" and not all(
            re.match(r"Paragraph \d", v) for v in record["answers"]
        ):
            raise DataError(f"expected answers like 'Paragraph 3' in {where}, found {record['answers'][0]!r}")
        documents.append({**record, "question": question})
    return documents


def _gsm8k_documents(path: Path) -> Documents:
    documents = Documents()
    for where, record in _records(path):
        for name in ("question", "answer"):
            if not isinstance(record.get(name), str):
                raise DataError(
                    f'expected text in field "{name}" of {where}, found {_kind(record.get(name))}'
                )
        documents.append(record)
    return documents


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    records = list(read_records(path))
    if not records:
        raise DataError(f"expected documents in {path}, found none")
    return records


def _kind(value: object) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else type(value).__name__
