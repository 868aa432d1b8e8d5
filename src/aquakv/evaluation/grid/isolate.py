"""Do work for several methods together, and find the one to blame if that fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_LONGEST = 400


@dataclass(frozen=True)
class Failure:
    """What went wrong, without the frames that would hold its tensors: an exception's type and one line."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe an exception."""
        text = " ".join(str(error).split()) or type(error).__name__
        return cls(type(error).__name__, text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What came of some names' work: results by name, or a failure of the one name."""

    names: list[str]
    results: dict[str, T]
    failure: Failure | None = None


def together(names: Sequence[str], work: Callable[[list[str]], dict[str, T]]) -> Iterator[Attempt[T]]:
    """Do work for all names at once; if that raises, for each by itself, so that only the culprit fails.

    Interrupts are passed on. Memory of what failed is freed before anything else is tried.
    """
    names = list(names)
    attempt = _attempt(names, work)
    if attempt.failure is None or len(names) == 1:
        yield attempt
        return
    for name in names:
        yield _attempt([name], work)


def _attempt(names: list[str], work: Callable[[list[str]], dict[str, T]]) -> Attempt[T]:
    try:
        return Attempt(names, work(names))
    except Exception as error:
        failure = Failure.of(error)
    # Out here nothing refers to the exception any more, whose frames hold tensors.
    release()
    return Attempt(names, {}, failure)


def release() -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
