"""Long generations, by how far predictions go from the exact cache's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aquakv.data import token_sequences
from aquakv.evaluation.drift import Drift, continued, measure_drift
from aquakv.evaluation.generation import require_coded, require_room
from aquakv.evaluation.methods import Method
from aquakv.evaluation.quality import Ticker
from aquakv.evaluation.tasks.task import Setting, Task, require_numbers
from aquakv.models.loading import LoadedModel


@dataclass(frozen=True)
class LongDrift(Task):
    """Generate a long text with the exact cache, and compare predictions of it position by position.

    Attributes
    ----------
    data
        A ``DATA`` argument: what is continued.
    prompt_tokens, new_tokens
        Tokens of it, and tokens generated behind.
    samples
        Texts.
    bin_tokens
        Positions that are taken together.
    temperature
        Of sampling; 0 takes the likeliest token, which small models soon repeat themselves by.
    seed
        Of sampling.
    """

    name = "drift"

    data: str = "pydoc:test"
    prompt_tokens: int = 512
    new_tokens: int = 4096
    samples: int = 1
    bin_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for setting in ("prompt_tokens", "new_tokens", "samples", "bin_tokens"):
            require_numbers(self, setting, least=1)
        require_numbers(self, "temperature", least=0, whole=False)
        require_numbers(self, "seed", least=0)

    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods; see `Task.evaluate`."""
        require_room(loaded, self.prompt_tokens, self.new_tokens)
        for name, method in methods.items():
            require_coded(name, method, self.prompt_tokens + self.new_tokens - 1)
        prompts = token_sequences(
            [self.data], loaded.tokenizer, self.samples, self.prompt_tokens, setting.data_dir
        )
        found = {name: Drift.empty(self.new_tokens, self.bin_tokens) for name in methods}
        tick = Ticker(self.samples * (1 + len(methods)), setting.progress)
        for i, batch in enumerate(prompts.split(setting.batch_size)):
            texts = continued(
                loaded, batch, self.new_tokens, temperature=self.temperature, seed=self.seed + i
            )
            tick(len(batch))
            for name, method in methods.items():
                measure_drift(loaded, method, texts, self.prompt_tokens, found[name])
                tick(len(batch))
        return {name: drift.fields() for name, drift in found.items()}
