"""Retrieval of one number from a long text, by where in the text it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

from aquakv.evaluation.generation import Replies, Reply, reply_to
from aquakv.evaluation.methods import Method
from aquakv.evaluation.prompts import Haystack, Prompt, PromptWriter, Wording
from aquakv.evaluation.tasks.task import Setting, Task, fitting_lengths, require_numbers
from aquakv.models.loading import LoadedModel

#: Lengths taken if none are named, as far as the model goes.
DEFAULT_LENGTHS = (1024, 2048, 4096, 8192)

#: Per cent of the text before the needle.
DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)

_WORDING = Wording(
    instruction="A pass key is hidden somewhere in the following text. Find it and remember it.\n\n",
    question="What is the pass key that is hidden in the text above?",
    reply="The pass key is",
)
_NEEDLE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"


@dataclass(frozen=True)
class Needle(Task):
    """Ask for a number that a sentence in a long text names (arXiv:2305.16300 §4.3, "passkey").

    Attributes
    ----------
    data
        The text: a ``DATA`` argument, or ``noise`` for sentences that say nothing, repeated.
    lengths
        Tokens of a prompt, question included; if None 1024, 2048, 4096 and 8192 as far as the model goes.
    depths
        Where the sentence is, in per cent of the text.
    samples
        Prompts of every length and depth. Those of one length have the same texts and numbers at all depths.
    seed
        Of texts and numbers.
    max_new_tokens
        Tokens of a reply.
    digits
        Of the number.
    """

    name = "needle"

    data: str = "pydoc:test"
    lengths: Sequence[int] | None = None
    depths: Sequence[float] = DEFAULT_DEPTHS
    samples: int = 4
    seed: int = 0
    max_new_tokens: int = 16
    digits: int = 5

    def __post_init__(self) -> None:
        require_numbers(self, "lengths", least=1)
        require_numbers(self, "depths", least=0, most=100, whole=False)
        for setting in ("samples", "max_new_tokens", "digits"):
            require_numbers(self, setting, least=1)

    def prompts(self, loaded: LoadedModel, setting: Setting) -> dict[tuple[int, float], list[Prompt]]:
        """Return the prompts, by length and depth."""
        lengths = fitting_lengths(self, self.lengths, DEFAULT_LENGTHS, loaded, self.max_new_tokens)
        writer = PromptWriter(loaded.tokenizer)
        haystack = Haystack.of(writer, self.data, self.samples * max(lengths), setting.data_dir)
        return {
            (length, depth): [self._prompt(writer, haystack, length, depth, i) for i in range(self.samples)]
            for length in lengths
            for depth in self.depths
        }

    def _prompt(
        self, writer: PromptWriter, haystack: Haystack, length: int, depth: float, sample: int
    ) -> Prompt:
        # Not of the depth: so that depths are compared by the same texts and numbers.
        rng = Random(f"needle {self.seed} {length} {sample}")
        key = str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
        needle = writer.ids(_NEEDLE.format(key=key))
        return writer.write(
            length,
            _WORDING,
            lambda room: haystack.hide(room, [needle], [depth / 100], rng),
            [key],
            answer=key,
        )

    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods; see `Task.evaluate`."""
        cells = self.prompts(loaded, setting)
        prompts = [prompt for cell in cells.values() for prompt in cell]
        exact, found = reply_to(
            loaded,
            methods,
            prompts,
            [self.max_new_tokens] * len(prompts),
            batch_size=setting.batch_size,
            progress=setting.progress,
        )
        return {name: self._fields(list(cells), prompts, exact, replies) for name, replies in found.items()}

    def _fields(
        self,
        cells: list[tuple[int, float]],
        prompts: list[Prompt],
        exact: Replies,
        replies: Replies,
    ) -> dict[str, Any]:
        def figures(part: slice) -> dict[str, Any]:
            own, reference = replies.replies[part], exact.replies[part]
            return {
                "accuracy": _accuracy(own, prompts[part]),
                "baseline_accuracy": _accuracy(reference, prompts[part]),
                "answer_nll": _mean_nll(own),
                "exact_answer_nll": _mean_nll(reference),
            }

        rows = [
            {
                "length": length,
                "depth": depth,
                "samples": self.samples,
                **figures(slice(i * self.samples, (i + 1) * self.samples)),
            }
            for i, (length, depth) in enumerate(cells)
        ]
        return {**figures(slice(None)), **replies.size_fields(), "cells": rows}


def retrieved(reply: str, key: str) -> bool:
    """Say whether the first number in a reply is the one asked for."""
    first = re.search(r"\d+", reply)
    return first is not None and first.group() == key


def _accuracy(replies: Sequence[Reply], prompts: Sequence[Prompt]) -> float:
    return fmean(retrieved(r.text, prompt.answers[0]) for r, prompt in zip(replies, prompts, strict=True))


def _mean_nll(replies: Sequence[Reply]) -> float:
    return fmean(reply.answer_nll for reply in replies if reply.answer_nll is not None)
