"""Plan codecs for a whole model: trial fits on observed layers, and what errors in each layer do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from aquakv.calibration.fit import CodecFit, Split
from aquakv.calibration.observe import LayerObservation
from aquakv.calibration.plan import Plan
from aquakv.calibration.sensitivity import measure_harm
from aquakv.config import CodecConfig
from aquakv.models.adapter import ModelAdapter

#: Fits that find the water level before the one that counts.
TRIALS = 2

#: Text that errors are sent through: tokens of each sequence, and one sequence more for every so many tokens.
PROBE_TOKENS = 512
_TOKENS_PER_PROBE = 32768
_MOST_PROBES = 2

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
    observations
        Of every compressed layer.
    held_out
        How many of the observed sequences are not fitted.
    on_batch
        Called after every batch of every sweep.
    on_layer
        Called with every layer's index before its first batch.
    """

    adapter: ModelAdapter
    tokens: Tensor
    observations: Sequence[LayerObservation]
    held_out: int
    on_batch: Callable[[], None]
    on_layer: Callable[[int], None] = lambda layer: None

    def plan(self, configs: Mapping[str, CodecConfig]) -> tuple[dict[str, Plan], Harm | None]:
        """Return each configuration's plan, and the measured harm of errors if one of them asks for it.

        The errors are those of the first configuration that asks: what they do depends little on how they
        came about.
        """
        harm: Harm | None = None
        plans: dict[str, Plan] = {}
        sequences = min(_MOST_PROBES, 1 + self.tokens.numel() // _TOKENS_PER_PROBE)
        probe_tokens = self.tokens[:sequences, :PROBE_TOKENS]
        # Those that measure go first: what they find serves all.
        for name in sorted(configs, key=lambda name: not measures(configs[name])):
            config = configs[name]
            wants_harm = measures(config) and harm is None
            sinks = config.window.sink_tokens
            probe = (len(probe_tokens), probe_tokens.shape[1] - sinks) if wants_harm else (0, 0)
            trial = self._trial(config, Plan(), None, probe)
            if wants_harm:
                harm = measure_harm(self.adapter, probe_tokens, trial.probe_errors)
            trial.weigh(None if harm is None else [importance(config, layer) for layer in harm])
            plan = trial.next_plan()
            for _ in range(TRIALS - 1):
                plan = self._trial(config, plan, harm, (0, 0)).next_plan()
            plans[name] = plan
        return plans, harm

    def _trial(self, config: CodecConfig, plan: Plan, harm: Harm | None, probe: tuple[int, int]) -> CodecFit:
        split = Split.of(self.observations[0].batch_sizes, self.held_out)
        fingerprint, device = self.adapter.fingerprint(), self.adapter.device
        fit = CodecFit(config, fingerprint, split, device, self.on_batch, plan, probe)
        for order, observation in enumerate(self.observations):
            self.on_layer(observation.layer)
            fit_observation(fit, observation, None if harm is None else harm[order])
        return fit


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
