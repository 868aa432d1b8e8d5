"""Perplexity, divergence and agreement as a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aquakv.data import token_sequences
from aquakv.errors import ConfigError
from aquakv.evaluation.methods import Method, allows_single_pass
from aquakv.evaluation.quality import PROTOCOLS, Protocol, evaluate_quality
from aquakv.evaluation.results import quality_fields
from aquakv.evaluation.tasks.task import Setting, Task
from aquakv.models.loading import LoadedModel

#: A protocol for each method by what it allows.
AUTO: Literal["auto"] = "auto"


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
        ``streaming`` through the real cache, ``single-pass``, the same where a method allows it, or ``auto``,
        a single pass for all methods that allow it.
    """

    name = "perplexity"

    data: str = "pydoc:test"
    samples: int = 8
    seq_len: int = 2048
    protocol: Protocol | Literal["auto"] = "streaming"

    def __post_init__(self) -> None:
        protocols = (*PROTOCOLS, AUTO)
        if self.protocol not in protocols:
            raise ConfigError(
                f"task perplexity: expected a protocol of {', '.join(protocols)}, got {self.protocol!r}"
            )

    def evaluate(
        self, loaded: LoadedModel, methods: Mapping[str, Method], setting: Setting
    ) -> dict[str, dict[str, Any]]:
        """Measure methods; see `Task.evaluate`."""
        tokens = token_sequences([self.data], loaded.tokenizer, self.samples, self.seq_len, setting.data_dir)
        found: dict[str, dict[str, Any]] = {}
        for protocol, some in self._by_protocol(methods).items():
            qualities = evaluate_quality(
                loaded.model,
                tokens,
                some,
                protocol=protocol,
                batch_size=setting.batch_size,
                progress=setting.progress,
            )
            for name, quality in qualities.items():
                found[name] = {"protocol": protocol, **quality_fields(quality)}
        return {name: found[name] for name in methods}

    def _by_protocol(self, methods: Mapping[str, Method]) -> dict[Protocol, dict[str, Method]]:
        if self.protocol != AUTO:
            return {self.protocol: dict(methods)}
        groups: dict[Protocol, dict[str, Method]] = {}
        for name, method in methods.items():
            protocol: Protocol = "single-pass" if allows_single_pass(method) else "streaming"
            groups.setdefault(protocol, {})[name] = method
        return groups
