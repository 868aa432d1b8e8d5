"""Perplexity, divergence and agreement as a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.methods import Method
from aquakv.evaluation.quality import PROTOCOLS, Protocol, evaluate_quality
from aquakv.evaluation.results import quality_fields
from aquakv.evaluation.tasks.task import Setting, Task
from aquakv.models.loading import LoadedModel


@dataclass(frozen=True)
class Perplexity(Task):
    """Compare predictions of a text with those of the exact cache.

    Attributes
    ----------
    data
        A ``DATA`` argument.
    samples, seq_len
        Sequences, and tokens of each.
    protocol
        ``streaming`` through the real cache, or ``single-pass``, the same where a method allows it.
    """

    name = "perplexity"

    data: str = "pydoc:test"
    samples: int = 8
    seq_len: int = 2048
    protocol: Protocol = "streaming"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"task perplexity: expected a protocol of {', '.join(PROTOCOLS)}, got {self.protocol!r}"
            )

    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods; see `Task.evaluate`."""
        tokens = token_sequences([self.data], loaded.tokenizer, self.samples, self.seq_len, setting.data_dir)
        found = evaluate_quality(
            loaded.model,
            tokens,
            methods,
            protocol=self.protocol,
            batch_size=setting.batch_size,
            progress=setting.progress,
        )
        return {name: quality_fields(quality) for name, quality in found.items()}
