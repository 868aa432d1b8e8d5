"""How lm-eval's tasks are run, and what was counted while they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from aquakv.evaluation.held import Held
from aquakv.evaluation.quality import EvaluationProgress, Protocol

#: Which part of a prompt that is too long goes: its beginning, as in lm-eval, or its middle, as in LongBench.
Truncation = Literal["left", "middle"]


@dataclass(frozen=True)
class HarnessSetting:
    """How tasks are run, alike for all methods.

    Attributes
    ----------
    limit
        Documents of each task, the first ones; all if None.
    max_length
        Tokens of a prompt and its answer at most; as many as the model takes if None.
    truncation
        Which part of longer prompts goes.
    prefill_chunk
        Tokens of a prompt that are fed at once. If None all of them, as `generate` does: then a prompt's own
        tokens attend to each other exactly, and answers to what was compressed of it.
    protocol
        How likelihoods are computed: ``streaming`` or ``single-pass``, see `evaluate_quality`.
    chat
        Wrap prompts in the tokenizer's chat template.
    batch_size
        Prompts at once. Likelihoods with codes are computed one by one.
    seed
        For the choice of few-shot examples, and for tasks that sample.
    """

    limit: int | None = None
    max_length: int | None = None
    truncation: Truncation = "left"
    prefill_chunk: int | None = None
    protocol: Protocol = "streaming"
    chat: bool = False
    batch_size: int = 1
    seed: int = 1234


@dataclass
class Usage(Held):
    """What caches held, and what was fed.

    Attributes
    ----------
    prompt_tokens
        Tokens of all prompts; where likelihoods are asked for, of all that was scored with its context.
    truncated_prompts
        Prompts that were too long.
    """

    prompt_tokens: int = 0
    truncated_prompts: int = 0

    @property
    def coded_fraction(self) -> float | None:
        """How much of what caches held was codes, by values; None where no cache was held."""
        return self.coded_values / self.held_values if self.held_values else None


@dataclass
class Progress:
    """Requests done and in all, over all methods; more become known as tasks go on."""

    report: Callable[[EvaluationProgress], None] | None = None
    done: int = 0
    total: int = 0

    @contextmanager
    def requests(self, count: int) -> Iterator[None]:
        """Have so many requests done within the block, of which some may be counted on the way."""
        start = self.done
        self.total += count
        self._report()
        yield
        self.done = start + count
        self._report()

    def advance(self, count: int) -> None:
        """Count requests that are done."""
        self.done = min(self.total, self.done + count)
        self._report()

    def _report(self) -> None:
        if self.report is not None:
            self.report(EvaluationProgress(self.done, self.total))
