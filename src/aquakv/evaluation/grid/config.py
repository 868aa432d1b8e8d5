"""What a grid's file says, read strictly."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquakv.config import from_dict
from aquakv.errors import ConfigError
from aquakv.evaluation.methods import needs_text, require_method
from aquakv.evaluation.tasks import Task, task_of
from aquakv.models.loading import DTYPES


@dataclass(frozen=True)
class GridModel:
    """A model of a grid: a ``MODEL`` argument, and the dtype to load it in."""

    name: str
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"model {self.name}: expected a dtype of {', '.join(DTYPES)}, got {self.dtype!r}"
            )


@dataclass(frozen=True)
class GridCalibration:
    """The text that presets are calibrated on and competitors are fitted to."""

    data: tuple[str, ...] = ()
    samples: int = 16
    seq_len: int = 2048

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seq_len", 2)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"calibration.{name}: expected a whole number >= {least}, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class GridTask:
    """A task of a grid, and how many of its sequences are computed at once."""

    task: Task
    batch_size: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What the task is set to, by name, defaults included."""
        return dataclasses.asdict(self.task)

    @property
    def label(self) -> str:
        """Name, and the settings that are not the defaults."""
        changed = (
            f"{field.name}={value}"
            for field in dataclasses.fields(self.task)
            if (value := getattr(self.task, field.name)) != field.default
        )
        return " ".join([self.task.name, *changed])


@dataclass(frozen=True)
class GridConfig:
    """A grid.

    Attributes
    ----------
    models, methods, tasks
        Its three sides; methods as `aquakv.evaluation.methods.prepare` takes them.
    calibration
        The text that methods are fitted to.
    group
        Methods that are evaluated beside one computation of the exact cache.
    """

    models: tuple[GridModel, ...]
    methods: tuple[str, ...]
    tasks: tuple[GridTask, ...]
    calibration: GridCalibration = dataclasses.field(default_factory=GridCalibration)
    group: int = 4

    def __post_init__(self) -> None:
        for name in ("models", "methods", "tasks"):
            side = getattr(self, name)
            if not side:
                raise ConfigError(f"{name}: expected at least one, got none")
            labels = [getattr(one, "label", None) or getattr(one, "name", one) for one in side]
            if twice := next((label for label in labels if labels.count(label) > 1), None):
                raise ConfigError(f"{name}: {twice} is named twice; name each once")
        if self.group < 1:
            raise ConfigError(f"group: expected a whole number >= 1, got {self.group}")
        for method in self.methods:
            require_method(method)
            if needs_text([method]) and not self.calibration.data:
                raise ConfigError(f"calibration.data: expected texts to fit {method!r} to, got none")


def read_grid(path: Path) -> GridConfig:
    """Read a grid's file.

    Raises
    ------
    ConfigError
        The file cannot be read, is no TOML, or a key or a value in it is refused; the message names it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the grid {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid {path}: expected TOML, got something else ({error})") from error
    try:
        return grid_of(content)
    except ConfigError as error:
        raise ConfigError(f"grid {path}: {error}") from error


def grid_of(content: Mapping[str, Any]) -> GridConfig:
    """Return the grid that a file's content describes; raises `ConfigError` as `read_grid` does."""
    _require_known(content, [field.name for field in dataclasses.fields(GridConfig)], "")
    methods = _list(content, "methods")
    for method in methods:
        if not isinstance(method, str):
            raise ConfigError(f"methods: expected text such as 'decode 2.2' or 'kivi:2', got {method!r}")
    calibration = content.get("calibration", {})
    return GridConfig(
        models=tuple(map(_model, _list(content, "models"))),
        methods=tuple(methods),
        tasks=tuple(_task(number, task) for number, task in enumerate(_list(content, "tasks"), 1)),
        calibration=_with_defaults(GridCalibration, calibration, "calibration"),
        group=_whole(content.get("group", 4), "group"),
    )


def _model(entry: Any) -> GridModel:
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ConfigError(f"models: expected a MODEL or a table with its name, got {entry!r}")
    return _with_defaults(GridModel, entry, "models")


def _task(number: int, entry: Any) -> GridTask:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"tasks: expected tables [[tasks]], got {entry!r}")
    settings = dict(entry)
    where = f"task {number}"
    batch_size = _whole(settings.pop("batch_size", 1), f"{where}: batch_size")
    if batch_size < 1:
        raise ConfigError(f"{where}: batch_size: expected a whole number >= 1, got {batch_size}")
    try:
        return GridTask(task_of(settings), batch_size)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}; beside them any task takes batch_size") from error


def _with_defaults(kind: type[Any], entry: Any, where: str) -> Any:
    """Build a dataclass strictly, with its defaults for what is not given."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a table, got {entry!r}")
    fields = dataclasses.fields(kind)
    _require_known(entry, [field.name for field in fields], f"{where}: ")
    given = {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in fields
        if field.default is not dataclasses.MISSING
    }
    return from_dict(kind, given | dict(entry), where)


def _require_known(entry: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in entry:
        if key in known:
            continue
        hint = ""
        if where and key in ("methods", "group", "models"):
            hint = f" ({key} belongs to no table: write it above the first [table])"
        raise ConfigError(f"{where}unknown key {key!r}; expected some of: {', '.join(known)}{hint}")


def _list(content: Mapping[str, Any], name: str) -> list[Any]:
    found = content.get(name, [])
    if not isinstance(found, list):
        raise ConfigError(f"{name}: expected a list, got {found!r}")
    return found


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{where}: expected a whole number, got {value!r}")
    return value
