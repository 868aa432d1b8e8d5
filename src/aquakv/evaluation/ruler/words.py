"""Words, numbers and identifiers that nothing but the prompt tells."""

from __future__ import annotations

import functools
import re
import string
import uuid
from random import Random

from aquakv.data import load_texts

_WORD = re.compile(r"\b[a-z]{4,9}\b")


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Return the lower-case words of Python's documentation, in alphabetical order.

    Raises
    ------
    DataError
        This Python comes without ``pydoc_data``.
    """
    texts = [text for split in ("train", "test") for text in load_texts(f"pydoc:{split}")]
    return tuple(sorted({word for text in texts for word in _WORD.findall(text)}))


def pairs(count: int, rng: Random) -> list[str]:
    """Return different pairs of words, such as ``silent-module``."""
    words = vocabulary()
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{rng.choice(words)}-{rng.choice(words)}"] = None
    return list(found)


def numbers(count: int, rng: Random, digits: int = 7) -> list[str]:
    """Return different numbers of so many digits."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def uuids(count: int, rng: Random) -> list[str]:
    """Return different random identifiers."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def letters(count: int, rng: Random, length: int, alphabet: str = string.ascii_lowercase) -> list[str]:
    """Return different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(alphabet, k=length))] = None
    return list(found)
