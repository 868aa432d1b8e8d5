"""RULER's generated tasks (arXiv:2404.06654)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

from aquakv.errors import ConfigError
from aquakv.evaluation.generation import Replies, reply_to
from aquakv.evaluation.methods import Method
from aquakv.evaluation.prompts import Prompt, PromptWriter
from aquakv.evaluation.ruler import KINDS, Materials, found_strings
from aquakv.evaluation.tasks.task import Setting, Task, fitting_lengths, require_numbers
from aquakv.models.loading import LoadedModel


@dataclass(frozen=True)
class Ruler(Task):
    """Retrieval, multi-hop tracing and aggregation, each scored by the strings found in the reply.

    Attributes
    ----------
    tasks
        Names of `KINDS`.
    lengths
        Tokens of a prompt, question included; tasks about lists come as near as they can. If None 4096.
    samples
        Prompts of every task and length.
    seed
        Of all that is drawn.
    max_new_tokens
        Tokens of a reply, by task; where none are given as in the paper's benchmark.
    data
        The text that hides needles, where it is real text.
    """

    name = "ruler"

    tasks: Sequence[str] = tuple(KINDS)
    lengths: Sequence[int] | None = None
    samples: int = 4
    seed: int = 0
    max_new_tokens: Mapping[str, int] = field(default_factory=dict)
    data: str = "pydoc:test"

    def __post_init__(self) -> None:
        require_numbers(self, "lengths", least=1)
        require_numbers(self, "samples", least=1)
        if isinstance(self.tasks, str) or not self.tasks:
            raise ConfigError(f"task ruler: tasks: expected a list of {', '.join(KINDS)}, got {self.tasks!r}")
        for name in [*self.tasks, *self.max_new_tokens]:
            if name not in KINDS:
                raise ConfigError(f"task ruler: expected tasks of {', '.join(KINDS)}, got {name!r}")
        for name, tokens in self.max_new_tokens.items():
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise ConfigError(
                    f"task ruler: max_new_tokens: expected whole numbers from 1, got {tokens!r} for {name}"
                )

    def prompts(self, loaded: LoadedModel, setting: Setting) -> dict[tuple[str, int], list[Prompt]]:
        """Return the prompts, by task and length."""
        most_new = max(map(self._new_tokens, self.tasks))
        lengths = fitting_lengths(self, self.lengths, (4096,), loaded, most_new)
        writer = PromptWriter(loaded.tokenizer)
        materials = Materials.of(writer, self.data, self.samples * max(lengths), setting.data_dir)
        return {
            (name, length): [self._prompt(materials, name, length, i) for i in range(self.samples)]
            for name in dict.fromkeys(self.tasks)
            for length in lengths
        }

    def _prompt(self, materials: Materials, name: str, length: int, sample: int) -> Prompt:
        try:
            return KINDS[name].make(materials, length, Random(f"{name} {self.seed} {length} {sample}"))
        except ConfigError as error:
            raise ConfigError(f"task ruler: {name}: {error}") from error

    def _new_tokens(self, name: str) -> int:
        return self.max_new_tokens.get(name, KINDS[name].max_new_tokens)

    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods; see `Task.evaluate`."""
        cells = self.prompts(loaded, setting)
        exact, found = reply_to(
            loaded,
            methods,
            [prompt for cell in cells.values() for prompt in cell],
            [self._new_tokens(name) for (name, _), cell in cells.items() for _ in cell],
            batch_size=setting.batch_size,
            progress=setting.progress,
        )
        return {name: self._fields(cells, exact, replies) for name, replies in found.items()}

    def _fields(
        self, cells: dict[tuple[str, int], list[Prompt]], exact: Replies, replies: Replies
    ) -> dict[str, Any]:
        rows = [
            {
                "task": name,
                "length": length,
                "samples": len(cell),
                "tokens": [prompt.tokens for prompt in cell],
                "score": _score(replies, i * self.samples, cell),
                "baseline_score": _score(exact, i * self.samples, cell),
            }
            for i, ((name, length), cell) in enumerate(cells.items())
        ]
        means = {key: fmean(row[key] for row in rows) for key in ("score", "baseline_score")}
        return {**means, **replies.size_fields(), "rows": rows}


def _score(replies: Replies, first: int, prompts: Sequence[Prompt]) -> float:
    part = replies.replies[first : first + len(prompts)]
    return fmean(found_strings(r.text, prompt.answers) for r, prompt in zip(part, prompts, strict=True))
