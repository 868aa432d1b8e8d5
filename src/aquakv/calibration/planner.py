"""Plan codecs for a whole model: trial fits on observed layers, and what errors in each layer do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from aquakv.calibration.fit import CodecFit
from aquakv.calibration.group import Group
from aquakv.calibration.observe import LayerObservation
from aquakv.calibration.plan import Plan
from aquakv.calibration.progress import Phase, Ticker
from aquakv.calibration.sensitivity import HarmWalk
from aquakv.calibration.sweep import Split
from aquakv.config import CodecConfig
from aquakv.models.adapter import ModelAdapter

#: Fits that find the water level before the one that counts.
TRIALS = 2

#: Text that errors are sent through: tokens of each sequence, and one sequence more for every so many tokens.
PROBE_TOKENS = 512
TOKENS_PER_PROBE = 32768
MOST_PROBES = 2

Harm = list[dict[str, float]]


@dataclass
class Planner:
    """Find water levels with observed layers.

    Attributes
    ----------
    adapter
        The model.
    tokens
        ``[sequences, seq_len]`` int64: all of the calibration text, the observed sequences first.
    configs
        What to plan, by name.
    batches
        Observed batches that trial fits see, from the first on.
    held_out
        How many of these batches' sequences are not fitted.
    batch_sizes
        Sequences of each observed batch.
    ticker
        Told of every batch of every sweep.
    group
        The processes that plan the same: each sends a part of the errors through the layers.
    observations
        Of every compressed layer, all observed batches; see `observe`.
    """

    adapter: ModelAdapter
    tokens: Tensor
    configs: Mapping[str, CodecConfig]
    batches: int
    held_out: int
    batch_sizes: Sequence[int]
    ticker: Ticker | None = None
    group: Group = field(default_factory=Group)
    observations: list[LayerObservation] = field(default_factory=list)
    _measured: tuple[CodecFit, HarmWalk] | None = None

    @property
    def layers(self) -> int:
        """Decoder layers that `observe` wants to see."""
        if self._measuring() is None:
            return self.adapter.compressed_layers[-1] + 1
        return len(self.adapter.layers)

    def observe(self, steps: Iterable[tuple[int, LayerObservation | None]]) -> None:
        """Take in layers, each with its weights at hand, and send a first fit's errors through them.

        The errors are those of the first configuration that asks for their harm: what they do depends little
        on how they came about.
        """
        config = self._measuring()
        if config is not None:
            count = min(MOST_PROBES, 1 + self.tokens.numel() // TOKENS_PER_PROBE)
            probe_tokens = self.tokens[:count, :PROBE_TOKENS]
            probe = (len(probe_tokens), probe_tokens.shape[1] - config.window.sink_tokens)
            walk = HarmWalk(self.adapter, probe_tokens, self.group)
            self._measured = self._fit(config, Plan(), probe), walk
        for layer_idx, observation in steps:
            if observation is not None:
                self.observations.append(observation)
            if self._measured is None:
                continue
            trial, walk = self._measured
            if observation is not None:
                with self._phase("plan: fit"):
                    fit_observation(trial, observation.head(self.batches), None)
            with self._phase("plan: harm"):
                walk.advance(layer_idx, None if observation is None else trial.probe_errors.pop())

    def plan(self) -> tuple[dict[str, Plan], Harm | None]:
        """Return each configuration's plan, and the measured harm of errors if one of them asks for it."""
        harm: Harm | None = None
        plans: dict[str, Plan] = {}
        first = None
        if self._measured is not None:
            first, walk = self._measured
            with self._phase("plan: harm"):
                harm = walk.finish()
            self._measured = None
        for name, config in self._in_order():
            trial = self._trial(config, Plan(), None) if first is None else first
            first = None
            trial.weigh(None if harm is None else [importance(config, layer) for layer in harm])
            plan = trial.next_plan()
            for _ in range(TRIALS - 1):
                plan = self._trial(config, plan, harm).next_plan()
            plans[name] = plan
        return plans, harm

    def _in_order(self) -> list[tuple[str, CodecConfig]]:
        """Return the configurations, those that measure first: what they find serves all."""
        return sorted(self.configs.items(), key=lambda item: not measures(item[1]))

    def _measuring(self) -> CodecConfig | None:
        """Return the configuration whose errors are measured, or None."""
        ordered = self._in_order()
        if not ordered or not measures(ordered[0][1]) or not HarmWalk.can_measure(self.adapter):
            return None
        return ordered[0][1]

    def _trial(self, config: CodecConfig, plan: Plan, harm: Harm | None) -> CodecFit:
        fit = self._fit(config, plan, (0, 0))
        with self._phase("plan: fit"):
            for order, observation in enumerate(self.observations):
                if self.ticker is not None:
                    self.ticker.reach(observation.layer)
                part = observation.head(self.batches)
                fit_observation(fit, part, None if harm is None else harm[order])
        return fit

    def _phase(self, phase: Phase) -> AbstractContextManager[None]:
        return nullcontext() if self.ticker is None else self.ticker.phase(phase)

    def _fit(self, config: CodecConfig, plan: Plan, probe: tuple[int, int]) -> CodecFit:
        split = Split.of(self.batch_sizes[: self.batches], self.held_out)
        shape = self.adapter.fingerprint(identities=False)
        on_batch = (lambda: None) if self.ticker is None else self.ticker
        return CodecFit(config, shape, split, self.adapter.device, on_batch, plan, probe)


def measures(config: CodecConfig) -> bool:
    """Tell whether a configuration weighs layers by what errors in them do."""
    return config.allocation.kind == "water-filling" and config.allocation.importance == "measured"


def needs_weights(config: CodecConfig) -> bool:
    """Tell whether a configuration depends on what attention feels of errors."""
    return config.transform.kind == "klt" or config.guard.threshold is not None


def importance(config: CodecConfig, harm: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return the weights of a layer's keys and values in the allocation."""
    if harm is None or not measures(config):
        return None
    return {kind: value**config.allocation.importance_exponent for kind, value in harm.items()}


def fit_observation(fit: CodecFit, observation: LayerObservation, harm: Mapping[str, float] | None) -> None:
    """Fit a codec's next layer to an observation."""
    config = fit.config
    sinks = config.window.sink_tokens
    metrics = observation.metrics(config.transform.metric_floor) if needs_weights(config) else None
    fit.fit_layer(
        [batch[:, sinks:] for batch in observation.keys],
        [batch[:, sinks:] for batch in observation.values],
        metrics,
        importance(config, harm),
    )
