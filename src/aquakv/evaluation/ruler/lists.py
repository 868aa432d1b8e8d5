"""Tasks about how often words stand in a list (arXiv:2404.06654 §3, aggregation)."""

from __future__ import annotations

import math
from random import Random

from torch import Tensor

from aquakv.evaluation.prompts import Prompt, Wording
from aquakv.evaluation.ruler import words
from aquakv.evaluation.ruler.materials import Materials

#: Common words, and how many times as often they stand there as the others.
_COMMON = 10
_RATIO = 10

#: How often each other word stands there, where the list is long enough for that.
_REPEATS = 3

#: Frequent words asked for.
_FREQUENT = 3

#: Stands in place of the most frequent of all.
_DOTS = "..."


def common_words(materials: Materials, length: int, rng: Random) -> Prompt:
    """Write a prompt of at most ``length`` tokens that asks for the ten common words of a list (CWE).

    As in the paper they stand there 30 times and the others 3 times; fewer times in lists of less than some
    600 words, and more often where all of a vocabulary is in the list.
    """
    vocabulary = words.vocabulary()
    chosen = rng.sample(vocabulary, len(vocabulary))
    common, others = chosen[:_COMMON], chosen[_COMMON:]
    seed = rng.getrandbits(64)

    def text(repeats: int, number: int) -> str:
        entries = common * (repeats * _RATIO) + others[:number] * repeats
        Random(seed).shuffle(entries)
        return "\n".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    def fit(repeats: int, room: int) -> tuple[int, Tensor]:
        return materials.largest(lambda number: text(repeats, number), room, _COMMON, len(others))

    def body(room: int) -> Tensor:
        # As often as leaves room for ten times as many different other words.
        choices = range(_REPEATS, 1, -1)
        enough = _COMMON * _RATIO
        repeats = next((r for r in choices if materials.writer.count(text(r, enough)) <= room), 1)
        number, ids = fit(repeats, room)
        while number == len(others) and materials.writer.count(text(2 * repeats, _COMMON)) <= room:
            repeats *= 2
            number, ids = fit(repeats, room)
        return ids

    wording = Wording(
        "In the numbered list of words below, some words are more common than others. Remember those.\n\n",
        f"Which are the {_COMMON} most common words in the list above?",
        f"The {_COMMON} most common words in the list are:",
    )
    return materials.writer.write(length, wording, body, common)


def frequent_words(materials: Materials, length: int, rng: Random) -> Prompt:
    """Write a prompt of at most ``length`` tokens that asks for the three most frequent coded words (FWE).

    Frequencies follow a zeta distribution with exponent 2, as in the paper; dots stand for the first.
    """
    coded = words.letters(1000, rng, 6)
    seed = rng.getrandbits(64)

    def text(number: int) -> str:
        counts = zeta_counts(number)
        ranked = [_DOTS, *coded[: len(counts) - 1]]
        entries = [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]
        Random(seed).shuffle(entries)
        return " ".join(entries)

    wording = Wording(
        "Count how often each coded word appears in the following text. Dots mean nothing.\n\n",
        f"Which are the {_FREQUENT} most frequent coded words in the text above?",
        f"The {_FREQUENT} most frequent coded words are:",
    )

    def body(room: int) -> Tensor:
        return materials.largest(text, room, _least_telling(), 1 << 20)[1]

    return materials.writer.write(length, wording, body, coded[:_FREQUENT])


def zeta_counts(number: int) -> list[int]:
    """Return how often words stand in a text of about so many, by rank."""
    total = math.pi**2 / 6
    counts: list[int] = []
    while count := round(number / (len(counts) + 1) ** 2 / total):
        counts.append(count)
    return counts


def _least_telling() -> int:
    """Return the least number of words from which on the ranks asked for are told from the next."""
    return next(number for number in range(200, 0, -1) if not _tells(number - 1))


def _tells(number: int) -> bool:
    counts = [*zeta_counts(number), 0, 0, 0, 0, 0]
    return counts[_FREQUENT] > counts[_FREQUENT + 1]
