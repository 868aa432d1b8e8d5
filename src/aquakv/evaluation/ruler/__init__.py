"""RULER's tasks that need no other data (arXiv:2404.06654), generated to a length in tokens.

Eleven of the paper's thirteen; question answering over SQuAD and HotpotQA is left out. Implemented from the
paper, in words of our own: figures are to be compared with each other, not with published ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from aquakv.evaluation.prompts import Prompt
from aquakv.evaluation.ruler.hidden import Needles, variable_tracking
from aquakv.evaluation.ruler.lists import common_words, frequent_words
from aquakv.evaluation.ruler.materials import Materials

__all__ = ["KINDS", "Kind", "Materials", "found_strings"]


@dataclass(frozen=True)
class Kind:
    """A task: how a prompt is made, and how many tokens a reply may have."""

    make: Callable[[Materials, int, Random], Prompt]
    max_new_tokens: int


#: All tasks by their names in RULER.
KINDS: dict[str, Kind] = {
    "niah_single_1": Kind(Needles("noise"), 128),
    "niah_single_2": Kind(Needles("text"), 128),
    "niah_single_3": Kind(Needles("text", values="uuids"), 128),
    "niah_multikey_1": Kind(Needles("text", num_keys=4), 128),
    "niah_multikey_2": Kind(Needles("needles"), 128),
    "niah_multikey_3": Kind(Needles("needles", keys="uuids", values="uuids"), 128),
    "niah_multivalue": Kind(Needles("text", num_values=4), 128),
    "niah_multiquery": Kind(Needles("text", num_keys=4, num_queries=4), 128),
    "vt": Kind(variable_tracking, 30),
    "cwe": Kind(common_words, 120),
    "fwe": Kind(frequent_words, 50),
}


def found_strings(reply: str, answers: tuple[str, ...]) -> float:
    """Return the fraction of answers that are found in a reply, whatever their case (RULER's score)."""
    lower = reply.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)
