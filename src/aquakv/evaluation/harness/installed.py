"""lm-eval where it is installed, or one line that says how to get it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from aquakv.errors import ConfigError
from aquakv.models.loading import quiet


def lm_eval_module(name: str) -> Any:
    """Return a module of lm-eval.

    Raises
    ------
    ConfigError
        lm-eval, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this needs lm-eval, which is not installed here, or not all of it ({error}); "
            "run: pip install 'aquakv[lm-eval]'"
        ) from error


def lm_eval_version() -> str:
    """Return lm-eval's version."""
    return version("lm_eval")


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence lm-eval's and transformers' bars and warnings, and put everything back afterwards."""
    task_module = lm_eval_module("lm_eval.api.task")
    logger, bar = logging.getLogger("lm_eval"), task_module.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task_module.tqdm = partial(bar, disable=True)
    try:
        with quiet():
            yield
    finally:
        task_module.tqdm = bar
        logger.setLevel(level)
